"""The house keeps its floors: imports go down only, and libraries stay behind their borders."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gc2ray"

FLOORS = {
    "errors": 0, "footer": 0, "stats": 0, "records": 0, "canvas": 0, "canvas_plan": 0, "views": 0,
    "compiled_attention": 0, "feed": 0, "linear": 0, "quality": 0, "shards": 0,
    "bill": 0, "cost": 0, "energy": 0, "figures": 0, "knock": 0, "logs": 0, "methods": 0,
    "strict_yaml": 0, "weights": 0, "generation_rules": 0, "ending": 0, "storage": 0,
    "audit": 1, "handout": 1, "journal": 1, "metrics": 1, "patience": 1, "progress": 1,
    "prompts": 1, "packing": 1, "compression": 1, "checkpoint": 1, "decoding": 1,
    "families": 2, "images": 2, "patient_file": 2,
    "config": 3, "pictures": 3, "pocket": 3,
    "sizing": 4, "way": 4, "manifest": 4, "row": 4, "shard_queue": 4,
    "staging": 4,
    "vision": 5, "sources": 5, "store": 5,
    "engine": 6, "lease": 6, "part": 6, "generations": 6,
    "worker": 7, "planner": 7, "parity": 7, "latest": 7, "inspection": 7,
    "kept_columns": 7,
    "survey": 7, "ledger": 7, "hardware": 4,
    "forecast": 8, "pace": 8,
    "offer": 9, "summary": 9, "charts": 10, "tables": 10, "estimate": 10,
    "report": 11, "estimate_table": 11,
    "card": 12, "tune": 7, "tuning": 12, "heat_map": 1, "show": 9,
    "pool": 8, "verify": 8,
    "retry": 9, "compact": 9,
    "ray_pool": 9, "submission": 9,
    "driver": 10,
    "run": 11, "display": 11,
    "cli": 13,
    "__main__": 14,
}  # fmt: skip

SAME_FLOOR = {
    ("records", "errors"), ("records", "stats"), ("records", "cost"),
    ("weights", "errors"), ("canvas_plan", "canvas"), ("views", "canvas"), ("views", "canvas_plan"),
}  # fmt: skip
"""Borders within the ground floor: types that are made of each other, in one direction."""

BORDERS = {
    "torch": {
        "canvas_plan",
        "compiled_attention",
        "linear",
        "views",
        "packing",
        "compression",
        "families",
        "decoding",
        "pictures",
        "row",
        "vision",
        "engine",
        "show",
    },
    "ctypes": {"compiled_attention"},
    "pynvml": {"energy"},
    "matplotlib": {"charts", "heat_map"},
    "jinja2": {"report"},
    "transformers": {"families", "decoding"},
    "tokenizers": {"families"},
    "ray": {"metrics", "ray_pool", "submission"},
    "pythonjsonlogger": {"logs"},
    "requests": {"submission"},
    "aiohttp": {"errors", "patience", "submission"},
    "pyarrow": {
        "footer",
        "pocket",
        "records",
        "manifest",
        "sources",
        "store",
        "part",
        "planner",
        "worker",
        "inspection",
        "kept_columns",
        "latest",
        "compact",
        "show",
    },
    "PIL": {"images", "families", "pocket"},
    "rapidfuzz": {"quality"},
    "typer": {"cli"},
    "rich": {"cli", "display", "estimate_table", "tuning"},
    "yaml": {"card", "config", "report", "strict_yaml"},
    "pydantic": {"config", "hardware"},
    "fsspec": {"images", "sources", "staging", "storage"},
    "huggingface_hub": {"errors", "patience", "staging"},
    "filelock": {"staging"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The module or folder of a file, as FLOORS names it."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "gc2ray" else [node.module or ""]


def offences(path: Path) -> list[str]:
    here, found = room(path), []
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top in BORDERS and here not in BORDERS[top]:
            found.append(f"{here} imports {name}, which only {sorted(BORDERS[top])} may")
        below = rest.split(".")[0]
        if top != "gc2ray" or below in (here, "__version__", ""):
            continue
        if FLOORS[below] >= FLOORS[here] and (here, below) not in SAME_FLOOR:
            found.append(f"{here} (floor {FLOORS[here]}) imports {below} (floor {FLOORS[below]})")
    return found


def test_every_module_has_a_floor() -> None:
    assert {room(path) for path in modules()} == {*FLOORS, "__init__"}


def test_the_readme_tells_every_floor() -> None:
    """Each module once, in a row of its floor, and rows from the ground up."""
    readme = (PACKAGE.parent / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ((?:`\w+/?` ?)+) \|", readme, re.MULTILINE)
    told = [(name.strip("`/"), int(floor)) for floor, names in rows for name in names.split()]
    assert len(told) == len(dict(told))
    assert dict(told) == FLOORS
    floors = [floor for _, floor in told]
    assert floors == sorted(floors)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_and_stay_behind_their_borders(path: Path) -> None:
    if room(path) == "__init__":
        assert list(imports(path)) == []
    else:
        assert offences(path) == []


def test_an_upward_import_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_floors.PACKAGE", tmp_path)
    bad = tmp_path / "views.py"
    bad.write_text("from gc2ray.engine import Engine\nfrom gc2ray import config\nimport ray\n")
    assert len(offences(bad)) == 3


def test_who_does_not_compute_starts_without_torch() -> None:
    """It takes seconds and hundreds of megabytes: commands, drivers and idle workers do without."""
    light = ["cli", "run", "submission", "worker", "retry", "verify", "compact", "report", "card"]
    script = f"import sys, {', '.join(f'gc2ray.{name}' for name in light)}\n"
    script += "print(sorted({'torch', 'transformers'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_importing_the_package_does_nothing() -> None:
    """Module level holds definitions, constants and docstrings; no calls that do work."""
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            call = node.value if isinstance(node, ast.Expr) else None
            assert not isinstance(call, ast.Call), f"{path}: {ast.unparse(node)}"
            assert not isinstance(node, ast.For | ast.While | ast.With), f"{path}: {node.lineno}"
