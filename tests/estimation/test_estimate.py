"""`gc2ray estimate`: exact where it says so, and what a person reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from gc2ray.core.config.job import load_job
from gc2ray.core.format import duration, interval_text, money, short
from gc2ray.core.intervals import Interval
from gc2ray.demo.demo import CONFIG
from gc2ray.demo.photos import opened_photos
from gc2ray.demo.rows import Split, demo_rows, write_rows
from gc2ray.demo.spec import MODEL
from gc2ray.estimation.estimate import Assumptions, estimate_profile
from gc2ray.estimation.hardware import load_hardware
from gc2ray.estimation.input_profile import profile_input
from gc2ray.estimation.workload import NO_WORK
from gc2ray.models.loading import load_metadata
from gc2ray.output.totals import read_totals
from tests.estimation.test_hardware import GOOD
from tests.support.commands import gc2ray, job_file, run_command


def hardware_file(folder: Path) -> Path:
    """A table of one device whose figures are complete."""
    file = folder / "hardware.yaml"
    file.write_text(yaml.safe_dump({"hardware": [GOOD]}))
    return file


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo's configuration, on fewer of its rows; none of them is broken."""
    rows = write_rows(tmp_path / "questions.parquet", demo_rows(Split.TEST, 40, opened_photos()))
    assert rows == 40
    data = yaml.safe_load(CONFIG.read_text())
    data["output"] = str(tmp_path / "out")
    data["recipe"]["model"]["path"] = str(MODEL)
    data["recipe"]["input"]["uri"] = str(tmp_path / "questions.parquet")
    data["cluster"] |= {"shard_rows": 8, "workers": 1}
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.ray
@pytest.mark.timeout(480)
def test_estimated_tokens_are_those_of_the_run(demo: Path, tmp_path: Path) -> None:
    result = run_command("estimate", demo, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    ran = gc2ray("run", demo)
    assert ran.returncode == 0, ran.stderr
    stats = read_totals(str(tmp_path / "out")).stats
    assert found["rows"] == found["sampled_rows"] == 40
    for name, actual in (
        ("prompts", stats.by_status["ok"]),
        ("images", stats.images),
        ("visual_tokens_full", stats.visual_tokens_full),
        ("text_tokens", stats.prompt_tokens - stats.visual_tokens_kept - stats.newline_tokens),
    ):
        assert found[name] == {"low": actual, "mid": actual, "high": actual}, name
    own, full = found["workloads"][0], found["workloads"][1]
    assert (own["retention"], full["retention"]) == (0.1, 1.0)
    assert own["visual_tokens"]["low"] <= stats.visual_tokens_kept <= own["visual_tokens"]["high"]
    assert own["newline_tokens"]["low"] <= stats.newline_tokens <= own["newline_tokens"]["high"]
    assert own["flops"]["encode"]["mid"] == stats.flops["encode"]
    for stage, flops in stats.flops.items():
        assert own["flops"][stage]["low"] <= flops <= own["flops"][stage]["high"], stage
    assert full["flops"]["prefill"]["low"] <= stats.flops_full["prefill"]
    assert stats.flops_full["prefill"] <= full["flops"]["prefill"]["high"]
    like = run_command("estimate", demo, "--like", tmp_path / "out")
    assert like.exit_code == 0, like.stderr
    assert "cpu: from the rates of an earlier run." in like.stdout
    assert "Output tokens: as in the run on cpu." in like.stdout


def test_it_needs_neither_weights_nor_output(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    bare = tmp_path / "model"
    shutil.copytree(tiny_paths["vicuna"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    config = job_file(tmp_path, bare)
    result = run_command(
        "estimate",
        config,
        "--output-tokens",
        "3",
        "--hours",
        "0.5",
        "--hardware",
        hardware_file(tmp_path),
    )
    assert result.exit_code == 0, result.stderr
    for text in ("rows", "12", "visual tokens before compression", "as given", "1 (recipe)"):
        assert text.replace("1 (recipe)", "0.25 (recipe)") in result.stdout
    assert "Every image header and prompt was read" in result.stdout
    assert not (tmp_path / "out").exists()


def test_devices_without_figures_are_left_out(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    config = job_file(tmp_path, tiny_paths["vicuna"])
    bare = {"name": "Bare", "devices": ["Bare 1"], "missing": "no data sheet was read"}
    file = tmp_path / "hardware.yaml"
    file.write_text(yaml.safe_dump({"hardware": [GOOD, bare]}))
    result = run_command("estimate", config, "--hardware", file)
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "Bare" in line]
    assert line == (
        "* No estimate for Bare: the hardware table has no tflops, gb_per_s, memory_gib (no data "
        "sheet was read); use --hardware FILE with your own."
    )
    assert "* No cost of mine: the hardware table has no price; use" in result.stdout
    assert "$" not in result.stdout
    document = json.loads(run_command("estimate", config, "--hardware", file, "--json").stdout)
    assert {item["hardware"] for item in document["devices"]} == {"mine"}
    assert document["left_out"] == [line.removeprefix("* ")]
    default = run_command("estimate", config)
    assert default.exit_code == 0, default.stderr
    assert "* No estimate for T4, L4" in default.stdout
    assert "visual tokens before compression" in default.stdout


@pytest.mark.parametrize(("new", "told"), [(1, True), (400, False)])
def test_it_says_where_the_tower_is_what_images_cost(
    tiny_paths: dict[str, Path], tmp_path: Path, new: int, *, told: bool
) -> None:
    config = job_file(tmp_path, tiny_paths["vicuna"])
    settings = ("recipe.compression.retention=0.1", f"recipe.generation.max_new_tokens={new}")
    (own, *_) = json.loads(run_command("estimate", config, *settings, "--json").stdout)["workloads"]
    flops = {stage: operations["mid"] for stage, operations in own["flops"].items()}
    share = flops["encode"] / sum(flops.values())
    assert (share >= 0.5) == told
    shown = run_command("estimate", config, *settings).stdout
    assert (f"The vision tower takes {share:.0%} of the operations" in shown) == told


def test_names_that_look_like_markup_are_printed_as_they_are(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    config = job_file(tmp_path, tiny_paths["vicuna"])
    (tmp_path / "in").rename(tmp_path / "[red]a[b]")
    file = tmp_path / "hardware.yaml"
    file.write_text(yaml.safe_dump({"hardware": [{**GOOD, "name": "[bold] our GPU[i]"}]}))
    uri = f"recipe.input.uri={tmp_path / '[[]red]a[[]b]' / 'a.parquet'}"
    result = run_command("estimate", config, uri, "--hardware", file)
    assert result.exit_code == 0, result.stderr
    assert "[[]red]a[[]b]" in result.stdout
    assert "[bold] our GPU[i]" in result.stdout


def test_the_size_of_the_sample_is_printed(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    config = job_file(tmp_path, tiny_paths["vicuna"], rows=60)
    result = run_command("estimate", config, "--rows", "20")
    assert "20 of 60 rows were sampled" in result.stdout
    assert "60 of 60" not in run_command("estimate", config, "--rows", "20", "--all").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--like", "nowhere"], "nowhere: there is no run here"),
        (["--hardware", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["recipe.modle=x"], "unknown 'modle'"),
        (["recipe.input.image=picture"], "no column 'picture'"),
        (["recipe.model.path=/nowhere"], "there is no model in /nowhere"),
    ],
)
def test_unusable_options_are_refused(
    tiny_paths: dict[str, Path], tmp_path: Path, words: list[str], message: str
) -> None:
    result = run_command("estimate", job_file(tmp_path, tiny_paths["vicuna"]), *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_other_retentions_of_a_method_without_one_are_globalcom2s(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    job = load_job(job_file(tmp_path, tiny_paths["vicuna"]), ["recipe.compression={method: none}"])
    model = load_metadata(str(tiny_paths["vicuna"]), dtype="float32")
    file = hardware_file(tmp_path)
    profile = profile_input(job.recipe, model)
    found = estimate_profile(profile, model, job, load_hardware(file), Assumptions())
    assert [(item.method, item.retention) for item in found.workloads] == [
        ("none", 1.0), *(("globalcom2", kept) for kept in (0.75, 0.5, 0.25, 0.1))
    ]  # fmt: skip
    tokens = [item.visual_tokens.mid for item in found.workloads]
    assert tokens == sorted(tokens, reverse=True)
    assert found.output_tokens == Interval(1, 4, 8)
    assert "assumed 1 to 8 (max_new_tokens)" in found.output_basis
    assert [item.hardware for item in found.devices] == ["mine"] * 5
    assert found.left_out == ()


def test_audits_are_estimated(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    path = tiny_paths["vicuna"]
    changes = ["recipe.audit={share: 0.5, escalate: [0.5, 0.75]}"]
    job = load_job(job_file(tmp_path, path), changes)
    model = load_metadata(str(path), dtype="float32")
    profile = profile_input(job.recipe, model)
    found = estimate_profile(profile, model, job, (), Assumptions(output_tokens=4))
    by_retention = {item.retention: item for item in found.workloads}
    own, whole = by_retention[0.25], by_retention[1.0]
    assert whole.audit_work == NO_WORK  # nothing is compressed there
    steps = [by_retention[kept].work for kept in (0.5, 0.75)]
    for end, again in enumerate((0.0, 0.5, 1.0)):
        for stage, flops in own.audit_work[end].flops.items():
            once, twice = (step[end].flops[stage] for step in steps)
            expected = 0.5 * (whole.work[end].flops[stage] + again * once + again**2 * twice)
            assert flops == pytest.approx(expected, abs=3), (end, stage)
        answers = 0.5 * (1 + again + again**2)
        for name in ("rows", "output_tokens"):
            expected = getattr(own.work[end], name) * answers
            assert getattr(own.audit_work[end], name) == pytest.approx(expected, abs=2), name
        assert own.audit_work[end].cache_read_bytes > answers * own.work[end].cache_read_bytes
    # At 0.5 only one rung is higher, at 0.75 none is.
    assert [by_retention[kept].audit_work[2].rows for kept in (0.5, 0.75)] == [
        own.work[2].rows, own.work[2].rows // 2
    ]  # fmt: skip
    file = hardware_file(tmp_path)
    result = run_command(
        "estimate", job_file(tmp_path, path), "--output-tokens", "4", "--hardware", file, *changes
    )
    assert result.exit_code == 0, result.stderr
    assert "50.0% of the rows are also answered uncompressed, and rows that differ" in result.stdout
    assert "again, up to 2 times: up to " in result.stdout
    assert (
        "also answered uncompressed" not in run_command("estimate", job_file(tmp_path, path)).stdout
    )


def test_an_audit_without_answerable_rows_is_estimated(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    """No row can be answered: all of them are text where there should be images."""
    config = job_file(tmp_path, tiny_paths["vicuna"])
    source = next((tmp_path / "in").glob("*.parquet"))
    table = pq.read_table(source)
    place = table.column_names.index("image")
    broken = pa.array([{"bytes": b"no image", "path": None}] * len(table), table["image"].type)
    pq.write_table(table.set_column(place, "image", broken), source)
    result = run_command(
        "estimate", config, "recipe.audit={share: 0.5}", "--output-tokens", "4",
        "--hardware", hardware_file(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "prompts that cannot: bad_image" in result.stdout


def test_numbers_are_written_readably() -> None:
    assert interval_text(Interval.exactly(1_234_567)) == "1,234,567"
    assert interval_text(Interval(1.9e6, 2e6, 2.1e6)) == "2M (1.9M to 2.1M)"
    assert [short(n) for n in (999, 9_999, 14_918, 2.5e6, 3.25e9, 1.5e13)] == [
        "999", "9,999", "14.9k", "2.5M", "3.25G", "15T"
    ]  # fmt: skip
    assert [duration(hours) for hours in (0.001, 0.01, 0.5, 3.26, 100)] == [
        "3.6 s", "36 s", "30 min", "3.3 h", "4.2 d"
    ]  # fmt: skip
    assert [money(usd) for usd in (0.0123, 0.5, 12.345, 12_345)] == [
        "$0.012", "$0.50", "$12.35", "$12,345"
    ]  # fmt: skip
