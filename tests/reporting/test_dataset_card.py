"""The dataset card: what the hub reads, what people read, and whose it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

from gc2ray.core.errors import Status
from gc2ray.core.intervals import Interval
from gc2ray.data.store import Store
from gc2ray.output.totals import read_totals
from gc2ray.reporting.dataset_card import CARD_NAME, MARKER, card, write_card
from gc2ray.reporting.summary import AuditSummary, EscalationStep, Summary, summarise
from tests.output.test_totals import worker_record
from tests.reporting.test_report import PRICES, a_run, run_with_markup
from tests.support.commands import run_command
from tests.support.outputs import first_plan, write_round


def summary_of(folder: Path) -> Summary:
    return summarise(read_totals(str(folder)), PRICES)


def test_the_hub_reads_the_card(tmp_path: Path) -> None:
    text = card(summary_of(a_run(tmp_path)))
    found = DatasetCard(text)
    assert found.data.to_dict()["configs"] == [
        {
            "config_name": "default",
            "data_files": [{"split": "train", "path": "data/*.parquet"}],
        }
    ]
    assert found.data.size_categories == ["n<1K"]
    assert found.data.license is None


def test_an_output_with_its_card_is_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is: parts of the run, not its plan, not its retries."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    output = a_run(tmp_path / "run")
    summary = summary_of(output)
    assert write_card(Store(str(output)), summary)
    loaded = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == sum(summary.rounds[0].by_status.values())
    assert {"row_key", "answer", "visual_tokens_kept"} <= set(loaded.column_names)


def test_the_card_summarises_the_run(tmp_path: Path) -> None:
    summary = summary_of(a_run(tmp_path))
    text = card(summary)
    for message in (
        f"{summary.answers} answers, {summary.errors} of them failed",
        "| failed | 1 |", "compressed: the model read 25.0% of them", "`gc2ray compact`",
        "2 x NVIDIA Big", "$0.13", summary.fingerprint, "| model | model, float32 |",
    ):  # fmt: skip
        assert message in text, message
    assert "add license, language and pretty_name" in text


def test_an_audit_is_reported(tmp_path: Path) -> None:
    summary, agreed = summary_of(a_run(tmp_path)), Interval(0.7, 0.8, 0.9)
    audit = AuditSummary(
        1200,
        agreed,
        0.9,
        0.1,
        {},
        {},
        (),
        (EscalationStep(0.5, 20, 15), EscalationStep(0.75, 9, 2)),
    )
    text = card(replace(summary, audit=audit))
    assert "| same answer uncompressed | 80.0% of 1,200 audited answers |" in text
    assert "| answered again at a higher retention | 29 of those that differed |" in text
    assert "again at a higher" not in card(replace(summary, audit=replace(audit, steps=())))
    assert "uncompressed |" not in card(summary)


def test_an_uncompressed_run_without_records_has_a_short_card(tmp_path: Path) -> None:
    write_round(tmp_path, 0, first_plan(), lambda source, row: [Status.FAILED])
    text = card(summary_of(tmp_path))
    assert "not compressed." in text
    assert "Unknown." in text
    assert "gc2ray compact" not in text


def test_paths_of_a_machine_are_left_out(tmp_path: Path) -> None:
    summary = summary_of(a_run(tmp_path))
    model = {**summary.recipe["model"], "path": "/home/somebody/secret/llava"}

    text = card(replace(summary, recipe={**summary.recipe, "model": model}))
    assert "somebody" not in text
    assert "| model | llava, float32 |" in text
    assert "path: llava" in text
    hub = {**model, "path": "llava-hf/llava-v1.6", "revision": "abc"}
    assert "llava-hf/llava-v1.6 at abc" in card(
        replace(summary, recipe={**summary.recipe, "model": hub})
    ).replace("\\", "")


def test_a_card_written_by_the_user_stays(tmp_path: Path) -> None:
    output = a_run(tmp_path)
    store, summary = Store(str(output)), summary_of(output)
    assert write_card(store, summary)
    assert write_card(store, summary)  # ours is renewed
    own = (store.read(CARD_NAME) or b"").replace(MARKER.encode(), b"") + b"My words."
    store.replace(CARD_NAME, own)
    assert not write_card(store, summary)
    assert store.read(CARD_NAME) == own


def test_markup_in_records_is_escaped(tmp_path: Path) -> None:
    text = card(summary_of(run_with_markup(tmp_path)))
    assert "<script" not in text
    assert "<img" not in text


def test_the_command_writes_report_and_card(tmp_path: Path) -> None:
    output = a_run(tmp_path / "run")
    result = run_command("report", output, "--usd-per-hour", "2")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"{output}/report/report.html, .md, .json", f"{output}/README.md"
    ]  # fmt: skip
    assert {path.name for path in (output / "report").iterdir()} == {
        "report.html", "report.md", "report.json"
    }  # fmt: skip
    assert run_command("verify", output).stdout.count("README") == 0
    again = run_command("report", output, output, "--to", tmp_path / "both", "--no-card")
    assert again.stdout.splitlines() == [f"{tmp_path}/both/report.html, .md, .json"]


@pytest.mark.parametrize("words", [["nowhere"], ["OUT", "--hardware", "nowhere.yaml"]])
def test_outputs_that_cannot_be_reported_are_refused(tmp_path: Path, words: list[str]) -> None:
    write_round(tmp_path / "run", 0, first_plan())
    Store(str(tmp_path / "run")).create("workers/w.json", worker_record())
    result = run_command("report", *(str(tmp_path / "run") if w == "OUT" else w for w in words))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
