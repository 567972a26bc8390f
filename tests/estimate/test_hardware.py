"""The table of devices: each figure with its source, and a user's own in its place."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
import yaml

from gc2ray.core.errors import ConfigError
from gc2ray.estimate.hardware import DEFAULT, find_hardware, load_hardware

GOOD = {
    "name": "mine", "devices": ["My GPU"], "tflops": {"float32": 10, "bfloat16": 100},
    "gb_per_s": 900, "memory_gib": 24, "source": "its box", "date": "2026-11-01",
}  # fmt: skip
PRICE = {
    "kind": "spot", "usd_per_hour": 0.5, "where": "here", "source": "a bill", "date": "2026-11-01"
}  # fmt: skip


def write(path: Path, *entries: dict) -> Path:
    file = path / "hardware.yaml"
    file.write_text(yaml.safe_dump({"hardware": list(entries)}))
    return file


def test_every_figure_of_the_default_table_has_its_source() -> None:
    table = load_hardware()
    assert len(table) >= 8
    for item in table:
        assert item.source.startswith("https://")
        assert date(2020, 1, 1) < item.date <= date.today()
        assert item.devices, item.name
        for price in item.prices:
            assert price.source
            assert price.where
            assert date(2023, 1, 1) < price.date <= date.today()


def test_the_default_table_is_plausible() -> None:
    """Half precision is faster than single; no device leaves the bounds of its kind."""
    for item in load_hardware():
        assert 1 <= item.peak("float32") / 1e12 < item.peak("float16") / 1e12 <= 5000
        assert 100 <= item.gb_per_s <= 10_000
        assert 14 <= item.memory_gib <= 300
        on_demand, spot = item.usd_per_hour("on_demand"), item.usd_per_hour("spot")
        assert on_demand is None or 0.1 < on_demand < 30
        assert spot is None or on_demand is None or spot <= on_demand


@pytest.mark.parametrize(
    ("device", "name"), [("NVIDIA H200", "H200"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S")]
)
def test_a_device_is_found_by_what_it_calls_itself(device: str, name: str) -> None:
    found = find_hardware(load_hardware(), device)
    assert found is not None
    assert name in found.name
    assert find_hardware(load_hardware(), "cpu") is None


def test_a_users_table_takes_its_place(tmp_path: Path) -> None:
    (mine,) = load_hardware(write(tmp_path, GOOD | {"prices": [PRICE]}))
    assert (mine.name, mine.usd_per_hour("spot"), mine.usd_per_hour("on_demand")) == (
        "mine", 0.5, None
    )  # fmt: skip
    assert mine.memory_bytes == 24 * 2**30
    assert mine.peak("float16") == mine.peak("float32") == 10e12
    assert mine.peak("bfloat16") == 100e12


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [GOOD | {"memory_gb": 3}],
            r"hardware.0.memory_gb: unknown 'memory_gb'; did you mean 'mem",
        ),
        ([GOOD | {"tflops": {"bfloat16": 1}}], "expected float32"),
        ([GOOD | {"tflops": {"float32": 1, "int8": 2}}], "expected float32"),
        ([GOOD | {"gb_per_s": 0}], "hardware.0.gb_per_s"),
        ([GOOD, GOOD], "'My GPU' is named twice"),
        ([GOOD | {"prices": [PRICE | {"kind": "free"}]}], "hardware.0.prices.0.kind"),
        ([], "there is no hardware in it"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path: Path, entries: list, message: str) -> None:
    file = write(tmp_path, *entries)
    with pytest.raises(ConfigError, match=message) as caught:
        load_hardware(file)
    assert str(file) in str(caught.value)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "hardware.yaml"
    with pytest.raises(ConfigError, match="No such file"):
        load_hardware(file)
    file.write_text("- 1")
    with pytest.raises(ConfigError, match="expected the key hardware"):
        load_hardware(file)
    assert DEFAULT.is_file()
