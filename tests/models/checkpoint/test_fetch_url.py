"""Models behind URLs: fetched whole, and nothing but what loading reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import s3fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from gc2ray.core.config.job import Cluster
from gc2ray.core.config.recipe import ModelConfig
from gc2ray.core.errors import ConfigError
from gc2ray.data.retries import RetryPolicy
from gc2ray.models.checkpoint import fetch_url
from gc2ray.models.checkpoint.fetch import check_model, fetch_metadata
from tests.support.fetching import WANTED, fetch, files_in


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
