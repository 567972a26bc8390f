"""A real language model, whose logits mean something: our answers are stock's, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gc2ray.core.config.job import Cluster
from gc2ray.core.records import Answer, ImageRef, Request
from gc2ray.engine.engine import Engine
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.hf_reference import stock_inputs
from tests.support.rows import encoded, make_recipe, picture
from tests.support.smollm2 import build, fetched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NEW_TOKENS = 48
SIZES = [(96, 96), (96, 200), (300, 100), (180, 190), (60, 250)]
LONG = (
    "A lighthouse stood on a rock two miles from the coast. Its keeper, who had come there as a "
    "young man, wrote down every ship that passed, its flag, its rig and its heading, and at the "
    "end of each year sent the book to the harbour master, who had never opened one of them. "
)
QUESTIONS = [
    "Write a short story about a letter in a bottle.",
    "Explain in simple words how plants live on light.",
    "List ten countries in Europe and their capitals.",
    f"Summarize this text:\n{LONG}",
    "Write a Python function that reverses a string, and explain it.",
    "Translate to French: The cat sits on the warm stone and watches the birds.",
    "Who was Marie Curie?",
    "How does a virus differ from a bacterium?",
    "Answer with one word: what is the colour of the sky?",
    "Describe the picture.",
    "Say hello.",
    "Name three prime numbers, and say why they are prime.",
]


@pytest.fixture(scope="module")
def smollm2(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert pytestconfig.cache is not None
    return build(fetched(pytestconfig.cache.mkdir("smollm2")), tmp_path_factory.mktemp("smollm2"))


def rows() -> list[Request]:
    """Every other one asks to be brief, so that many answers end by themselves."""
    questions = [f"{text}{' Be very brief.' * (i % 2)}" for i, text in enumerate(QUESTIONS)]
    return [
        Request(
            row_key=f"rows#{row}",
            source="rows",
            row=row,
            images=(ImageRef(data=encoded(picture(SIZES[row % len(SIZES)], row))),),
            prompts=(question,),
        )
        for row, question in enumerate(questions)
    ]


def ours(loaded: LoadedModel) -> list[Answer]:
    changes = {"compression__retention": 1.0, "generation__max_new_tokens": NEW_TOKENS}
    engine = Engine(loaded, make_recipe("unused", **changes), Cluster())
    return sorted(engine.stream(rows()), key=lambda answer: answer.request.row)


@torch.inference_mode()
def stock(loaded: LoadedModel) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """Stock's greedy answers to a padded batch of rows; by token, in half precision, its logits."""
    chat, asked = ChatPrompt(loaded.processor), rows()
    images = [picture(SIZES[request.row % len(SIZES)], request.row) for request in asked]
    texts = [chat.render(request.prompts[0]) for request in asked]
    inputs = stock_inputs(loaded, images, texts)
    output = loaded.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        output_logits=loaded.model.dtype != torch.float32,
        return_dict_in_generate=True,
    )
    (end,) = loaded.end_tokens
    found = []
    for row in output.sequences[:, inputs["input_ids"].shape[1] :].tolist():
        found.append(tuple(row[: row.index(end) + 1] if end in row else row))
    return found, [logits.to(loaded.model.dtype) for logits in output.logits or ()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_equal_those_of_stock(smollm2: Path, dtype: str) -> None:
    """In bfloat16 up to a near tie: two tokens whose logits stock has at most two steps apart."""
    loaded = loading.load(str(smollm2), revision=None, dtype=dtype, device="cpu")
    count = len(rows())
    answers = ours(loaded)
    assert [answer.error for answer in answers] == [None] * count
    wanted, logits = stock(loaded)
    ties = []
    for row in range(count):
        at = first_difference(answers[row].token_ids, wanted[row])
        if at is not None:
            assert dtype != "float32", f"row {row} differs at token {at}"
            pair = [answers[row].token_ids[at], wanted[row][at]]
            ties.append(steps_apart(*logits[at][row, pair]))
    assert max(ties, default=0) <= 2
    assert len(ties) < count // 2, "most answers are the same to the last token"
    reasons = [answer.finish_reason for answer in answers]
    assert count // 8 < reasons.count("stop") < count, "some end by themselves, some do not"
    assert sum(len(answer.token_ids) for answer in answers) > NEW_TOKENS // 2 * count


def test_it_is_the_language_model_that_it_claims_to_be(smollm2: Path) -> None:
    """Whoever takes its weights for others', or its rotary halves for pairs, gets no Paris."""
    loaded = loading.load(str(smollm2), revision=None, dtype="float32", device="cpu")
    inputs = loaded.processor.tokenizer("The capital of France is", return_tensors="pt")
    output = loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert loaded.processor.tokenizer.decode(output[0]).endswith("is Paris.")


def first_difference(ours: Sequence[int], stock: Sequence[int]) -> int | None:
    """Where two answers first differ; one that goes on where the other ends is an error here."""
    pairs = enumerate(zip(ours, stock, strict=False))
    found = next((at for at, (a, b) in pairs if a != b), None)
    assert found is not None or len(ours) == len(stock)
    return found


def steps_apart(low: Tensor, high: Tensor) -> int:
    """Steps of their dtype from one number to a higher one; 100 are many."""
    steps = 0
    while low < high and steps < 100:
        low, steps = torch.nextafter(low, torch.full_like(low, torch.inf)), steps + 1
    return steps
