"""`gc2ray check`: it passes on whatever is right, and reports what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gc2ray.cli.app import app
from gc2ray.core.errors import ConfigError, ShardError
from gc2ray.core.records import Request
from gc2ray.engine.parity import check as parity
from gc2ray.models.base import Prompt
from gc2ray.models.checkpoint.consistency import check_directory
from gc2ray.models.hf_reference import StockAnswer, StockModel, StockSettings
from gc2ray.reporting.terminal_tables import parity_lines
from tests.support.model_files import copy_of, rewrite
from tests.support.parity import checked, write_rows
from tests.support.rows import make_job, request
from tests.support.tiny_models import SPECS

HALVES = [("llama3", "bfloat16"), ("mistral", "bfloat16"), ("vicuna", "float16")]


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


def test_a_repetition_penalty_applies_to_stock(tiny_paths: dict[str, Path], source: Path) -> None:
    """Near ties are those of penalised logits."""
    changes = {"model__dtype": "bfloat16", "generation__repetition_penalty": 1.5}
    found = checked(tiny_paths["llama3"], source, **changes)
    assert found.passed, parity_lines(found)


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


# How near is near


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
