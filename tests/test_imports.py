"""The wings keep their order: imports go down only, and libraries stay behind their borders."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gc2ray"

WINGS: dict[str, set[str]] = {
    "core": set(),
    "data": {"core"},
    "compression": {"core"},
    "models": {"core", "data", "compression"},
    "output": {"core", "data"},
    "engine": {"core", "data", "compression", "models"},
    "runner": {"core", "data", "models", "output", "engine"},
    "estimation": {"core", "data", "compression", "models", "output", "engine"},
    "reporting": {
        "core", "data", "compression", "models", "output", "engine", "runner", "estimation",
    },
    "api": {"core", "data", "models", "output", "engine", "runner", "estimation", "reporting"},
    "demo": {
        "core", "data", "compression", "models", "output", "engine", "runner", "estimation",
        "reporting", "api",
    },
    "cli": {"api", "demo"},
    "__main__": {"core", "cli"},
    "__init__": {"core", "output", "engine", "api"},
}  # fmt: skip
"""What each wing may import beside itself; `__init__` is the package's own, which is lazy."""

BORDERS: dict[str, set[str]] = {
    "torch": {"compression", "models", "engine", "reporting/show.py"},
    "transformers": {"models", "engine/decoding"},
    "tokenizers": {"models/families"},
    "ctypes": {"models/layers"},
    "psutil": {"engine/device.py", "output/heartbeats.py", "runner/worker.py"},
    "pynvml": {"engine/device.py"},
    "ray": {"runner"},
    "requests": {"runner/submit.py"},
    "aiohttp": {"runner/submit.py"},
    "botocore": {"models/checkpoint"},
    "huggingface_hub": {"models/checkpoint"},
    "filelock": {"models/checkpoint"},
    "fsspec": {"data", "models/checkpoint"},
    "pyarrow": {"core/schema.py", "data", "output", "runner", "reporting/show.py", "demo"},
    "PIL": {"data", "models", "engine/local_model.py", "demo"},
    "pydantic": {"core/config", "estimation/hardware.py"},
    "pydantic_core": {"core/config"},
    "yaml": {"core/config", "reporting"},
    "pythonjsonlogger": {"core/logs.py"},
    "rapidfuzz": {"core/metrics"},
    "matplotlib": {"reporting"},
    "jinja2": {"reporting"},
    "rich": {"reporting", "demo"},
    "typer": {"cli"},
}
"""Where each library may be imported: wings, folders or files."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def path_in_package(path: Path) -> str:
    """Where a module is within the package."""
    return path.relative_to(PACKAGE).as_posix()


def wing(path: Path) -> str:
    """The wing of a module: a folder, or a file beside the folders."""
    return path_in_package(path).partition("/")[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "gc2ray" else [node.module or ""]


def offences(path: Path) -> list[str]:
    """What a module imports and may not."""
    here, file, against = wing(path), path_in_package(path), []
    for name in imports(path):
        top, _, rest = name.partition(".")
        allowed = BORDERS.get(top)
        if allowed is not None and not any(f"{file}/".startswith(f"{at}/") for at in allowed):
            against.append(f"{file} imports {name}, which only {sorted(allowed)} may")
        below = rest.split(".")[0]
        if (
            top != "gc2ray"
            or below in (here, "")
            or (name == "gc2ray.__version__" and here == "cli")
        ):
            continue
        if below not in WINGS[here]:
            against.append(f"{here} ({file}) imports {below}, and may not")
    return against


MAX_LINES, MAX_FILES = 420, 12
GROWING = {"methods", "families", "formats", "metrics", "benchmarks"}
"""Folders of one kind, where newcomers add a file: they may hold any number of them."""


def test_files_and_folders_stay_small() -> None:
    """What grows beyond that does several things, which have names of their own."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    counts = {path: len(path.read_text().splitlines()) for path in files}
    assert {path: lines for path, lines in counts.items() if lines > MAX_LINES} == {}
    folders = Counter(path.parent for path in files if path.parent.name not in GROWING)
    assert {folder: count for folder, count in folders.items() if count > MAX_FILES} == {}


def test_an_architecture_is_a_small_file() -> None:
    """What several need belongs to `gc2ray/models`; `tiny` files write untrained models."""
    for path in (PACKAGE / "models/families").glob("*.py"):
        text = path.read_text()
        lines = len(text.splitlines())
        assert lines < 150 or path.name.startswith("tiny"), (path.name, lines)
        assert "fmt: " not in text or path.name.startswith("tiny"), path.name


def test_every_module_is_in_a_wing() -> None:
    assert {wing(path) for path in modules()} == {*WINGS}


def test_wings_stand_above_what_they_import() -> None:
    """So there is no circle."""
    order = list(WINGS)
    for name, below in WINGS.items():
        assert all(order.index(other) < order.index(name) for other in below), name


@pytest.mark.parametrize("path", modules(), ids=path_in_package)
def test_imports_go_down_and_stay_behind_their_borders(path: Path) -> None:
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert list(imports(path)) == []
    else:
        assert offences(path) == []


def test_an_upward_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_imports.PACKAGE", tmp_path)
    bad = tmp_path / "compression" / "views.py"
    bad.parent.mkdir()
    bad.write_text(
        "from gc2ray.engine.engine import Engine\nfrom gc2ray import runner\nimport ray\n"
    )
    assert len(offences(bad)) == 3


def test_modules_that_do_not_compute_start_without_torch() -> None:
    """It takes seconds and hundreds of megabytes: commands, drivers and idle workers do without."""
    light = ["cli.app", "api.jobs", "api.outputs", "api.standalone"]
    light += ["runner.run", "runner.submit", "runner.worker", "engine.device"]
    light += ["output.retry", "output.verify", "output.compact"]
    light += ["models.checkpoint.known_models", "reporting.page", "reporting.dataset_card"]
    script = f"import sys, {', '.join(f'gc2ray.{name}' for name in light)}\n"
    script += "print(sorted({'torch', 'transformers'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("core.config.job", {"pyarrow", "numpy"}),
        ("data.retries", {"aiohttp", "botocore", "huggingface_hub"}),
    ],
)
def test_what_every_command_needs_is_quick_to_import(module: str, unwanted: set[str]) -> None:
    script = f"import sys, gc2ray.{module}\nprint(sorted({unwanted} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_importing_the_package_does_nothing() -> None:
    """Module level holds definitions, constants and docstrings; no calls that do work."""
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            call = node.value if isinstance(node, ast.Expr) else None
            assert not isinstance(call, ast.Call), f"{path}: {ast.unparse(node)}"
            assert not isinstance(node, ast.For | ast.While | ast.With), f"{path}: {node.lineno}"
