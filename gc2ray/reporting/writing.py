"""Write the report of runs, and their dataset cards, to where they belong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gc2ray.data.store import Store
from gc2ray.estimation.hardware import Prices
from gc2ray.output.totals import read_totals
from gc2ray.reporting.dataset_card import CARD_NAME, write_card
from gc2ray.reporting.page import RowImages, report
from gc2ray.reporting.summary import Summary, summarise

FORMS = ("html", "md", "json")


@dataclass(frozen=True)
class ReportRequest:
    """What a report shows, and where it goes.

    Attributes:
        place: Directory or URL.
        prices: Prices of device time.
        show: How many rows are drawn, those whose audit differs most first.
        rows: Rows that are drawn besides, by their `row_key`.
        card: Whether outputs get a dataset card.
    """

    place: str
    prices: Prices
    show: int
    rows: tuple[str, ...]
    card: bool


@dataclass(frozen=True)
class WrittenReport:
    """The files that were written.

    Attributes:
        place: Directory or URL of the report.
        files: The report: page, text and JSON.
        cards: Dataset cards, one in each output.
        foreign_cards: Cards that somebody else wrote, which stay as they are.
    """

    place: str
    files: tuple[str, ...]
    cards: tuple[str, ...]
    foreign_cards: tuple[str, ...]


def write_report(
    outputs: Sequence[str], request: ReportRequest, progress: Callable[[int], None]
) -> WrittenReport:
    """Write one report of one or several runs, and a card into each.

    Args:
        outputs: Outputs of the runs, the first one first.
        request: What is shown, and where.
        progress: Called with the number of parts that were read.

    Raises:
        ConfigError: There is no run, or no such row.
        OSError: A storage does not answer.
    """
    totals = [read_totals(output, progress) for output in outputs]
    summaries = [summarise(each, request.prices) for each in totals]
    row_images = {summary.output: _row_images(summary, request) for summary in summaries}
    written = report(summaries, row_images)
    store = Store(request.place)
    for form, text in zip(FORMS, (written.html, written.markdown, written.json), strict=True):
        store.replace(f"report.{form}", text.encode())
    store.tidy()
    cards: dict[bool, list[str]] = {True: [], False: []}
    for output, summary in zip(outputs, summaries, strict=True) if request.card else ():
        is_ours = write_card(Store(output), summary)
        cards[is_ours].append(f"{output.rstrip('/')}/{CARD_NAME}")
    files = tuple(f"{store.uri}/report.{form}" for form in FORMS)
    return WrittenReport(store.uri, files, tuple(cards[True]), tuple(cards[False]))


def _row_images(summary: Summary, request: ReportRequest) -> list[RowImages]:
    """Drawings of an output's rows; the model is loaded only where there are any."""
    keys = list(dict.fromkeys([*request.rows, *summary.rows_to_show(request.show)]))
    if not keys:
        return []
    from gc2ray.reporting.show import map_tokens

    return [RowImages.from_token_map(each) for each in map_tokens(summary.output, keys)]
