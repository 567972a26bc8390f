"""`gc2ray demo` before it answers; tests/test_wheel.py runs it whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from gc2ray.core.errors import ConfigError
from gc2ray.demo import demo as demo_module
from gc2ray.demo.demo import demo


def test_the_demo_deletes_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(ConfigError, match=r"--output: .* is not an earlier demo's; move it away"):
        demo(tmp_path)
    assert (tmp_path / "precious").exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"--output: .*file/there cannot be made: Not a directory"
    ):
        demo(tmp_path / "file" / "there")


def test_a_package_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "MODEL", tmp_path / "model")
    with pytest.raises(ConfigError, match="has no demo model"):
        demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_photographs_backgrounds_are_textures(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError

    monkeypatch.setattr(demo_module, "opened_photos", missing)
    backgrounds, line = demo_module._backgrounds()
    assert backgrounds == []
    assert line.endswith("for photographs: pip install 'gc2ray[demo]'")
