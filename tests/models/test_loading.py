"""A model is loaded whole or not at all, and any error is reported in one line."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from gc2ray.core.errors import BadRow, ConfigError
from gc2ray.engine.engine import load_recipe_model
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.families.llava_next import LlavaNext, LlavaNextVision
from gc2ray.models.processor import load_processor
from gc2ray.models.registry import family_of
from tests.support.commands import run_command
from tests.support.families import FAMILIES
from tests.support.rows import job_data, make_job, write_rows

Tensors = dict[str, torch.Tensor]
LAYER = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tiny_paths: dict[str, Path], tmp_path: Path) -> Path:
    """A whole one, to be broken."""
    return Path(shutil.copytree(tiny_paths["vicuna"], tmp_path / "model"))


def load(path: Path | str, device: str = "cpu") -> LoadedModel:
    return loading.load(str(path), revision=None, dtype="float32", device=device)


def rewritten(model: Path, change: Callable[[Tensors], Tensors]) -> Tensors:
    """Weights changed; what they were before."""
    file = model / "model.safetensors"
    before = load_file(file)
    save_file(change(dict(before)), file, {"format": "pt"})
    return before


def edit(model: Path, **changes: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "part",
    [
        LAYER,
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        "image_newline",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.encoder.layers.1.self_attn.q_proj.weight",
        "vision_tower.embeddings.class_embedding",
        "multi_modal_projector.",
        "language_model.model.layers.1.",
        "",
    ],
)
def test_a_model_with_missing_tensors_is_refused(model: Path, part: str) -> None:
    """One of each of its parts, one part, all: they would be random, others in every process."""
    before = rewritten(
        model,
        lambda found: {name: tensor for name, tensor in found.items() if not name.startswith(part)},
    )
    gone = [name for name in before if name.startswith(part)]
    with pytest.raises(
        ConfigError, match=f"lacks {len(gone)} of the model's {len(before)} "
    ) as caught:
        load(model)
    listed = str(caught.value).partition("random numbers: ")[2].partition(";")[0]
    named = listed.split(", ")
    assert len(named) == min(4, len(gone))
    assert all(any(name.endswith(key.split(".")[-1]) for key in gone) for name in named[:3])


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        ("", "base_model.model.", "base_model.model.image_newline"),
        ("", "module.", "module.image_newline"),
        ("language_model.model.", "llm.model.", "llm.model.embed_tokens.weight"),
        ("image_newline", "newline", "newline"),
    ],
)
def test_a_model_whose_tensors_have_other_names_is_refused(
    model: Path, old: str, new: str, first: str
) -> None:
    rewritten(
        model,
        lambda found: {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in found.items()
        },
    )
    with pytest.raises(ConfigError, match=rf"random .*; it has others instead .*: {first}"):
        load(model)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("vision_config", "num_hidden_layers", 2), ("text_config", "num_hidden_layers", 1)],
)
def test_a_config_with_fewer_layers_than_the_weights_is_refused(
    model: Path, part: str, key: str, value: int
) -> None:
    """Or the features would be another layer's, and the text another model's."""
    config = json.loads((model / "config.json").read_text())
    edit(model, **{part: config[part] | {key: value}})
    with pytest.raises(ConfigError, match=r"tensors of parts that its config\.json leaves out"):
        load(model)


def test_a_bias_that_the_config_leaves_out_is_refused(model: Path) -> None:
    bias = LAYER.replace("mlp.up_proj.weight", "self_attn.q_proj.bias")
    rewritten(model, lambda found: {**found, bias: torch.ones(48)})
    with pytest.raises(ConfigError, match=r"has 1 tensors of parts .*q_proj\.bias"):
        load(model)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("language_model.model.", "model.language_model."),
        ("image_newline", "model.image_newline"),
        ("vision_tower.", "vision_tower.vision_model."),
    ],
)
def test_a_tensor_under_two_names_is_refused(model: Path, old: str, new: str) -> None:
    def twice(found: Tensors) -> Tensors:
        name = next(name for name in found if name.startswith(old))
        return {**found, name.replace(old, new, 1): torch.zeros_like(found[name])}

    rewritten(model, twice)
    with pytest.raises(ConfigError, match="has a tensor twice, as "):
        load(model)


def test_a_token_beyond_the_table_fails_its_row_alone(model: Path) -> None:
    loaded = load(model)
    rows = loaded.model.get_input_embeddings().num_embeddings
    with pytest.raises(BadRow, match=f"the prompt has token {rows}, .* text table {rows} rows"):
        loaded.adapter.embed([1, rows], [])


def test_a_model_with_tensors_of_other_sizes_is_refused(model: Path) -> None:
    rewritten(model, lambda found: {**found, LAYER: found[LAYER][:-1].clone()})
    with pytest.raises(
        ConfigError,
        match=r"has 1 tensors of other sizes .*up_proj\.weight has \(95, 48\), not \(96",
    ):
        load(model)


def test_nothing_is_moved_to_a_device_before_it_is_known_to_be_whole(model: Path) -> None:
    rewritten(model, lambda found: {name: found[name] for name in found if name != LAYER})
    with pytest.raises(ConfigError, match="lacks 1 "):
        load(model, device="no such device")


def without_head(found: Tensors) -> Tensors:
    return {name: found[name] for name in found if "lm_head" not in name}


@pytest.mark.parametrize("top", [{}, {"tie_word_embeddings": False}])
def test_a_head_that_only_the_text_config_ties_is_tied(model: Path, top: dict[str, object]) -> None:
    """As small tied language models were saved: transformers 5 looks at the top level alone."""
    rewritten(model, without_head)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    del config["tie_word_embeddings"]
    (model / "config.json").write_text(json.dumps(config | top))
    loaded = load(model).model
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert loaded.config.tie_word_embeddings


def test_a_head_of_its_own_is_kept_whatever_the_config_says(model: Path) -> None:
    edit(model, tie_word_embeddings=True)
    loaded = load(model)
    assert loaded.model.lm_head.weight is not loaded.model.get_input_embeddings().weight
    assert not loaded.model.config.tie_word_embeddings
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert loaded.adapter.shape.parameters == parameters


def test_unused_tensors_are_reported_but_not_old_buffers(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    buffers = {
        "vision_tower.embeddings.position_ids": torch.arange(37)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(6),
        "language_model.model.layers.0.self_attn.masked_bias": torch.rand(1),
    }
    rewritten(model, lambda found: found | buffers)
    with caplog.at_level(logging.WARNING, "gc2ray"):
        load(model)
        assert caplog.messages == []
        rewritten(model, lambda found: found | {"language_model.adapter": torch.rand(1)})
        load(model)
    (message,) = caplog.messages
    assert "has 1 tensors that the model does not use: " in message
    assert message.endswith("adapter")


def test_transformers_table_of_missing_tensors_is_not_printed(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rewritten(model, lambda found: {name: found[name] for name in found if name != LAYER})
    with pytest.raises(ConfigError):
        load(model)
    assert caplog.messages == []
    loading.AutoModelForImageTextToText.from_pretrained(model)
    assert "LOAD REPORT" in caplog.text  # ours alone are without


@pytest.mark.parametrize("hidden_size", ["x", -1])
def test_a_config_that_transformers_refuses_is_reported_with_its_reason(
    model: Path, hidden_size: object
) -> None:
    config = json.loads((model / "config.json").read_text())
    edit(model, text_config=config["text_config"] | {"hidden_size": hidden_size})
    for look in (load, lambda path: loading.load_metadata(str(path), dtype="float32")):
        with pytest.raises(ConfigError, match=f"{model} cannot be loaded: .*: ") as caught:
            look(model)
        assert "\n" not in str(caught.value)
        assert not str(caught.value).endswith(":")


RAISED = [
    ImportError("no module"),
    RuntimeError("first:\nsecond\nthird"),
    ZeroDivisionError(),
    TypeError("x" * 10_000),
    KeyError("name"),
]


@pytest.mark.parametrize("where", ["config", "processor", "weights", "family", "freeze"])
@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_any_loading_error_is_one_line_that_names_the_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    fail_at(monkeypatch, where, error)
    with pytest.raises(ConfigError) as caught:
        load(model)
    message = str(caught.value)
    assert message.startswith(f"recipe.model.path: {model} cannot be loaded: ")
    assert len(message) < 400 + len(str(model))
    assert "\n" not in message
    assert type(error).__name__ in message or "no module" in message
    assert "second third" in message or not isinstance(error, RuntimeError)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("where", ["weights", "freeze"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_machine_are_not_blamed_on_the_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    fail_at(monkeypatch, where, error)
    with pytest.raises(type(error)) as caught:
        load(model)
    assert caught.value is error


def fail_at(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise error

    owner, name = {
        "config": (loading.AutoConfig, "from_pretrained"),
        "processor": (loading, "load_processor"),
        "weights": (loading.AutoModelForImageTextToText, "from_pretrained"),
        "family": (LlavaNext, "__init__"),
        "freeze": (LlavaNextVision, "freeze"),
    }[where]
    monkeypatch.setattr(owner, name, fail)


def test_the_recipe_takes_rules_over_wherever_its_model_is_loaded(
    model: Path, tmp_path: Path
) -> None:
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"min_length": 3}))
    kept, taken_over = (
        make_job(model, generation__ignore_model_rules=rules) for rules in ([], ["min_length"])
    )
    with pytest.raises(ConfigError, match="min_length 3"):
        load_recipe_model(kept.recipe, kept.cluster)
    assert load_recipe_model(taken_over.recipe, taken_over.cluster).end_tokens == (1,)
    source = write_rows(tmp_path / "rows.parquet", 4)
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(job_data(model, source, tmp_path / "out")))
    caught = run_command("estimate", job)
    assert (caught.exit_code, "min_length 3" in caught.stderr) == (2, True)
    ignored = "recipe.generation.ignore_model_rules=[min_length]"
    assert run_command("estimate", job, ignored).exit_code == 0


def test_a_hub_id_in_the_hubs_cache_is_held_to_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    there = tmp_path / "hub" / "models--some--model"
    (there / "refs").mkdir(parents=True)
    (there / "refs" / "main").write_text("c" * 40)
    snapshot = Path(shutil.copytree(model, there / "snapshots" / ("c" * 40)))
    assert load("some/model").end_tokens == (1,)
    edit(snapshot, image_token_index=7)
    with pytest.raises(ConfigError, match=r"image token is 7 in config\.json"):
        load("some/model")


def test_markers_without_an_embedding_are_refused(tmp_path: Path) -> None:
    """Their ids go to the text table unseen; on a GPU the device would be lost."""
    FAMILIES["smolvlm"].build(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    processor = load_processor(str(tmp_path), None)
    row = processor.tokenizer.convert_tokens_to_ids("<row_1_col_2>")
    model_config = AutoConfig.from_pretrained(tmp_path)
    assert row < config["text_config"]["vocab_size"]
    family_of(model_config, processor)
    model_config.text_config.vocab_size = row
    with pytest.raises(
        ConfigError, match=rf"views has token \d+, and the text table has {row} rows"
    ):
        family_of(model_config, processor)
