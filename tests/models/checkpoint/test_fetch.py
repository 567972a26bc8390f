"""Models of directories, URLs and the hub: found, checked before they are used, told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock, Timeout
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.config.recipe import ModelConfig
from gc2ray.core.errors import ConfigError
from gc2ray.models.checkpoint import fetch as fetch_module
from gc2ray.models.checkpoint.fetch import FetchedModel, check_model, fetch_model, model_digest
from tests.support.fetching import UNWANTED, WANTED, fetch, files_in
from tests.support.model_files import copy_of


def test_a_directory_is_used_where_it_is(source: Path, cache: Path) -> None:
    assert fetch(source) == FetchedModel(source, model_digest(source))
    assert not cache.exists()


def test_a_model_is_checked_without_fetching_its_weights(
    tiny_paths: dict[str, Path], cache: Path
) -> None:
    check_model(ModelConfig(path="some/model"))
    check_model(ModelConfig(path=str(tiny_paths["vicuna"])))
    assert not cache.exists()
    check_model(ModelConfig(path=tiny_paths["vicuna"].as_uri()))
    assert "config.json" in {Path(name).name for name in files_in(cache)}
    assert not [name for name in files_in(cache) if name.endswith(".safetensors")]


def contradicting(model: Path) -> Path:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"image_token_index": 7}))
    return model


@pytest.mark.parametrize("mode", ["directory", "URL"])
def test_a_model_that_contradicts_itself_is_refused_when_checked(
    tiny_paths: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    model = contradicting(copy_of(tiny_paths["vicuna"], tmp_path / "copy"))
    path = {"directory": str(model), "URL": model.as_uri()}[mode]
    with pytest.raises(ConfigError, match=rf"path: {path}: the image token is 7 in .*, and 3 in"):
        check_model(ModelConfig(path=path))


def test_a_url_without_safetensors_is_refused_when_checked(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    model = copy_of(tiny_paths["vicuna"], tmp_path / "copy")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=rf"{model.as_uri()} has no weights in safetensors"):
        check_model(ModelConfig(path=model.as_uri()))


def test_a_recipe_takes_over_rules_when_a_model_is_checked(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    model = copy_of(tiny_paths["vicuna"], tmp_path / "copy")
    (model / "generation_config.json").write_text('{"min_length": 3}')
    with pytest.raises(ConfigError, match="min_length 3; name it"):
        check_model(ModelConfig(path=str(model)))
    taken_over = GenerationConfig(ignore_model_rules=("min_length",)).taken_over()
    check_model(ModelConfig(path=str(model)), taken_over)


def test_a_digest_does_not_depend_on_the_location(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    here = tiny_paths["vicuna"]
    copy = copy_of(here, tmp_path / "copy")
    (copy / "README.md").write_text("notes")
    assert model_digest(copy) == model_digest(here)
    assert model_digest(copy) == fetch(here).digest == fetch(here.as_uri()).digest
    assert model_digest(copy) != model_digest(tiny_paths["mistral"])


def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
    first, *rest = sorted(tensors)
    return {f"{first}x": tensors[first], **{name: tensors[name] for name in rest}}


def reshaped(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.reshape(1, *tensor.shape) for name, tensor in tensors.items()}


def trained(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor * 1.01 for name, tensor in tensors.items()}


@pytest.mark.parametrize("changed", [renamed, reshaped, trained])
def test_a_digest_covers_names_shapes_and_weights(
    changed: Callable[[dict[str, Any]], dict[str, Any]],
    tiny_paths: dict[str, Path],
    tmp_path: Path,
) -> None:
    copy = copy_of(tiny_paths["vicuna"], tmp_path / "copy")
    before = model_digest(copy)
    file = copy / "model.safetensors"
    save_file(changed(load_file(file)), file, {"format": "pt"})
    assert model_digest(copy) != before


SEEN = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/default.jinja",
    "model.safetensors.index.json",
]


def touched(model: Path, name: str) -> Path:
    (model / name).parent.mkdir(exist_ok=True)
    with (model / name).open("ab") as file:
        file.write(b" ")
    return model


@pytest.mark.parametrize("name", SEEN)
def test_a_digest_covers_every_small_file_that_changes_answers(
    tiny_paths: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """A byte of it, or that it is there; and it is among what a node is given."""
    model = copy_of(tiny_paths["vicuna"], tmp_path / "copy")
    before = model_digest(model)
    assert model_digest(touched(model, name)) != before
    assert fetch(model.as_uri()).digest == model_digest(model)
    (model / name).unlink()
    assert model_digest(model) != model_digest(touched(model, name))


@pytest.mark.parametrize(
    "name",
    ["README.md", "trainer_state.json", "training_args.bin", "runs/1/config.json", "LICENSE.txt",
     "tokenizer.json.bak", "optimizer.pt", ".cache/tokenizer.json"],
)  # fmt: skip
def test_a_digest_ignores_notes_and_logs(
    tiny_paths: dict[str, Path], tmp_path: Path, name: str
) -> None:
    model = copy_of(tiny_paths["vicuna"], tmp_path / "copy")
    (model / name).parent.mkdir(exist_ok=True, parents=True)
    before = model_digest(model)
    (model / name).write_text("{}")
    assert model_digest(model) == before == fetch(model.as_uri()).digest


def test_a_digest_does_not_read_all_weights(
    tiny_paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change in the middle is not seen: 14 GB would have to be read for it."""
    model = copy_of(tiny_paths["vicuna"], tmp_path / "copy")
    before = model_digest(model)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek((model / "model.safetensors").stat().st_size // 2)
        file.write(b"\x01\x02")
    assert model_digest(model) == before


def test_an_unknown_hub_id_offline_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        ConfigError, match=r"no directory somebody/no-model; .* at main, it is not in .*HF_HUB"
    ) as caught:
        fetch("somebody/no-model")
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_paths: dict[str, Path]) -> Path:
    """A hub's cache with one model at one commit, as an earlier download leaves it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--some--model"
    shutil.copytree(tiny_paths["vicuna"], model / "snapshots" / ("c" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("c" * 40)
    return model


@pytest.mark.parametrize(
    ("revision", "offline", "is_looked_at"),
    [(None, "1", True), ("c" * 40, "1", True), ("c" * 40, "", True), (None, "", False)],
)
def test_a_hub_id_is_checked_in_the_hubs_cache_unless_the_hub_may_have_another(
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
    revision: str | None,
    offline: str,
    is_looked_at: object,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: bool(offline))
    model = ModelConfig(path="some/model", revision=revision)
    check_model(model)
    snapshot = contradicting(hub / "snapshots" / ("c" * 40))
    if is_looked_at:
        with pytest.raises(ConfigError, match="path: some/model: the image token is 7 in config"):
            check_model(model)
    else:
        check_model(model)
    (snapshot / "chat_template.jinja").unlink()  # a part of it, that another program fetched
    check_model(model)


def test_a_hub_id_is_found_in_the_hubs_cache_offline(
    hub: Path, tiny_paths: dict[str, Path]
) -> None:
    found = fetch("some/model")
    assert found == FetchedModel(hub / "snapshots" / ("c" * 40), model_digest(tiny_paths["vicuna"]))


def test_from_the_hub_only_what_loading_reads_is_fetched_under_a_lock(
    hub: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot_download(**call: Any) -> Any:
        with pytest.raises(Timeout):
            FileLock(cache / "models--some--model.lock").acquire(timeout=0)
        calls.append(call)
        return [] if call.get("dry_run") else str(hub / "snapshots" / ("c" * 40))

    monkeypatch.setattr(fetch_module, "snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    fetch_model(ModelConfig(path="some/model", revision="v1"), jitter_seconds=0)
    assert [call.pop("dry_run", False) for call in calls] == [True, False]
    assert calls[0] == calls[1]
    assert (calls[0]["repo_id"], calls[0]["revision"]) == ("some/model", "v1")
    files = [*WANTED, *UNWANTED]
    patterns = {key: calls[0][key] for key in ("allow_patterns", "ignore_patterns")}
    assert set(filter_repo_objects(files, **patterns)) == WANTED


@pytest.mark.parametrize(
    ("status", "expected"), [(404, ConfigError), (403, ConfigError), (503, OSError)]
)
def test_a_refusing_hub_is_a_config_error_and_a_failing_one_is_not(
    status: int, expected: type[Exception], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = SimpleNamespace(status_code=status, headers={}, request=None)

    def fail(**_: object) -> None:
        raise HfHubHTTPError("first\nsecond", response=response)

    monkeypatch.setattr(fetch_module, "snapshot_download", fail)
    with pytest.raises(expected, match="first") as caught:
        fetch("some/model")
    assert expected is OSError or "second" not in str(caught.value)


def test_a_hub_model_that_does_not_fit_is_not_fetched(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [SimpleNamespace(file_size=n, will_download=n < 2e18) for n in (10**18, 9 * 10**18)]

    def snapshot_download(**call: Any) -> Any:
        assert call["dry_run"]
        return files

    monkeypatch.setattr(fetch_module, "snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match=r"needs 1000000000\.000 GB.*set HF_HOME"):
        fetch("some/model")


def test_a_name_that_no_hub_takes_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^recipe\.model\.path: a/b/c/d cannot be read"
    ) as caught:
        fetch("a/b/c/d")
    assert "\n" not in str(caught.value)
