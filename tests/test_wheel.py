"""What users install: the wheel, its metadata, and the demo from it outside the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pyarrow.parquet as pq
import pytest

from gc2ray import __version__
from gc2ray.core.config.job import load_job
from gc2ray.demo.demo import JOB_NAME, MARKER
from gc2ray.demo.spec import SMOLVLM_MODEL
from tests.test_imports import PACKAGE, imports, modules

ROOT = PACKAGE.parent
SOURCES = ("gc2ray", "pyproject.toml", "setup.py", "README.md", "LICENSE")
BROUGHT = {"botocore": "s3fs", "tokenizers": "transformers", "pydantic_core": "pydantic"}
"""Libraries that come with another, of the same release."""
OTHER_NAMES = {"PIL": "pillow", "pynvml": "nvidia-ml-py", "pythonjsonlogger": "python-json-logger"}
OTHER_NAMES |= {"yaml": "pyyaml"}
USED_BY_OTHERS = {"safetensors"}
"""Pinned for how transformers uses them; gc2ray imports them nowhere."""


def python(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def package_files() -> set[str]:
    """Files of the repository that users need, but for what a build compiles."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.suffix != ".so"
        and SMOLVLM_MODEL not in path.parents  # `gc2ray demo` does not need it
    }


def test_every_imported_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[>=\[]", line)[0] for line in project["dependencies"]}
    assert declared.isdisjoint(
        re.split(r"[>=\[]", line)[0] for line in project["optional-dependencies"]["demo"]
    )
    ours = {*sys.stdlib_module_names, "gc2ray"}
    used = {name.split(".")[0] for path in modules() for name in imports(path)} - ours
    packages = {OTHER_NAMES.get(name, BROUGHT.get(name, name)) for name in used}
    assert packages | USED_BY_OTHERS == declared


def test_every_folder_of_modules_is_a_package() -> None:
    """Others do not come into the wheel."""
    for path in modules():
        assert (path.parent / "__init__.py").is_file(), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because building writes into the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    unbuilt = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=unbuilt)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    python("pip", "wheel", *options, folder / "source", timeout=400)
    (built,) = folder.glob("gc2ray-*.whl")
    return built


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_the_wheel_holds_the_package_and_its_metadata(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = f"gc2ray-{__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{about}/METADATA").decode())
        commands = archive.read(f"{about}/entry_points.txt").decode()
    compiled = {name for name in names if name.endswith(".so")}
    assert {name for name in names if not name.startswith(about)} - compiled == package_files()
    assert f"{about}/licenses/LICENSE" in names
    assert "gc2ray = gc2ray.__main__:main" in commands
    assert metadata["Version"] == __version__
    assert metadata["Author"] == "gc2ray developers"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Provides-Extra") == ["demo"]
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_gives_right_answers_where_an_earlier_one_was(wheel: Path, tmp_path: Path) -> None:
    """From the wheel, in a directory that is not the repository's."""
    site = tmp_path / "site"
    python("pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    root = tmp_path / "demo-output"
    left = root / "run" / "left"
    left.mkdir(parents=True)
    (root / MARKER).touch()
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "120"}
    printed = python("gc2ray", "demo", cwd=tmp_path, env=environment, timeout=500).stdout
    assert "1 bad_image" in printed
    assert "Which" in printed
    found = re.search(r"same answer compressed and uncompressed: (0\.\d+)", printed)
    assert found
    assert float(found[1]) > 0.8
    table = {
        name: (float(accuracy), int(tokens))
        for name, accuracy, tokens in re.findall(
            r"│ (compressed|uncompressed) +│ ([01]\.\d+) \[.*?\] +│ (\d+) +│", printed
        )
    }
    assert table["uncompressed"][0] > 0.88
    assert table["compressed"][0] > 0.78
    assert table["compressed"][1] < 0.15 * table["uncompressed"][1]
    rows = pq.read_table(root / "run" / "data").to_pylist()
    grids = {len(row["kept_per_view"][0]) for row in rows if row["status"] == "ok"}
    assert grids == {3, 4, 5}, "crop grids of two, three and four"
    assert [row["id"] for row in rows if row["status"] != "ok"] == ["broken"]
    assert not left.exists(), "a demo starts afresh"
    assert (root / MARKER).exists(), "and a second one would"
    assert load_job(root / JOB_NAME).recipe.compression.retention == 0.1
