"""`gc2ray check`: it passes on whatever is right, and fails on whatever is not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled
from typer.testing import CliRunner

from gc2ray.cli import app
from gc2ray.core.errors import ConfigError, ShardError
from gc2ray.core.records import Answer, Request
from gc2ray.engine.decoding import continuous_batching as native
from gc2ray.engine.decoding.forced import ForcedDecoder, largest_difference
from gc2ray.engine.engine import Engine, load_recipe_model
from gc2ray.engine.parity import check as parity
from gc2ray.engine.parity import result as parity_result
from gc2ray.engine.parity.check import check_parity
from gc2ray.engine.parity.result import Parity, StockCheck
from gc2ray.models.base import Prompt
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.checkpoint.consistency import check_directory
from gc2ray.models.families import llava_next
from gc2ray.models.families.llava_next import LlavaNext
from gc2ray.models.hf_reference import StockAnswer, StockModel, StockSettings, _chat_template
from gc2ray.reporting.terminal_tables import parity_lines
from tests.support.rows import SIZES, encoded, make_job, picture, request
from tests.support.tiny_models import SPECS

PROMPTS = ("What is in the picture?", "How many\n\n objects  are there?", "Which colour?")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of other shapes and prompts."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet", PROMPTS)


def write_rows(
    path: Path, prompts: tuple[str | None, ...], sizes: Sequence[tuple[int, int]] = SIZES
) -> Path:
    images = [
        {"bytes": encoded(picture(size, seed)), "path": None}
        for seed, size in zip(range(len(prompts)), sizes, strict=False)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(images, kind), "prompt": list(prompts)}), path)
    return path


def checked(model: Path, source: Path, **changes: Any) -> Parity:
    settings = {"compression__retention": 0.5, "generation__max_new_tokens": 8, **changes}
    job = make_job(model, source, **settings)
    data = job.model_dump(mode="json")
    data["recipe"]["input"]["prompt"] = {"column": "prompt"}
    return check_parity(type(job).model_validate(data), rows=10)


def copy_of(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to))


def rewrite(file: Path, **changes: Any) -> None:
    """Other values in a JSON file; None takes a key out."""
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


HALVES = [("llama3", "bfloat16"), ("mistral", "bfloat16"), ("vicuna", "float16")]


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own tests have all 32."""
    monkeypatch.setattr(parity, "NEW_TOKENS", 10)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in SPECS), *HALVES])
def test_a_good_model_passes(
    tiny_paths: dict[str, Path], source: Path, name: str, dtype: str
) -> None:
    found = checked(tiny_paths[name], source, model__dtype=dtype)
    assert found.passed, parity_lines(found)
    assert (found.prompts, found.stock.prompts, found.stock.same_prompts) == (3, 3, 3)
    assert found.stock.tokens > 3
    assert found.stock.difference > 0, "compared with itself"
    if dtype == "float32":
        assert found.stock.same_answers == found.same_alone == 3
    assert found.host_bytes > 100_000_000


def test_a_good_model_decoded_by_generate_passes(
    tiny_paths: dict[str, Path], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("engine.engine", "engine.decoding.forced"):
        monkeypatch.setattr(f"gc2ray.{module}.unsupported", lambda model: "it is new")
    found = checked(tiny_paths["mistral"], source)
    assert found.passed, parity_lines(found)
    assert found.stock.same_answers == 3


@pytest.mark.parametrize(
    "rules",
    [
        {"no_repeat_ngram_size": 2},
        {"temperature": 0.2, "do_sample": True, "top_p": 0.9, "max_length": 20},
    ],
    ids=str,
)
def test_rules_that_the_recipe_takes_over_do_not_apply_to_stock(
    tiny_paths: dict[str, Path], source: Path, tmp_path: Path, rules: dict[str, Any]
) -> None:
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    rewrite(model / "generation_config.json", **rules)
    ignored = [name for name in rules if name == "no_repeat_ngram_size"]
    found = checked(model, source, generation__ignore_model_rules=ignored)
    assert found.passed, parity_lines(found)


UNHEARD: list[dict[str, Any]] = [
    {"num_return_sequences": 2, "do_sample": True},
    {"max_time": 1e-9},
    {"prompt_lookup_num_tokens": 3},
    {"is_assistant": True, "num_assistant_tokens": 3, "assistant_confidence_threshold": 0.5},
    {"cache_implementation": "offloaded"},
    {"return_dict_in_generate": False, "output_scores": True, "use_cache": False, "max_length": 3,
     "renormalize_logits": True, "early_stopping": True, "length_penalty": 2.0, "top_k": 3,
     "decoder_start_token_id": 5, "epsilon_cutoff": 0.1, "pad_token_id": 7, "max_new_tokens": 1},
]  # fmt: skip
"""Settings of a generation config that change no answer of ours."""


@pytest.mark.parametrize("unheard", UNHEARD, ids=lambda unheard: next(iter(unheard)))
def test_settings_that_we_ignore_do_not_change_stock(
    tiny_paths: dict[str, Path], tmp_path: Path, unheard: dict[str, Any]
) -> None:
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    image, settings = picture(SIZES[0]), StockSettings("float32", "cpu", max_new_tokens=4)
    with StockModel(model, settings) as stock:
        wanted = stock.answer(image, "What is it?")
    rewrite(model / "generation_config.json", **unheard)
    with StockModel(model, settings) as stock:
        found = stock.answer(image, "What is it?")
    assert (found.token_ids, found.finish_reason) == (wanted.token_ids, wanted.finish_reason)
    torch.testing.assert_close(found.logits, wanted.logits)


def test_stock_follows_the_models_own_rules(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    """All but those that answers do not follow."""
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    settings = StockSettings("float32", "cpu", max_new_tokens=4)

    def first_token(settings: StockSettings) -> int:
        with StockModel(model, settings) as stock:
            return stock.answer(picture(SIZES[0]), "What is it?").token_ids[0]

    wanted = first_token(settings)
    rewrite(model / "generation_config.json", suppress_tokens=[wanted])
    assert first_token(settings) != wanted
    assert first_token(replace(settings, ignored=("suppress_tokens",))) == wanted


def test_a_repetition_penalty_applies_to_stock(tiny_paths: dict[str, Path], source: Path) -> None:
    """Near ties are those of penalised logits."""
    changes = {"model__dtype": "bfloat16", "generation__repetition_penalty": 1.5}
    found = checked(tiny_paths["llama3"], source, **changes)
    assert found.passed, parity_lines(found)


# What is wrong is found, whatever part of ours it is in


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
    freeze = LlavaNext.freeze

    def frozen(adapter: Any) -> None:
        adapter._projector.linear_2.weight.data[3] *= 1.2
        freeze(adapter)

    patch.setattr(LlavaNext, "freeze", frozen)


def prompt_positions(patch: pytest.MonkeyPatch) -> None:
    embed = LlavaNext.embed

    def embedded(*inputs: Any) -> Any:
        prompt = embed(*inputs)
        positions = torch.arange(len(prompt))
        positions[prompt.visual[-1][1] :] += 1
        return replace(prompt, positions=positions)

    patch.setattr(LlavaNext, "embed", embedded)


def answer_positions(patch: pytest.MonkeyPatch) -> None:
    next_position = native._next_position
    patch.setattr(native, "_next_position", lambda prompt: next_position(prompt) + 1)


def pixels(patch: pytest.MonkeyPatch) -> None:
    table = llava_next.pixel_table
    patch.setattr(llava_next, "pixel_table", lambda anyres: table(anyres) + 0.02)


def no_newlines(patch: pytest.MonkeyPatch) -> None:
    pack = LlavaNext.pack

    def packed(*inputs: Any) -> Any:
        parts = pack(*inputs)
        parts[0][-1] = 0
        return parts

    patch.setattr(LlavaNext, "pack", packed)


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


# What the files of other years lack, and where they keep what


@pytest.mark.parametrize("file", ["processor_config.json", "chat_template.json", "jinja"])
def test_processors_of_2024_pass(
    tiny_paths: dict[str, Path], source: Path, tmp_path: Path, file: str
) -> None:
    """Without the three numbers that transformers needs today, the template in any of its files."""
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    jinja = model / "chat_template.jinja"
    lacks = dict.fromkeys(
        ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    )
    rewrite(model / "processor_config.json", **lacks)
    if file == "processor_config.json":
        rewrite(model / file, chat_template=jinja.read_text())
    elif file == "chat_template.json":
        (model / file).write_text(json.dumps({"chat_template": jinja.read_text()}))
    if file != "jinja":
        jinja.unlink()
    found = checked(model, source)
    assert found.passed, parity_lines(found)


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("file", ["processor_config.json", "chat_template.json"])
def test_stock_takes_the_default_of_named_templates(
    tiny_paths: dict[str, Path], tmp_path: Path, file: str, kind: str
) -> None:
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    named = {"tool_use": "no", "default": (model / "chat_template.jinja").read_text()}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    (model / "chat_template.jinja").unlink()
    (model / file).touch()
    held = json.loads((model / file).read_text() or "{}")
    held["chat_template"] = named if kind == "dict" else listed
    (model / file).write_text(json.dumps(held))
    assert _chat_template(model) == named["default"]


@pytest.mark.parametrize(
    "names", [(), ("text",), ("text", "top"), ("top",), ("file", "text")], ids=str
)
def test_end_tokens_are_those_written_in_the_files(
    tiny_paths: dict[str, Path], source: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Not where a class of transformers would, as Llama's has 2."""
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    generation, config = model / "generation_config.json", model / "config.json"
    ends: dict[str, Any] = {"file": [3, 4], "text": 5, "top": 6}
    wanted = {"file": {3, 4}, "text": {5}, "top": {6}}[names[0]] if names else {1}
    rewrite(generation, eos_token_id=ends["file"] if "file" in names else [])
    text = json.loads(config.read_text())["text_config"] | {"eos_token_id": ends["text"]}
    if "text" not in names:
        del text["eos_token_id"]
    rewrite(config, text_config=text, eos_token_id=ends["top"] if "top" in names else None)
    with StockModel(model, StockSettings("float32", "cpu", max_new_tokens=4)) as stock:
        assert {*stock.end_tokens} == {*check_directory(model).ends} == wanted
    if not names:
        found = checked(model, source)
        assert found.passed, parity_lines(found)


# What cannot be compared is reported


def test_rows_that_cannot_be_answered_are_left_out(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    prompts = ("What is it?", None, "Is </s> an end, or <image> an image?", "What else?")
    found = checked(tiny_paths["vicuna"], write_rows(tmp_path / "rows.parquet", prompts))
    assert found.passed, parity_lines(found)
    assert (found.prompts, found.stock.prompts) == (3, 2)
    assert [line.split(": ", 1)[1] for line in sorted(found.left_out)] == [
        "prompt column 'prompt' is null",
        "its text spells out </s>",
    ]


def test_a_check_without_prompts_fails(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    found = checked(tiny_paths["vicuna"], write_rows(tmp_path / "rows.parquet", (None, " ")))
    assert (found.prompts, found.passed) == (0, False)


def test_stock_that_cannot_run_is_reported_in_one_line(
    tiny_paths: dict[str, Path], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: Any) -> None:
        raise RuntimeError("stock is out of order\nsecond line")

    monkeypatch.setattr(StockModel, "_inputs", cannot)
    job = make_job(tiny_paths["vicuna"], source, compression__retention=0.5)
    file = tmp_path / "job.yaml"
    file.write_text(job.to_yaml())
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.exit_code == 1, result.output
    assert "stock transformers cannot run the model: RuntimeError: stock is out of" in result.stdout
    assert "3 of 3 answers the same" in result.stdout
    assert result.stdout.endswith("failed\n")


@pytest.mark.parametrize("place", ["shard", "image"])
def test_an_unreadable_input_is_reported_in_one_line(
    tiny_paths: dict[str, Path],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    damaged = tmp_path / "damaged.parquet"
    data = bytearray(source.read_bytes())
    if place == "shard":
        data[4:50] = bytes(46)  # the footer is whole, the first page is not
    else:

        def no_answer(*_: Any) -> None:
            raise ShardError("the storage of the image does not answer")

        monkeypatch.setattr(parity, "read_bytes", no_answer)
    damaged.write_bytes(data)
    file = tmp_path / "job.yaml"
    file.write_text(make_job(tiny_paths["vicuna"], damaged).to_yaml())
    result = CliRunner().invoke(app, ["check", str(file)])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("configuration: recipe.input: ")
    assert ("damaged.parquet" if place == "shard" else "storage of the image") in line


def test_a_model_that_cannot_be_used_is_a_bad_configuration(
    tiny_paths: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError):
        checked(model, source)


def test_stock_is_loaded_silently(
    tiny_paths: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model that is not whole ours says it in a line."""
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["image_newline"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    logged: list[str] = []
    heard = logging.Handler()
    monkeypatch.setattr(heard, "emit", lambda record: logged.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "handlers", [heard])
    enable_progress_bar()  # another test may have put it out
    with StockModel(model, StockSettings("float32", "cpu", max_new_tokens=4)):
        assert is_progress_bar_enabled(), "as it was"
    message = capfd.readouterr()
    assert "LOAD REPORT" not in message.err + message.out + "".join(logged)
    assert "Loading weights" not in message.err + message.out


# How near is near


def test_a_non_finite_logit_is_infinitely_far() -> None:
    logits = torch.randn(4, 9)
    assert largest_difference(logits, logits)[0] == 0
    for value in (torch.nan, torch.inf):
        wrong = logits.clone()
        wrong[2, 5] = value
        for pair in ((wrong, logits), (logits, wrong), (wrong, wrong)):
            assert largest_difference(*pair) == (torch.inf, 2)
    found = StockCheck(prompts=1, same_prompts=1, same_answers=1)
    assert found.passed("float32")
    assert not replace(found, difference=float("nan")).passed("float32")


@pytest.mark.parametrize(
    ("dtype", "gap", "ties"),
    [("bfloat16", 0.25, 1), ("bfloat16", 0.26, 0), ("float16", 0.03, 1),
     ("float16", 0.04, 0), ("float32", 0.0, 0)],
)  # fmt: skip
def test_a_near_tie_is_two_steps(dtype: str, gap: float, ties: int) -> None:
    """Between 16 and 32 a step of bfloat16 is 1/8, of float16 1/64."""
    logits = torch.full((3, 5), 1.0)
    logits[2, 3], logits[2, 4] = 20, 20 - gap
    stock = StockAnswer((1, 2), (0, 3), "length", "", logits)
    job = make_job("model", model__dtype=dtype)
    ours: Any = parity._Comparison(job, None, parity._StockAnswers())  # type: ignore[arg-type]
    assert ours._nearly_tie(stock, (0, 4), 1) == ties
    assert not ours._nearly_tie(stock, (0,), 1), "an answer that is too short is no tie"


@pytest.mark.parametrize(("gap", "ties"), [(0.25, 1), (0.26, 0)])
def test_a_near_tie_of_a_batch_uses_our_logits_only(
    monkeypatch: pytest.MonkeyPatch, gap: float, ties: int
) -> None:
    read: list[Any] = []

    class Said:
        def __init__(self, model: Any) -> None: ...

        def logits(self, prompt: Any, tokens: Any) -> torch.Tensor:
            read.append(tokens)
            return torch.tensor([[0.0, 0, 0, 0, 0], [1, 1, 1, 20, 20 - gap]])

    class Reader:
        def __init__(self, *_: Any) -> None: ...

        def prompts(self, requests: list[Request]) -> list[Any]:
            return [Prompt(torch.zeros(2, 1), token_ids=(1, 2))]

    monkeypatch.setattr(parity, "ForcedDecoder", Said)
    monkeypatch.setattr(parity, "Engine", Reader)
    loaded: Any = SimpleNamespace(model=None)
    ours = parity._Comparison(
        make_job("model", model__dtype="bfloat16"), loaded, parity._StockAnswers()
    )
    pairs = [parity._Pair(request(), (0, 3, 1), alone) for alone in ((0, 4, 2), (0, 3, 1))]
    assert ours.compare_batches(pairs) == ties
    assert (read, len(ours.failed)) == ([(0,)], 1 - ties)


def test_forced_tokens_give_the_logits_of_a_forward_pass(
    tiny_paths: dict[str, Path], source: Path
) -> None:
    """Along its own answer a model's logits are those that it drew from."""
    job = make_job(tiny_paths["mistral"], source)
    loaded = load_recipe_model(job.recipe, job.cluster)
    table = loaded.model.get_input_embeddings()
    with torch.inference_mode():
        prompt = native.Prompt(table(torch.arange(10, 30)))
    logits = ForcedDecoder(loaded.model).logits(prompt, [50, 51, 52])
    ids = torch.tensor([[*range(10, 30), 50, 51, 52]])
    with torch.inference_mode():
        wanted = loaded.model(input_ids=ids).logits[0, 19:]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
