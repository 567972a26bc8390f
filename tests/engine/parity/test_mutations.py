"""`gc2ray check` finds what is wrong, whatever part of ours it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gc2ray.core.records import Answer, Request
from gc2ray.engine.decoding import continuous_batching as native
from gc2ray.engine.engine import Engine, load_recipe_model
from gc2ray.engine.parity import check as parity
from gc2ray.engine.parity import result as parity_result
from gc2ray.models import adapter
from gc2ray.models.adapter import ModelAdapter
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.families.llava_next import LlavaNextVision
from gc2ray.reporting.terminal_tables import parity_lines
from tests.support.model_files import copy_of
from tests.support.parity import checked, write_rows


def no_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        parity, "load_recipe_model", lambda *a: replace(load_recipe_model(*a), end_tokens=())
    )


def another_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        parity, "load_recipe_model", lambda *a: replace(load_recipe_model(*a), end_tokens=(1, 9))
    )


def a_blank(patch: pytest.MonkeyPatch) -> None:
    render = ChatPrompt.render
    patch.setattr(ChatPrompt, "render", lambda *a: render(*a).replace("\n", "\n ", 1))


def a_row_of_the_projector(patch: pytest.MonkeyPatch) -> None:
    freeze = LlavaNextVision.freeze

    def frozen(vision: Any) -> None:
        vision.projector.linear_2.weight.data[3] *= 1.2
        freeze(vision)

    patch.setattr(LlavaNextVision, "freeze", frozen)


def prompt_positions(patch: pytest.MonkeyPatch) -> None:
    embed = ModelAdapter.embed

    def embedded(*inputs: Any) -> Any:
        prompt = embed(*inputs)
        positions = torch.arange(len(prompt))
        positions[prompt.visual[-1][1] :] += 1
        return replace(prompt, positions=positions)

    patch.setattr(ModelAdapter, "embed", embedded)


def answer_positions(patch: pytest.MonkeyPatch) -> None:
    next_position = native._next_position
    patch.setattr(native, "_next_position", lambda prompt: next_position(prompt) + 1)


def pixels(patch: pytest.MonkeyPatch) -> None:
    table = adapter.pixel_table
    patch.setattr(adapter, "pixel_table", lambda cropping: table(cropping) + 0.02)


def no_newlines(patch: pytest.MonkeyPatch) -> None:
    pack = ModelAdapter.pack

    def packed(*inputs: Any) -> Any:
        parts = pack(*inputs)
        parts[0][-1] = 0
        return parts

    patch.setattr(ModelAdapter, "pack", packed)


def answer_text(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChatPrompt, "decode", lambda *_: "a cat")


Mutation = Callable[[pytest.MonkeyPatch], None]
MUTATIONS: dict[Mutation, str] = {
    no_end: "ends of answers: none; stock's: 1",
    another_end: "ends of answers: 1, 9; stock's: 1",
    a_blank: "prompt tokens: 0 of 3 prompts the same",
    a_row_of_the_projector: "tokens behind the image",
    prompt_positions: "tokens behind the image",
    answer_positions: "tokens behind the image",
    pixels: "tokens behind the image",
    no_newlines: "tokens behind the image",
    answer_text: "0 of 3 answers and their ends and texts",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutated_engine_fails(
    tiny_paths: dict[str, Path], source: Path, mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    found = checked(tiny_paths["vicuna"], source)
    assert not found.passed
    assert MUTATIONS[mutation] in "\n".join(parity_lines(found))
    if "behind" in MUTATIONS[mutation]:
        assert found.stock.difference > 10 * parity_result.TOLERANCE["float32"]


@pytest.mark.parametrize("mutation", [no_end, answer_positions, answer_text])
def test_a_mutated_engine_fails_in_half_precision(
    tiny_paths: dict[str, Path], source: Path, mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    assert not checked(tiny_paths["vicuna"], source, model__dtype="bfloat16").passed


@pytest.mark.parametrize(
    ("dtype", "temperature"), [("float32", 0.0), ("bfloat16", 0.0), ("bfloat16", 1.0)]
)
def test_images_given_to_the_wrong_rows_of_a_batch_fail(
    tiny_paths: dict[str, Path],
    tmp_path: Path,
    dtype: str,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one size, so that nothing but the answers tells; sampled ones of half precision do not."""
    rows = write_rows(tmp_path / "rows.parquet", ("What is it?",) * 3, [(168, 168)] * 3)
    stream = Engine.stream

    def swapped(engine: Engine, requests: Sequence[Request]) -> Iterator[Answer]:
        if engine._recipe.compression.method != "none":  # what stock is compared with stays right
            images = [request.images for request in requests]
            pairs = zip(requests, [*images[1:], images[0]], strict=True)
            requests = [replace(request, images=others) for request, others in pairs]
        return stream(engine, requests)

    monkeypatch.setattr(Engine, "stream", swapped)
    changes = {"model__dtype": dtype, "generation__temperature": temperature}
    found = checked(tiny_paths["llama3"], rows, **changes)
    assert found.stock.passed(dtype), parity_lines(found)
    assert found.same_alone < 3
    assert found.passed == (temperature > 0), parity_lines(found)
    message = "\n".join(parity_lines(found))
    assert ("differently in a batch than alone" in message) != found.passed
    assert ("only counted" in message) == found.passed


@pytest.mark.parametrize(
    "part",
    ["vision_tower", "image_newline", "up_proj", "lm_head"],
)
def test_one_nan_weight_fails(
    tiny_paths: dict[str, Path], source: Path, tmp_path: Path, part: str
) -> None:
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    file = model / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if part in name and "embeddings" not in name)
    weights[name].flatten()[-1] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    found = checked(model, source)
    assert not found.passed, parity_lines(found)
    message = "\n".join(parity_lines(found))
    assert "not finite" in message
