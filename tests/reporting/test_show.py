"""What was kept of an image, drawn: the right tokens at the right places, for any row."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.geometry import Geometry, ViewGrid, canvas_geometry
from gc2ray.compression.methods.globalcom2 import GlobalCom2
from gc2ray.core.config.job import Job
from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.shards import Span
from gc2ray.data.source import Source
from gc2ray.data.store import Store
from gc2ray.output.parts import read_part
from gc2ray.output.plan import Plan
from gc2ray.output.planner import store_plan
from gc2ray.output.run_directory import open_round
from gc2ray.reporting.heat_map import TokenMap, heat_map, panels
from gc2ray.reporting.show import answer_lines, image_name, map_tokens
from gc2ray.runner.messages import ShardAssignment
from gc2ray.runner.worker import Worker
from tests.support.commands import run_command
from tests.support.outputs import retry_of, write_round
from tests.support.rows import SIZES, encoded, make_job, picture
from tests.support.views import canvas_of, random_views


def mask(packed: bytes) -> np.ndarray:
    return np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*SIZES, (10, 900), (900, 10)]),
    st.sampled_from([(2, 2), (1, 3), (3, 1)]),
    st.integers(0, 99),
)
def test_tokens_are_drawn_where_they_are(
    size: tuple[int, int], grid: tuple[int, int], seed: int
) -> None:
    """Place by place: canvas row and column of every kept token of every crop."""
    views = random_views(size, grid, 6, seed)
    selection = GlobalCom2(0.3).many([views])[0]
    canvas, kept = canvas_of(views), np.zeros(views.geometry.tokens, bool)
    for view, packed in enumerate(selection.bitmaps(views.geometry)):
        kept[36 * view : 36 * view + 36] = mask(packed)[:36]
    token_map = TokenMap(np.zeros((8, 8, 3), np.uint8), views.geometry, np.zeros(36), kept, [])
    expected = np.zeros((canvas.height, canvas.width), bool)
    for source in selection.entries.tolist():
        if source >= 36:
            crop, token = divmod(source - 36, 36)
            row = crop // grid[1] * 6 + token // 6 - canvas.rows[0]
            column = crop % grid[1] * 6 + token % 6 - canvas.columns[0]
            expected[row, column] = True
    assert (token_map.covered() == expected).all()
    assert token_map.kept_per_view == list(selection.kept_per_view(views.geometry))


@pytest.mark.parametrize("size", [(40, 60), (3, 400), (400, 3)])
def test_a_picture_is_drawn_of_any_shape(size: tuple[int, int]) -> None:
    geometry = canvas_geometry(Canvas.from_image_size(size, (1, 2), (6, 6)))
    kept = np.zeros(3 * 36, bool)
    image = np.full((*size, 3), 200, np.uint8)
    token_map = TokenMap(
        image, geometry, np.arange(36.0), kept, ["$x_1$ <b>", "an\x05 answer 错 " * 40]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of letters that no font has
        drawn = Image.open(io.BytesIO(heat_map([token_map])))
    assert drawn.format == "PNG"
    assert drawn.width > 1000
    assert heat_map([token_map]) == heat_map([token_map])
    alone = list(panels(token_map))
    assert list(panels(token_map)) == alone
    titles = [
        "image",
        "the thumbnail's scores",
        "tokens kept in each crop",
        "tokens kept in the crops",
    ]
    for panel, title in zip(alone, titles, strict=True):
        assert panel.title.startswith(title)
        drawn = Image.open(io.BytesIO(panel.webp))
        assert (drawn.format, drawn.width) == ("WEBP", 600)


@pytest.fixture
def answered(request: pytest.FixtureRequest, tmp_path: Path, tiny_paths: dict[str, Path]) -> Job:
    """A run of three rows in one shard, one of them broken, and a shard that is not answered.

    Its parameter: retentions at which audits answer again.
    """
    images = [encoded(picture((100, 200), 1)), b"no image", encoded(picture((168, 168), 2))]
    images += [images[0]] * 3
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": i, "path": None} for i in images], kind)})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "odd#1.parquet")
    output = tmp_path / "out"
    audit = {"audit__share": 1.0, "audit__escalate": getattr(request, "param", [])}
    job = make_job(tiny_paths["vicuna"], tmp_path / "in", output, **audit).located()
    files, kept_columns = Source(job.recipe.input).scan()
    plan = store_plan(Store(job.output), job, Plan.cut(job.recipe, files, 3, kept_columns))
    worker = Worker(job, kept_columns)
    worker.load()
    worker.process(ShardAssignment(plan.shards[0]))
    return job


@pytest.mark.parametrize("answered", [[], [0.8]], indirect=True, ids=["first", "again"])
def test_token_maps_equal_those_of_the_run(answered: Job) -> None:
    """The same tokens as when it was answered, or answered again: the mask in the output."""
    store = Store(answered.output)
    rows = read_part(store, store.names("data")[0]).to_pylist()
    unanswered = "odd#1.parquet#3"
    *found, (other,) = map_tokens(
        answered.output, [rows[0]["row_key"], rows[2]["row_key"], unanswered]
    )
    for row, (token_map,) in zip((rows[0], rows[2]), found, strict=True):
        assert [mask(view)[:36].tolist() for view in row["kept_mask"]] == (
            token_map.kept.astype(int).reshape(-1, 36).tolist()
        )
        reported = "\n".join(token_map.captions)
        assert row["row_key"] in reported
        again = answered.recipe.audit.escalate
        assert row["retention_requested"] == (again[0] if again else 0.25)
        head = f"again at retention {again[0]:g}" if again else "answer"
        assert f"{head}: {row['answer']}" in reported
        assert f"uncompressed: {row['audit']['answer']}" in reported
        assert f"{row['visual_tokens_kept']} of {row['visual_tokens_full']}" in reported
    assert other.captions[0].startswith(f"{unanswered}: ")
    assert "not answered yet" in other.captions
    assert other.image.shape == (100, 200, 3)


def test_the_latest_answer_is_reported(answered: Job) -> None:
    """A retry answers a row that had no answer, and fails at one that had a good one."""
    first = open_round(answered.output, 0)
    assert first is not None
    ((source, fingerprint),) = first.plan.shards.files
    outcomes = {2: Status.FAILED, 3: Status.OK}
    write_round(
        answered.output,
        1,
        retry_of([Span(source, fingerprint, row, row + 1) for row in outcomes], 1),
        lambda _, row: [outcomes[row]],
    )
    (good,), (late,) = map_tokens(answered.output, ["odd#1.parquet#2", "odd#1.parquet#3"])
    assert "answer: odd#1.parquet 3 0 of 1" in late.captions
    assert not any("bad in 1" in line for line in good.captions)


ESCALATED = {
    "first_answer": "a dog",
    "similarity": 0.25,
    "final_similarity": 1.0,
    "answer": "a cat",
}


@pytest.mark.parametrize(
    ("status", "audit", "lines"),
    [
        ("ok", None, ["answer: a cat"]),
        ("failed", None, ["answer: none (failed: broken)"]),
        (
            "ok",
            ESCALATED,
            [
                "answer: a dog (similarity 0.250)",
                "again at retention 0.5: a cat (similarity 1.000)",
                "uncompressed: a cat",
            ],
        ),
        (
            "ok",
            {**ESCALATED, "final_similarity": None, "similarity": None, "answer": None},
            ["answer: a cat", "uncompressed: none"],
        ),
        (
            "ok",
            {"similarity": 1.0, "answer": ""},
            ["answer: a cat (similarity 1.000)", "uncompressed: "],
        ),
    ],
)
def test_an_answer_is_reported_with_its_audit(
    status: str, audit: dict[str, object] | None, lines: list[str]
) -> None:
    """The last one is from before rows were answered again."""
    row = {"status": status, "answer": "a cat", "error": "broken", "retention_requested": 0.5}
    assert list(answer_lines({**row, "audit": audit})) == lines
    assert list(answer_lines(None)) == ["not answered yet"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("odd#1.parquet#1", r"odd#1.parquet#1: not an image of a known format"),
        ("odd#1.parquet#7", "no row 'odd#1.parquet#7' in the plan"),
        ("other.parquet#0", "no row 'other.parquet#0' in the plan"),
        ("odd#1.parquet", "no row"),
        (f"odd#1.parquet#{'9' * 5000}", "no row"),
        ("odd#1.parquet#0#2", "the row has no such prompt"),
    ],
)
def test_rows_that_cannot_be_shown_are_refused_with_a_reason(
    answered: Job, key: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        next(map_tokens(answered.output, [key]))


def test_the_command_writes_a_picture(answered: Job, tmp_path: Path) -> None:
    file = tmp_path / "row.png"
    result = run_command("show", answered.output, "odd#1.parquet#0", "--to", file)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(file)
    assert Image.open(file).format == "PNG"
    refused = run_command("show", tmp_path / "nowhere", "a#0")
    assert refused.exit_code == 2
    assert "there is no run here" in refused.stderr


def test_the_report_shows_rows(answered: Job, tmp_path: Path) -> None:
    """Two of its own choice, and one that was asked for."""
    words = ["--show", "2", "--row", "odd#1.parquet#3", "--to", tmp_path / "report"]
    result = run_command("report", answered.output, *words)
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<img ") == 3 * 4
    assert "not answered yet" in page
    plain = run_command("report", answered.output)
    assert "<img " not in (Path(answered.output) / "report" / "report.html").read_text()
    assert "Loading weights" not in plain.stderr
    refused = run_command("report", answered.output, "--row", "other#0")
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)
    assert "no row 'other#0' in the plan" in refused.stderr


def test_a_picture_is_named_for_its_row() -> None:
    assert image_name("s3://b/run-7/", "a/b c.parquet#3") == "run-7-a_b_c.parquet_3.png"


def test_an_image_that_is_one_view_is_drawn_without_crops() -> None:
    geometry = Geometry.from_entries([ViewGrid.whole(6, 6)], None, range(36))
    image, kept = np.full((60, 60, 3), 200, np.uint8), np.arange(36) < 9
    titles = [panel.title for panel in panels(TokenMap(image, geometry, np.arange(36.0), kept, []))]
    assert titles[1].startswith("the only view's scores")
    assert titles[2:] == [
        "tokens kept of the only view: 9 of 36",
        "tokens kept in the only view: 9 of 36",
    ]
