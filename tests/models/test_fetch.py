"""Models on a node's disk: fetched once, whole, nothing but what loading reads."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import s3fs
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.config.job import Cluster
from gc2ray.core.config.recipe import ModelConfig
from gc2ray.core.errors import ConfigError
from gc2ray.data.retries import RetryPolicy
from gc2ray.models.checkpoint import cache as cache_module
from gc2ray.models.checkpoint import fetch as fetch_module
from gc2ray.models.checkpoint import fetch_url
from gc2ray.models.checkpoint.fetch import (
    FetchedModel,
    check_model,
    fetch_metadata,
    fetch_model,
    model_digest,
)

SPAWN = multiprocessing.get_context("spawn")  # a fork would share open files, and torch's threads
WANTED = {
    "config.json",
    "model.safetensors",
    "tokenizer.model",
    "vocab.txt",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
}
UNWANTED = {"pytorch_model.bin", "optimizer.pt", "modeling.py", "README.md", "old/m.safetensors"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GC2RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory that looks like a model, and has things in it that nobody should fetch."""
    for name in WANTED | UNWANTED:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(3000))
    return tmp_path / "source"


def fetch(path: Path | str, **options: Any) -> FetchedModel:
    return fetch_model(ModelConfig(path=str(path)), jitter_seconds=0, **options)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _fetch_and_log(url: str, log: Path, hang_at: str | None = None) -> None:
    """In a process of its own: every file that is fetched leaves a line in the log."""
    copy_file = LocalFileSystem.get_file

    def get_file(self: Any, path: str, target: str, **options: Any) -> None:
        with log.open("a") as lines:
            lines.write(f"{Path(path).name}\n")
        if Path(path).name == hang_at:
            time.sleep(3600)
        time.sleep(0.2)
        copy_file(self, path, target, **options)

    LocalFileSystem.get_file = get_file
    print(fetch(url).directory, file=log.with_suffix(f".{os.getpid()}").open("w"))


def start(url: str, log: Path, hang_at: str | None = None) -> Any:
    process = SPAWN.Process(target=_fetch_and_log, args=(url, log, hang_at))
    process.start()
    return process


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def test_a_directory_is_used_where_it_is(source: Path, cache: Path) -> None:
    assert fetch(source) == FetchedModel(source, model_digest(source))
    assert not cache.exists()


def test_one_of_four_processes_fetches(source: Path, cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start(source.as_uri(), log) for _ in range(4)]
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(log.read_text().split()) == sorted(Path(name).name for name in WANTED)
    used = {log.with_suffix(f".{p.pid}").read_text().strip() for p in processes}
    assert used == {str(path) for path in cache.iterdir() if path.suffix != ".lock"}
    assert len(used) == 1


def test_a_fetch_that_was_killed_is_repeated(source: Path, cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(source.as_uri(), log, hang_at="model.safetensors")
    wait_until(lambda: log.exists() and len(log.read_text().split()) == len(WANTED))
    wait_until(lambda: bool(list(cache.glob("*.partial/config.json"))))
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    (leftover,) = cache.glob("*.partial")
    (leftover / "more.json").touch()
    directory = fetch(source.as_uri()).directory
    assert files_in(directory) == WANTED
    assert not leftover.exists()


def test_only_what_loading_reads_is_fetched(source: Path) -> None:
    directory = fetch(source.as_uri()).directory
    assert files_in(directory) == WANTED
    assert all((directory / n).read_bytes() == (source / n).read_bytes() for n in WANTED)


def test_metadata_is_fetched_without_weights(source: Path) -> None:
    metadata = fetch_metadata(ModelConfig(path=source.as_uri()))
    model = fetch(source.as_uri()).directory
    assert files_in(metadata) == {n for n in files_in(model) if not n.endswith(".safetensors")}
    assert "config.json" in files_in(metadata) != files_in(model)
    assert fetch_metadata(ModelConfig(path=str(source))) == source


def test_a_trailing_slash_names_the_same_model(source: Path) -> None:
    assert fetch(f"{source.as_uri()}/") == fetch(source.as_uri())


def test_a_model_that_changed_is_another_one(source: Path) -> None:
    before = fetch(source.as_uri()).directory
    (source / "vocab.txt").write_bytes(b"words")
    after = fetch(source.as_uri()).directory
    assert after != before
    assert (after / "vocab.txt").read_bytes() == b"words"


@pytest.mark.parametrize(
    "path",
    [
        "/model/../evil.json",
        "/model/a/../../evil.json",
        "/model//evil.json",
        "/model/./x.json",
        "elsewhere/evil.json",
    ],
)
def test_a_file_name_outside_the_model_is_refused(
    path: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = {p: {"name": p, "size": 1, "type": "file"} for p in ("/model/config.json", path)}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: listing)
    with pytest.raises(ConfigError, match="is not below it"):
        fetch("memory://model")
    assert not cache.exists()


def test_a_full_disk_is_reported_before_anything_is_fetched(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 17_000))
    with pytest.raises(OSError, match=r"needs 0\.000 GB") as caught:
        fetch(source.as_uri())
    assert str(cache) in str(caught.value)
    assert "set GC2RAY_CACHE to a larger disk" in str(caught.value)
    assert [path.suffix for path in cache.iterdir()] in ([], [".lock"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 18_000))
    fetch(source.as_uri())


@pytest.mark.parametrize("look", [fetch, lambda url: check_model(ModelConfig(path=url))])
@pytest.mark.parametrize(
    "url", ["memory://nothing/here", "file:///nothing/here", "nofs://x", Path(__file__).as_uri()]
)
def test_a_url_without_a_model_is_refused_in_one_line(
    url: str, look: Callable[[str], object]
) -> None:
    with pytest.raises(ConfigError, match=rf"^recipe\.model\.path: .*{url}") as caught:
        look(url)
    assert "\n" not in str(caught.value)


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
    model = contradicting(tiny_copy(tiny_paths["vicuna"], tmp_path / "copy"))
    path = {"directory": str(model), "URL": model.as_uri()}[mode]
    with pytest.raises(ConfigError, match=rf"path: {path}: the image token is 7 in .*, and 3 in"):
        check_model(ModelConfig(path=path))


def test_a_url_without_safetensors_is_refused_when_checked(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny_copy(tiny_paths["vicuna"], tmp_path / "copy")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=rf"{model.as_uri()} has no weights in safetensors"):
        check_model(ModelConfig(path=model.as_uri()))


def test_a_recipe_takes_over_rules_when_a_model_is_checked(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny_copy(tiny_paths["vicuna"], tmp_path / "copy")
    (model / "generation_config.json").write_text('{"min_length": 3}')
    with pytest.raises(ConfigError, match="min_length 3; name it"):
        check_model(ModelConfig(path=str(model)))
    taken_over = GenerationConfig(ignore_model_rules=("min_length",)).taken_over()
    check_model(ModelConfig(path=str(model)), taken_over)


def test_a_model_on_s3_ticks_while_it_is_fetched(
    source: Path, request: pytest.FixtureRequest
) -> None:
    bucket = request.getfixturevalue("s3")
    s3fs.S3FileSystem().put(f"{source}/", f"{bucket}/m/", recursive=True)
    ticks: list[int] = []
    directory = fetch(f"{bucket}/m", tick=lambda: ticks.append(1)).directory
    assert files_in(directory) == WANTED
    assert all((directory / n).read_bytes() == (source / n).read_bytes() for n in WANTED)
    assert len(ticks) >= len(WANTED)
    with pytest.raises(ConfigError, match="bucket does not exist"):
        fetch(f"{bucket}x/m")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError("Access Denied"), ConfigError),
        (FileNotFoundError("bucket"), ConfigError),
        (ConnectionResetError("reset by peer"), TimeoutError),
    ],
)
def test_unreadable_files_are_config_errors_and_network_errors_are_not(
    source: Path, error: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(
        fetch_url, "RETRY_POLICY", RetryPolicy(total_seconds=0.2, first_seconds=0.01)
    )
    for method in ("find", "get_file"):
        with monkeypatch.context() as patch:
            patch.setattr(LocalFileSystem, method, fail)
            with pytest.raises(expected, match=str(error)):
                fetch(source.as_uri())


def test_temporary_errors_are_retried(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call fails the first time."""
    monkeypatch.setattr(
        fetch_url, "RETRY_POLICY", RetryPolicy(total_seconds=20.0, first_seconds=0.01)
    )
    failed: set[object] = set()
    for name in ("find", "get_file"):
        method = getattr(LocalFileSystem, name)

        def once(own: object, path: str, *rest: object, _call=method, _name=name, **named: object):
            if (_name, path) not in failed:
                failed.add((_name, path))
                raise ConnectionResetError("reset by peer")
            return _call(own, path, *rest, **named)

        monkeypatch.setattr(LocalFileSystem, name, once)
    assert files_in(fetch(source.as_uri()).directory) == WANTED
    assert len(failed) == len(WANTED) + 1


def test_a_truncated_file_is_not_a_model(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_file(_: object, path: str, target: str, **__: object) -> None:
        Path(target).write_bytes(Path(path).read_bytes()[:100])

    monkeypatch.setattr(LocalFileSystem, "get_file", get_file)
    with pytest.raises(OSError, match="only 100 of 3000 bytes"):
        fetch(source.as_uri())
    assert not [path for path in cache.iterdir() if path.suffix == ""]


def test_a_cache_that_cannot_be_written_is_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GC2RAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written: Not a directory.*GC2RAY_CACHE"):
        fetch(source.as_uri())


def test_fetching_starts_after_a_random_delay(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    own, sleep = threading.get_ident(), time.sleep

    def note(seconds: float) -> None:  # other tests' workers may sleep on threads of theirs
        if threading.get_ident() == own:
            slept.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", note)
    for _ in range(8):
        fetch_model(ModelConfig(path=source.as_uri()), jitter_seconds=5.0)
    assert len(slept) == len(set(slept)) == 8
    assert all(0 <= seconds <= 5 for seconds in slept)


def test_waiting_ticks_while_the_other_process_fetches(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "POLL_SECONDS", 0.05)
    directory = fetch(source.as_uri()).directory
    partial = directory.with_suffix(".partial")
    directory.rename(partial)
    ticks: list[int] = []
    with FileLock(directory.with_suffix(".lock")):
        waiter = threading.Thread(
            target=lambda: fetch(source.as_uri(), tick=lambda: ticks.append(1))
        )
        waiter.start()
        wait_until(lambda: len(ticks) == 1)  # what was there already
        time.sleep(0.5)
        assert len(ticks) == 1, "nothing moved meanwhile"
        (partial / "more.safetensors").write_bytes(b"x" * 100_000)
        wait_until(lambda: len(ticks) == 2)
        (partial / "more.safetensors").unlink()
        partial.rename(directory)
    waiter.join(60)
    assert files_in(directory) == WANTED


def tiny_copy(path: Path, target: Path) -> Path:
    shutil.copytree(path, target)
    return target


def test_a_digest_does_not_depend_on_the_location(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    here = tiny_paths["vicuna"]
    copy = tiny_copy(here, tmp_path / "copy")
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
    copy = tiny_copy(tiny_paths["vicuna"], tmp_path / "copy")
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
    model = tiny_copy(tiny_paths["vicuna"], tmp_path / "copy")
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
    model = tiny_copy(tiny_paths["vicuna"], tmp_path / "copy")
    (model / name).parent.mkdir(exist_ok=True, parents=True)
    before = model_digest(model)
    (model / name).write_text("{}")
    assert model_digest(model) == before == fetch(model.as_uri()).digest


def test_a_digest_does_not_read_all_weights(
    tiny_paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change in the middle is not seen: 14 GB would have to be read for it."""
    model = tiny_copy(tiny_paths["vicuna"], tmp_path / "copy")
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


def test_a_model_behind_a_url_answers_as_a_local_one(tiny_paths: dict[str, Path]) -> None:
    from gc2ray.engine.engine import load_engine
    from tests.support.rows import make_recipe, requests

    def answers(path: str) -> tuple[str, Sequence[tuple[int, ...]]]:
        recipe = make_recipe(path, model__dtype="float32", generation__max_new_tokens=5)
        engine = load_engine(recipe, Cluster())
        found = sorted(engine.stream(requests()), key=lambda answer: answer.request.row)
        return engine.model_digest, [answer.token_ids for answer in found]

    local, behind = answers(str(tiny_paths["vicuna"])), answers(tiny_paths["vicuna"].as_uri())
    assert local == behind
    assert all(local[1])
    assert len(local[0]) == 64


def test_a_url_without_a_model_is_refused_before_ray_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gc2ray.runner.run import ray_session, run_job
    from tests.support.rows import make_job, write_rows

    monkeypatch.setattr(ray_session, "connected", lambda _: pytest.fail("Ray was joined"))
    write_rows(tmp_path / "in" / "a.parquet", 2)
    job = make_job((tmp_path / "gone").as_uri(), tmp_path / "in", tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no model at file:"):
        run_job(job)
