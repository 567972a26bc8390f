"""The report's numbers are the footers', to the last digit, and what it shows is harmless."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.geometry import canvas_geometry
from gc2ray.core.errors import Status
from gc2ray.core.intervals import Interval
from gc2ray.core.records import Answer, Audit, Escalation
from gc2ray.core.shards import SourceFile, Span
from gc2ray.core.stats import RunStats
from gc2ray.core.usage import Usage, UsageKind
from gc2ray.data.store import Store
from gc2ray.estimation.hardware import Prices
from gc2ray.models.flops import AnswerTokens, demand_of
from gc2ray.models.shape import LLAVA_7B
from gc2ray.output.parts import read_part_footer
from gc2ray.output.retry import DEAD, next_retry
from gc2ray.output.totals import read_totals
from gc2ray.reporting.charts import over_time
from gc2ray.reporting.heat_map import TokenMap
from gc2ray.reporting.page import Report, RowImages, markdown_text, report
from gc2ray.reporting.summary import AuditSummary, BeforeAfter, EscalationStep, Summary, summarise
from tests.estimation.test_device_estimate import BIG
from tests.output.test_totals import driver_record, worker_record
from tests.support.outputs import FILES, first_plan, retry_of, write_round

EVIL = '<script>document.title="taken"</script><img src=https://evil.test/x onerror=alert(1)>'
PRICES = Prices((BIG,))


def measured(answer: Answer) -> Answer:
    """An answer of the 7B, a quarter of its tokens kept."""
    if answer.status != Status.OK:
        return answer
    tokens = AnswerTokens(views=5, projected=740, prompt=800, output=answer.output_tokens or 1)
    uncompressed = replace(tokens, projected=740 + 2188, prompt=800 + 2188)
    return replace(
        answer,
        visual_tokens_full=2880, visual_tokens_kept=720, newline_tokens=20, newline_tokens_full=48,
        kept_per_view=((144,) * 5,), full_per_view=((576,) * 5,), prompt_tokens=800,
        images_encoded=1,
        demand=demand_of(LLAVA_7B, tokens), demand_full=demand_of(LLAVA_7B, uncompressed),
        stage_ns=dict.fromkeys(answer.stage_ns, 10 ** 8),
    )  # fmt: skip


def a_run(folder: Path, bad: tuple[int, ...] = (1,), *, device: str = "NVIDIA Big") -> Path:
    """A run with a retry, workers, a driver and dead letters; its plan has 17 rows."""

    def outcome(source: str, row: int) -> list[Status] | None:
        if source == "d/b.parquet" and row == 6:
            return None
        return [Status.FAILED if row in bad and source == "a.parquet" else Status.OK]

    store = write_round(folder, 0, first_plan(), outcome, changed=measured)
    retry = retry_of([Span("a.parquet", "fa", 1, 2)])
    write_round(folder, 1, retry, changed=measured)
    for name in ("one", "two"):
        store.create(f"workers/{name}.json", worker_record(device=device, gpus=1.0))
    device_time = Usage({UsageKind.USEFUL: 150.0, UsageKind.LOADING: 60.0, UsageKind.IDLE: 20.0})
    record = driver_record(130.0, device_time)
    store.create(record.name, record.to_bytes())
    return folder


def test_rows_that_a_retry_answered_are_not_missing(tmp_path: Path) -> None:
    """Those of a shard that was given up, which has no part in the run itself."""
    summary, found = written_report(a_run(tmp_path))
    assert summary.answered_rows == summary.rounds[0].rows == 14
    assert "3 planned rows are not answered; run the job again" in found.markdown
    retry = next_retry(str(tmp_path), [DEAD])
    assert retry is not None
    write_round(tmp_path, 2, retry.plan, changed=measured)
    summary, found = written_report(tmp_path)
    assert summary.answered_rows == 17
    assert "planned rows are not answered" not in found.markdown
    assert "17 of 17" in found.markdown
    assert "answers of all rounds" in found.markdown


def written_report(folder: Path, prices: Prices = PRICES) -> tuple[Summary, Report]:
    summary = summarise(read_totals(str(folder)), prices)
    return summary, report([summary])


def test_every_number_is_the_footers_sum(tmp_path: Path) -> None:
    summary, found = written_report(a_run(tmp_path))
    names = [(Store(str(tmp_path)), n) for n in Store(str(tmp_path)).names("data")]
    retry = Store(str(tmp_path / "retry_rounds" / "1"))
    names += [(retry, n) for n in retry.names("data")]
    stats = sum((read_part_footer(store, name).stats for store, name in names), RunStats())
    assert summary.stats.by_status == stats.by_status
    assert summary.visual == BeforeAfter(stats.visual_tokens_full, stats.visual_tokens_kept)
    assert summary.newlines == BeforeAfter(stats.newline_tokens_full, stats.newline_tokens)
    assert summary.kv_bytes == BeforeAfter(stats.kv_bytes_full, stats.kv_bytes)
    assert {s: c.kept for s, c in summary.flops.items()} == stats.flops
    assert {s: c.full for s, c in summary.flops.items()} == stats.flops_full
    assert sum(view.kept for view in summary.views) == stats.visual_tokens_kept
    assert sum(view.full for view in summary.views) == stats.visual_tokens_full
    assert sum(summary.retention) == stats.by_status["ok"]
    assert summary.input_starved_seconds == stats.input_starved_ns / 1e9
    assert summary.stats == stats  # fmt: skip
    document = json.loads(found.json)
    (run,) = document["runs"]
    assert run["visual"] == {"full": stats.visual_tokens_full, "kept": stats.visual_tokens_kept}
    assert run["flops"]["prefill"]["kept"] == stats.flops["prefill"]


def test_money_is_all_device_time_at_its_price(tmp_path: Path) -> None:
    summary, _ = written_report(a_run(tmp_path))
    # Two workers lived for 120 s each; drivers tell of 230 s of these 240.
    assert summary.costs.device_seconds_by_use == {
        "useful": 150.0,
        "loading": 60.0,
        "idle": 20.0,
        "unaccounted": 10.0,
    }
    assert summary.costs.usd == pytest.approx(240 / 3600 * 2)
    assert summary.usd_per_1000 == pytest.approx(1000 * 240 / 3600 * 2 / summary.stats.images)
    assert summary.costs.useful_share == pytest.approx(150 / 240)
    spot, _ = written_report(tmp_path, Prices((BIG,), "spot"))
    assert spot.costs.usd == pytest.approx(240 / 3600)
    own, _ = written_report(tmp_path, Prices((), usd_per_hour=3.6))
    assert own.costs.usd == pytest.approx(0.24)
    unknown, found = written_report(tmp_path, Prices(()))
    assert (unknown.costs.usd, unknown.usd_per_1000) == (None, None)
    assert "unknown" in found.markdown
    assert "No cost: the hardware table has no on-demand price of NVIDIA Big; use" in found.html
    assert "$" not in found.markdown
    assert json.loads(found.json)["runs"][0]["no_cost"] == unknown.costs.no_cost


def test_savings_are_estimated_from_operations(tmp_path: Path) -> None:
    summary, found = written_report(a_run(tmp_path))
    saved = summary.costs.saved_seconds
    assert saved is not None
    assert 0 < saved.low < saved.mid < saved.high
    # Busy stages but decoding of images: 0.1 s each, 4 of them; prefill would be 3.9 times as long.
    prefill = summary.flops["prefill"]
    projected = summary.flops["compress"]
    busy = 0.1 * summary.stats.by_status["ok"]
    more = busy * (prefill.full / prefill.kept - 1) + busy * (projected.full / projected.kept - 1)
    assert saved.low == pytest.approx(more)
    assert "an estimate from operations, not a measurement" in found.html
    whole = [answer for answer in found.markdown.splitlines() if "Compression saved" in answer]
    assert len(whole) == 1


def test_the_same_work_is_priced_on_other_hardware(tmp_path: Path) -> None:
    half = BIG.model_copy(
        update={
            "name": "half", "devices": (), "tflops": {"float32": 25, "bfloat16": 500},
            "gb_per_s": 2000,
        }
    )  # fmt: skip
    summary, _ = written_report(a_run(tmp_path), Prices((BIG, half)))
    own, other = summary.costs.what_if
    assert own.hardware == "big"
    assert own.device_hours.is_exact
    assert own.device_hours.mid == pytest.approx(150 / 3600)
    assert other.device_hours.mid == pytest.approx(2 * own.device_hours.mid)
    assert other.device_hours.low < other.device_hours.mid < other.device_hours.high
    without = {"name": "bare", "devices": (), "tflops": None, "missing": "not read"}
    with_bare, page = written_report(tmp_path, Prices((BIG, half, BIG.model_copy(update=without))))
    assert with_bare.costs.what_if == summary.costs.what_if
    assert "No comparison with bare: the hardware table has no tflops (not read); use" in page.html
    assert own.usd["on_demand"].mid == pytest.approx(own.device_hours.mid * 2)


def test_all_three_forms_have_the_same_content(tmp_path: Path) -> None:
    summary, found = written_report(a_run(tmp_path))
    first = summary.rounds[0]
    committed = f"{first.rows} of {first.planned_rows}"
    assert first.rows < first.planned_rows == 17
    for text in (committed, "it died", "retry 1", "unaccounted", "$0.13", "big", "loading"):
        assert text in found.markdown, text
        assert text in found.html, text
    missing = f"{first.planned_rows - first.rows} planned rows are not answered"
    assert missing in found.markdown
    assert missing in found.html
    assert json.loads(found.json)["runs"][0]["dead_letter_count"] == 1
    assert summary.dead_letters[0][1] == "it died"


JSON_KEYS = {
    "output", "fingerprint", "recipe", "method", "retention_requested", "versions", "started",
    "ended", "rounds", "throughput", "audit", "dead_letters", "dead_letter_count", "answered_rows",
    "device_seconds_by_use", "devices", "price", "no_cost", "usd", "usd_per_1000",
    "answering_seconds", "saved_seconds", "what_if", "left_out",
    "by_status", "empty_answers", "images", "images_shared", "visual", "newlines", "views",
    "retention", "prompt_tokens", "prompt_tokens_shared", "output_tokens", "kv_bytes", "flops",
    "stage_seconds", "input_starved_seconds", "rows_a_step", "peak_device_bytes",
    "peak_host_bytes", "energy_joules", "slowest", "largest",
}  # fmt: skip


def test_programs_find_the_same_keys_in_every_report(tmp_path: Path) -> None:
    """Whoever reads `report.json` relies on them."""
    _, found = written_report(a_run(tmp_path))
    document = json.loads(found.json)
    assert set(document) == {"version", "runs"}
    assert set(document["runs"][0]) == JSON_KEYS


def test_runs_are_compared_side_by_side(tmp_path: Path) -> None:
    first, second = a_run(tmp_path / "x" / "run"), a_run(tmp_path / "y" / "run", bad=(1, 2, 3))
    summaries = [summarise(read_totals(str(folder)), PRICES) for folder in (first, second)]
    found = report(summaries)
    assert "2 runs side by side" in found.html
    assert "x/run" in found.html
    assert "y/run" in found.html
    (line,) = [line for line in found.markdown.splitlines() if line.startswith("| errors |")]
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["1", "3"]
    assert len(json.loads(found.json)["runs"]) == 2


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    write_round(tmp_path, 0, first_plan(), lambda source, row: None)
    summary, found = written_report(tmp_path)
    assert (summary.answers, summary.costs.usd, summary.costs.saved_seconds) == (0, None, None)
    assert "0 of 17" in found.html
    assert "17 planned rows are not answered" in found.markdown


class Elements(HTMLParser):
    """What a page is made of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not str(value).startswith("#"):
                self.links.append(str(value))
            if name.startswith("on"):
                self.handlers.append(name)


def run_with_markup(folder: Path) -> Path:
    """Keys, reasons and statuses that would rather be code."""
    files = [replace(FILES[0], source=f"{EVIL}.parquet"), SourceFile("b.parquet", "fb", (3,))]
    plan = first_plan(files)
    store = write_round(
        folder, 0, plan, lambda s, row: None if s == "b.parquet" else [Status.OK], changed=measured
    )
    letter = store.names("dead")[0]
    store.replace(letter, json.dumps({"reason": f"bad row {EVIL}"}).encode())
    store.create("workers/one.json", worker_record(device=EVIL))
    return folder


def test_markup_in_rows_is_escaped(tmp_path: Path) -> None:
    _, found = written_report(run_with_markup(tmp_path))
    page = Elements(found.html)
    assert EVIL in json.loads(found.json)["runs"][0]["dead_letters"][0][1]
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert (page.links, page.handlers) == ([], [])
    assert "<script" not in found.markdown
    assert "<img" not in found.markdown


def test_the_page_makes_no_requests(tmp_path: Path) -> None:
    _, found = written_report(a_run(tmp_path))
    page = Elements(found.html)
    assert page.links == []
    assert "default-src 'none'" in found.html
    urls = set(re.findall(r"https?://[^\s\"'<>)]+", found.html))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    ids = re.findall(r'\sid="([^"]+)"', found.html)
    assert len(ids) == len(set(ids)), "drawings share names"
    named = set(re.findall(r'(?:url\(#|href="#)([^")]+)', found.html))
    assert named <= set(ids)


def test_a_run_of_any_size_can_be_drawn(tmp_path: Path) -> None:
    """A million rows of a 7B take more operations than fit into 64 bits."""
    huge = BeforeAfter(3 * 10**25, 10**25)
    summary, _ = written_report(a_run(tmp_path))
    stats = replace(
        summary.stats,
        flops_full=dict.fromkeys(summary.flops, huge.full),
        flops=dict.fromkeys(summary.flops, huge.kept),
        visual_tokens_full=huge.full, visual_tokens_kept=huge.kept,
        view_tokens_full=dict.fromkeys("01", huge.full),
        view_tokens_kept=dict.fromkeys("01", huge.kept),
        kv_bytes_full=huge.full, kv_bytes=huge.kept,
        retention={f"{bucket:02d}": 10**19 for bucket in range(20)},
    )  # fmt: skip
    many = replace(summary, stats=stats)
    found = report([many])
    assert json.loads(found.json)["runs"][0]["flops"]["encode"]["full"] == 3 * 10**25
    assert "33.3%" in found.html
    assert "3e+04Z" in found.html


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("buckets", [2, 101])
def test_time_is_written_in_round_numbers(buckets: int) -> None:
    """From seconds to decades."""
    start = datetime(2026, 11, 27, 14, 23, 5, 900_000, tzinfo=UTC)
    for width in (1, 2, 16, 512, 2**14, 2**18, 2**24):
        drawn = over_time("", [(start + timedelta(0, width * n), 1, 0) for n in range(buckets)])
        below = drawn.split("matplotlib.axis_2")[0]
        labels = re.findall(r"<text [^>]*>([^<]+)</text>", below)
        assert labels, f"{buckets} of {width} s"
        assert not any("." in label for label in labels), labels


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    assert written_report(folder)[1] == written_report(folder)[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"), ("*x* _y_ `z`", r"\*x\* \_y\_ \`z\`"), ("two\nlines", "two lines"),
        ("<b>&", "&lt;b&gt;&amp;"), ("[l](u)", r"\[l\](u)"), (3, "3"),
    ],
)  # fmt: skip
def test_markdown_escapes_text(text: object, shown: str) -> None:
    assert markdown_text(text) == shown


def test_an_audit_is_reported_with_its_interval(tmp_path: Path) -> None:
    def with_audit(answer: Answer) -> Answer:
        answer = measured(answer)
        same = answer.request.row % 5 != 0
        spent = {"encode": 10**8, "prefill": 9 * 10**8}
        again = None if same else Escalation("y", 1.0 if answer.request.row else 0.5)
        audit = Audit("x", 1.0 if same else 0.25, spent, answer.stage_ns, again)
        return replace(answer, audit=audit, retention_requested=0.25 if same else 0.5)

    write_round(tmp_path, 0, first_plan(), changed=with_audit)
    Store(str(tmp_path)).create("workers/w.json", worker_record(device="NVIDIA Big", gpus=1.0))
    record = driver_record(60.0, Usage({UsageKind.USEFUL: 14.0}))
    Store(str(tmp_path)).create(record.name, record.to_bytes())
    summary, found = written_report(tmp_path)
    audit = summary.audit
    assert audit is not None
    assert (audit.audits, audit.agreed.mid) == (17, pytest.approx(13 / 17))
    assert 0.4 < audit.agreed.low < audit.agreed.mid < audit.agreed.high < 1
    assert audit.similarity == pytest.approx((13 + 4 * 0.25) / 17)
    assert audit.slowdown == pytest.approx(1.0 / 0.4)
    assert [similarity for similarity, _ in audit.least_similar] == [0.25] * 4
    assert audit.steps == (EscalationStep(0.5, 4, 2),)
    # 17 answers of 0.4 s each, and as many uncompressed ones of 1 s, all of them in 14 s.
    assert audit.share_of_time == pytest.approx(1.0 / 1.4)
    assert summary.costs.answering_seconds == pytest.approx(4.0)
    assert summary.costs.what_if[0].device_hours.mid == pytest.approx(4.0 / 3600)
    more = sum(0.1 * 17 * (1 / summary.flops[s].share - 1) for s in ("prefill", "compress"))
    assert summary.costs.saved_seconds is not None
    assert summary.costs.saved_seconds.low == pytest.approx(more * 4.0 / 6.8)
    for text in (
        "Of 17 rows", "76.5%", "2.50 times as long", "Audited rows that differ most",
        "4 that differed were answered again with more visual tokens; 2 of them now agree",
        "Audited rows that were answered again", "Audits took 71.4% of the",
    ):  # fmt: skip
        assert text in found.markdown, text
        assert text in found.html, text
    assert "of audited answers unchanged" in found.html


def small_token_map(caption: str) -> TokenMap:
    """A small image of which a few tokens were kept."""
    geometry = canvas_geometry(Canvas.from_image_size((40, 60), (1, 2), (6, 6)))
    kept = np.zeros(3 * 36, bool)
    kept[[36 + 3, 72 + 3]] = True
    image = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    return TokenMap(image, geometry, np.arange(36.0), kept, [caption, "answer: x"])


def test_rows_with_token_maps_are_in_the_page(tmp_path: Path) -> None:
    """With what they say escaped, and pictures within the page."""
    summary, without = written_report(a_run(tmp_path / "one"))
    other, _ = written_report(a_run(tmp_path / "two"))
    pictures = {
        summary.output: [
            RowImages.from_token_maps([small_token_map(EVIL)]),
            RowImages.from_token_maps([small_token_map("a#2: who?")]),
        ]
    }
    found = report([summary, other], pictures)
    page = Elements(found.html)
    assert page.tags.count("img") == 8
    assert {link.split(",")[0] for link in page.links} == {"data:image/webp;base64"}
    drawn = [Image.open(io.BytesIO(b64decode(link.split(",")[1]))) for link in page.links]
    assert {picture.format for picture in drawn} == {"WEBP"}
    assert (page.handlers, "script" in page.tags) == ([], False)
    assert "a#2: who?" in found.html
    assert found.html.count("Kept tokens of some rows") == 1
    assert "Kept tokens of some rows" not in without.html
    assert found.json == report([summary, other]).json


def test_rows_to_show_differ_in_the_audit_or_are_the_largest(tmp_path: Path) -> None:
    summary, _ = written_report(a_run(tmp_path))
    largest = [key for _, key in summary.stats.largest]
    assert summary.rows_to_show(2) == largest[:2]
    last = summary.stats.largest[-1]
    assert last[0]
    audit = AuditSummary(3, Interval(0, 0, 1), 0.1, 0.1, {}, {}, ((0.1, last[1]), (0.2, "x")), ())
    stats = replace(summary.stats, largest=(*summary.stats.largest, (0, "failed")))
    audited = replace(summary, audit=audit, stats=stats)
    found = audited.rows_to_show(99)
    assert found == [last[1], "x", *largest[:-1]]


def test_without_an_audit_quality_is_not_known(tmp_path: Path) -> None:
    assert "Its effect on the answers is unknown" in written_report(a_run(tmp_path))[1].html


def test_old_outputs_have_a_report(tmp_path: Path) -> None:
    """From before operations were counted: what is not known is left out."""
    store = write_round(tmp_path, 0, first_plan())
    store.create("workers/w.json", worker_record(model_shape=None))
    summary, found = written_report(tmp_path)
    assert (dict(summary.flops), summary.costs.what_if, summary.costs.saved_seconds) == (
        {},
        (),
        None,
    )
    assert "What if" not in found.html


def test_damaged_sizes_of_the_model_are_reported_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary, _ = written_report(a_run(tmp_path))
    assert summary.costs.what_if
    for path in (tmp_path / "workers").iterdir():
        damaged = json.loads(path.read_bytes()) | {"model_shape": {"text": 1}}
        path.write_text(json.dumps(damaged))
    summary, _ = written_report(tmp_path)
    assert (
        summary.costs.what_if,
        "a worker record holds a damaged model shape" in caplog.text,
    ) == (
        (),
        True,
    )
