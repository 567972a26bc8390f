"""The table of devices: each figure with its source, and a user's own in its place."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from gc2ray.core.errors import ConfigError
from gc2ray.estimation.hardware import (
    DEFAULT,
    Hardware,
    Prices,
    find_hardware,
    incomplete_notes,
    load_hardware,
)

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


VENDORS = ("nvidia.com", "amd.com", "intel.com")
CLOUDS = (
    "aws.amazon.com", "cloud.google.com", "azure.microsoft.com", "oracle.com", "runpod.io",
    "lambda.ai", "coreweave.com", "nebius.com", "verda.com",
)  # fmt: skip


def is_of(url: str | None, domains: tuple[str, ...]) -> bool:
    host = urlsplit(url or "").hostname or ""
    return any(host == domain or host.endswith(f".{domain}") for domain in domains)


def test_every_figure_of_the_default_table_is_the_vendors_or_the_clouds() -> None:
    table = load_hardware()
    assert len(table) >= 8
    for item in table:
        assert item.devices, item.name
        if item.source is not None:
            assert is_of(item.source, VENDORS), item.source
        for price in item.prices:
            assert price.where
            assert is_of(price.source, CLOUDS), price.source
    assert not is_of("https://nvidia.com.example.org", VENDORS)
    assert not is_of("https://huggingface.co/somebody/catalog.json", VENDORS)


def test_a_missing_figure_has_a_reason() -> None:
    for item in load_hardware():
        assert item.peaks is not None or item.missing, item.name
        assert item.prices or item.missing, item.name


def test_devices_that_lack_the_same_are_reported_in_one_line() -> None:
    bare = {"tflops": None, "gb_per_s": None, "missing": "not read"}
    table = [
        Hardware(**GOOD),
        *(Hardware(**GOOD | bare | {"name": name, "devices": []}) for name in ("a", "b")),
        Hardware(**GOOD | {"name": "c", "devices": [], "memory_gib": None, "missing": "secret"}),
    ]
    assert incomplete_notes(table, "No estimate for") == [
        "No estimate for a, b: the hardware table has no tflops, gb_per_s (not read); use "
        "--hardware FILE with your own.",
        "No estimate for c: the hardware table has no memory_gib (secret); use --hardware FILE "
        "with your own.",
    ]
    assert incomplete_notes(table[:1], "No estimate for") == []


def test_why_there_is_no_cost() -> None:
    mine = Hardware(**GOOD | {"prices": [PRICE], "missing": "no page was read"})
    assert Prices((mine,), "spot").missing(["My GPU"]) is None
    assert Prices((mine,), "spot").missing([]) is None
    assert Prices((mine,), usd_per_hour=1).missing(["cpu"]) is None
    assert Prices((mine,), "spot").missing(["cpu", "My GPU"]) == (
        "No cost: the hardware table has no spot price of cpu; use --usd-per-hour, or --hardware "
        "FILE with your own."
    )
    assert "no on-demand price of My GPU (no page was read); use" in str(
        Prices((mine,)).missing(["My GPU"])
    )


@pytest.mark.parametrize(
    ("device", "name"), [("NVIDIA H200", "H200"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S")]
)
def test_a_device_is_found_by_its_reported_name(device: str, name: str) -> None:
    found = find_hardware(load_hardware(), device)
    assert found is not None
    assert name in found.name
    assert find_hardware(load_hardware(), "cpu") is None


def test_a_users_table_replaces_the_default(tmp_path: Path) -> None:
    (mine,) = load_hardware(write(tmp_path, GOOD | {"prices": [PRICE]}))
    assert (mine.name, mine.usd_per_hour("spot"), mine.usd_per_hour("on_demand")) == (
        "mine", 0.5, None
    )  # fmt: skip
    peaks = mine.peaks
    assert peaks is not None
    assert (peaks.memory_bytes, peaks.bytes_per_second) == (24 * 2**30, 900e9)
    assert peaks.operations("float16") == peaks.operations("float32") == 10e12
    assert peaks.operations("bfloat16") == 100e12


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
        ([GOOD | {"gb_per_s": None}], "gb_per_s empty: give the figure, or say in `missing`"),
        ([GOOD | {"source": None}], "expected source and date of the figures"),
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


def test_a_file_without_a_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "hardware.yaml"
    with pytest.raises(ConfigError, match="No such file"):
        load_hardware(file)
    file.write_text("- 1")
    with pytest.raises(ConfigError, match="expected the key hardware"):
        load_hardware(file)
    assert DEFAULT.is_file()
