"""Methods of one's own: loaded only from the source of the recipe, and refused if they are none."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gc2ray.compression.policy import CompressionPolicy
from gc2ray.compression.registry import build, build_configured
from gc2ray.compression.selection import everything
from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.errors import ConfigError
from tests.support.methods import SOURCE, install_method, write_method
from tests.support.views import kept_sets, random_views

EXAMPLES = Path(__file__).parents[2] / "examples"
METHOD = "own_method:Own"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """On the Python path; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def own_config(**settings: object) -> CompressionConfig:
    return CompressionConfig.model_validate({"method": METHOD, "allow_code": True, **settings})


def test_a_custom_method_takes_its_settings(folder: Path) -> None:
    write_method(folder, "own_method")
    policy = CompressionPolicy.from_config(own_config(retention=0.5))
    assert (policy.compressor.name, policy.retention_requested) == ("own", 0.5)
    views = random_views((700, 700))
    assert torch.equal(
        policy.compressor(views).entries, build("local", retention=0.5)(views).entries
    )


def test_an_entry_point_needs_no_permission(folder: Path) -> None:
    write_method(folder, "own_method")
    install_method(folder, "own-entry", METHOD)
    assert build_configured(CompressionConfig(method="own-entry")).name == "own"


def test_temperature_is_passed_to_methods_that_take_it(folder: Path) -> None:
    source = SOURCE.replace("(Local)", "(GlobalCom2)").replace(
        "methods.local", "methods.globalcom2"
    )
    write_method(folder, "own_method", source.replace("import Local", "import GlobalCom2"))
    built = build_configured(own_config(temperature=3.0))
    assert built.temperature == 3.0  # type: ignore[attr-defined]


def test_a_changed_source_is_not_run(folder: Path) -> None:
    """As on a node that has another version of it."""
    path = write_method(folder, "own_method")
    config = own_config()
    path.write_text("raise RuntimeError('this code was run')\n")
    with pytest.raises(ConfigError, match=r"recipe\.compression\.source_sha256: the source of own"):
        build_configured(config)
    path.unlink()
    with pytest.raises(ConfigError, match=r"recipe\.compression\.method: no module 'own_method'"):
        build_configured(config)


def test_a_source_that_was_edited_is_imported_again(folder: Path) -> None:
    """As in a notebook, where the same process reads the recipe again."""
    path = write_method(folder, "own_method")
    assert build_configured(own_config()).name == "own"
    path.write_text(SOURCE.replace('"own"', '"edited"'))
    assert build_configured(own_config()).name == "edited"


def test_another_module_of_that_name_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_method(folder, "own_method")
    monkeypatch.setitem(sys.modules, "own_method", torch)
    with pytest.raises(ConfigError, match=r"cannot be used: Python imports own_method from "):
        build_configured(own_config())


def test_a_module_imported_before_it_was_edited_is_replaced(folder: Path) -> None:
    """As in a notebook that imports the method's module itself."""
    path = write_method(folder, "own_method")
    importlib.import_module("own_method")
    path.write_text(SOURCE.replace('"own"', '"edited"'))
    assert build_configured(own_config()).name == "edited"


def test_bytecode_of_an_older_source_is_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python takes it for current if time and size of the source are the same."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = write_method(folder, "own_method")
    importlib.import_module("own_method")
    del sys.modules["own_method"]
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_text(SOURCE.replace('"own"', '"new"'))
    os.utime(path, ns=times)
    assert build_configured(own_config()).name == "new"


def test_a_method_must_return_a_bool_mask_over_all_tokens(folder: Path) -> None:
    views = random_views((700, 700))
    for line, problem in {
        "return batch.valid.float()": "got torch.float32",
        "return batch.valid[:1]": r"bool \(\d+, \d+\)",
    }.items():
        source = SOURCE.replace("Local", "MaskCompressor").replace("methods.local", "base")
        write_method(folder, "own_method", f"{source}    def keep(self, batch): {line}\n")
        with pytest.raises(TypeError, match=f"method own: keep must return .*{problem}"):
            build_configured(own_config(retention=0.5))(views)


def test_padding_is_dropped_whatever_the_mask(folder: Path) -> None:
    source = SOURCE.replace("Local", "MaskCompressor").replace("methods.local", "base")
    write_method(
        folder, "own_method", f"{source}    def keep(self, batch): return batch.valid | True\n"
    )
    views = random_views((90, 2000))
    kept = build_configured(own_config(retention=0.5))(views)
    assert kept.entries.tolist() == everything(views).entries.tolist()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named"),
        ("Another = 1", "the module has no Own"),
        ("Own = print", r"Own is not a gc2ray\.compression\.base\.Compressor"),
        ("from pathlib import Path as Own", r"Own is not a gc2ray\.compression\.base\.Comp"),
        ("from gc2ray.compression.base import MaskCompressor as Own", "Own does not define keep"),
        (SOURCE.replace("name:", "title:").replace("Local", "MaskCompressor").replace(
            "methods.local", "base") + "    def keep(self, batch): ...\n", "Own has no name"),
        ("from gc2ray.compression.methods.none import NoCompression as Own", "field retention"),
        (SOURCE.replace('"own"', '"local"'), "its name is 'local', that of a method of gc2ray"),
        (SOURCE + "    strength: float\n", "TypeError: non-default argument 'strength'"),
    ],
)  # fmt: skip
def test_an_invalid_method_is_refused(folder: Path, source: str, reason: str) -> None:
    path = write_method(folder, "own_method", source)
    line = rf"recipe\.compression\.method: {METHOD} \({path}\) cannot be used: .*{reason}"
    with pytest.raises(ConfigError, match=line):
        build_configured(own_config())


# --- the example --------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> CompressionConfig:
    monkeypatch.syspath_prepend(EXAMPLES)
    return CompressionConfig(method="custom_method:CenterCrop", allow_code=True, retention=0.25)


@pytest.mark.parametrize("size", [(672, 672), (90, 2000), (400, 1000)])
def test_the_example_keeps_the_middle(example: CompressionConfig, size: tuple[int, int]) -> None:
    compressor, views = build_configured(example), random_views(size)
    for view, kept in enumerate(kept_sets(views, compressor(views).entries.tolist())):
        valid = [token for token in range(36) if views.index.valid[view * 36 + token]]
        assert kept <= {*valid}
        assert len(kept) == min(len(valid), max(1, len(valid) // 4))
        farthest_kept = max(map(from_the_middle, kept), default=0.0)
        assert all(from_the_middle(token) >= farthest_kept for token in {*valid} - kept)
    whole = build_configured(example.model_copy(update={"retention": 1.0}))
    assert torch.equal(whole(views).entries, everything(views).entries)


def from_the_middle(token: int) -> float:
    return (token // 6 - 2.5) ** 2 + (token % 6 - 2.5) ** 2


def test_the_example_is_short() -> None:
    lines = (EXAMPLES / "custom_method.py").read_text().split('"""', 2)[2].strip().splitlines()
    assert len(lines) <= 30
