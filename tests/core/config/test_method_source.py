"""Methods that gc2ray does not bring: found without running them, allowed, and held to a digest."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.config.job import Job, parse_job
from gc2ray.core.config.method_source import find_method
from gc2ray.core.config.recipe import parse_recipe, recipe_difference
from gc2ray.core.errors import ConfigError
from tests.support.methods import install_method, write_method
from tests.support.rows import job_data

METHOD = "own_method:Own"
EXPLOSIVE = "raise RuntimeError('this code was run')\n"


def job_of(method: str = METHOD, **settings: object) -> Job:
    data = job_data("model", "rows.parquet", "out")
    data["recipe"]["compression"] = {"method": method, **settings}
    return parse_job(data)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on the Python path that must not be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "own_method.py"
    path.write_text(EXPLOSIVE)
    return path


@pytest.mark.parametrize("allow", [{}, {"allow_code": False}])
def test_code_is_not_run_where_it_is_not_allowed(own: Path, allow: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        job_of(**allow)
    assert str(caught.value) == (
        "recipe.compression.method: this is Python code that is not part of gc2ray; "
        "if you trust it, set recipe.compression.allow_code: true; got 'own_method:Own'"
    )


@pytest.mark.parametrize("value", ["yes", 1, "true"])
def test_allow_code_must_be_a_boolean(own: Path, value: object) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.compression\.allow_code: .*valid boolean"):
        job_of(allow_code=value)


def test_reading_a_recipe_runs_nothing(own: Path) -> None:
    compression = job_of(allow_code=True).recipe.compression
    assert compression.source_sha256 == hashlib.sha256(own.read_bytes()).hexdigest()
    assert compression.kind.takes_retention
    assert compression.keeps_everything is False
    assert "own_method" not in sys.modules


def test_packages_above_a_method_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "own_package" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text(EXPLOSIVE)
    (package / "methods.py").write_text(EXPLOSIVE)
    source = find_method("own_package.inner.methods:Own")
    assert source.file == package / "methods.py"
    assert source.root == find_method("own_package.inner:Own").root == package.parent
    assert "own_package" not in sys.modules


def test_a_method_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_here.py").write_text(EXPLOSIVE)
    with pytest.raises(ConfigError, match="no module 'own_here' with a source file on the Python"):
        job_of("own_here:Own", allow_code=True)
    monkeypatch.chdir(tmp_path)
    source = job_of("own_here:Own", allow_code=True).recipe.compression.source()
    assert source is not None
    assert source.root == source.file == tmp_path / "own_here.py"


@pytest.mark.parametrize("method", ["os.path:", ":Own", "own method:Own", "a..b:Own", "a:b:c"])
def test_an_invalid_method_path_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=r"is not written package\.module:Class"):
        job_of(method, allow_code=True)


@pytest.mark.parametrize("method", ["sys:Own", "nowhere:Own", "own_method.inner:Own"])
def test_a_module_without_a_source(own: Path, method: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.compression\.method: no module '"):
        job_of(method, allow_code=True)


def test_a_method_of_gc2ray_has_no_source(own: Path) -> None:
    assert job_of("local").recipe.compression.source() is None
    with pytest.raises(ConfigError, match=r"recipe\.compression\.source_sha256: 'local' is a"):
        job_of("local", source_sha256="0" * 64)


# --- the digest ---------------------------------------------------------------------------------


def test_another_source_is_another_recipe(own: Path) -> None:
    before = job_of(allow_code=True).recipe
    own.write_text(EXPLOSIVE + "# changed\n")
    after = job_of(allow_code=True).recipe
    assert before.fingerprint() != after.fingerprint()
    (line,) = recipe_difference(before, after)
    assert line.startswith("recipe.compression.source_sha256: '")


def test_recipes_without_such_a_method_keep_their_fingerprint() -> None:
    """Runs that were begun before there were any are resumed."""
    assert job_of("local").recipe.model_dump_json(exclude_defaults=True).count("sha256") == 0


def test_a_source_that_changed_since_the_recipe_was_read_is_refused(own: Path) -> None:
    compression = job_of(allow_code=True).recipe.compression
    assert compression.source() is not None
    own.write_text(EXPLOSIVE + "# changed\n")
    with pytest.raises(ConfigError, match=r"recipe\.compression\.source_sha256: the source of own"):
        compression.source()


def test_a_stored_recipe_is_read_where_its_method_is_not(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report needs none of the code."""
    install_method(tmp_path, "own-entry", METHOD)
    for recipe in (job_of(allow_code=True).recipe, job_of("own-entry").recipe):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
            assert parse_recipe(recipe.model_dump(mode="json")) == recipe
            with pytest.raises(ConfigError, match=r"recipe\.compression\.method: no "):
                recipe.compression.source()


# --- entry points -------------------------------------------------------------------------------


def test_an_installed_method_is_named_by_its_entry_point(own: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.compression\.method: unknown 'own-entry'"):
        job_of("own-entry")
    install_method(tmp_path, "own-entry", METHOD)
    compression = job_of("own-entry").recipe.compression
    assert compression.source_sha256 == hashlib.sha256(EXPLOSIVE.encode()).hexdigest()
    with pytest.raises(ConfigError, match="did you mean 'own-entry'"):
        job_of("own-entri")


def test_an_entry_point_to_nowhere(own: Path, tmp_path: Path) -> None:
    install_method(tmp_path, "own-entry", "nowhere:Own")
    with pytest.raises(ConfigError, match="no module 'nowhere'"):
        job_of("own-entry")


# --- without torch ------------------------------------------------------------------------------


def test_a_recipe_with_a_custom_method_is_read_without_torch(tmp_path: Path) -> None:
    write_method(tmp_path, "own_method")
    script = (
        "import sys; from gc2ray.core.config.compression import CompressionConfig; "
        f"CompressionConfig(method='{METHOD}', allow_code=True).source(); "
        "print(sorted({'torch', 'own_method'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_config_can_be_copied(own: Path) -> None:
    """As audits and tunings do."""
    config = CompressionConfig(method=METHOD, allow_code=True, retention=0.1)
    assert config.model_copy(update={"retention": 0.5}).source_sha256 == config.source_sha256
