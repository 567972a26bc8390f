"""Write files for people: the report of runs, their dataset cards, a single picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gc2ray.core.arguments import check_count
from gc2ray.core.errors import ConfigError
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
        prices: Prices of device time.
        to: Directory or URL; None: `report/` in the first output.
        show: How many rows are drawn, those whose audit differs most first.
        rows: Rows that are drawn besides, by their `row_key`.
        card: Whether outputs get a dataset card.

    Raises:
        ConfigError: `show` is out of range.
    """

    prices: Prices
    to: str | None = None
    show: int = 0
    rows: tuple[str, ...] = ()
    card: bool = True

    def __post_init__(self) -> None:
        check_count("show", self.show, 0)


@dataclass(frozen=True)
class WrittenReport:
    """The files that were written.

    Attributes:
        to: Directory or URL of the report.
        files: The report: page, text and JSON.
        cards: Dataset cards, one in each output.
        foreign_cards: Cards that somebody else wrote, which stay as they are.
    """

    to: str
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
        ConfigError: There is no run, no such row, or `to` lies inside an output.
        OSError: A storage does not answer.
    """
    store = Store(request.to or _own_report(outputs[0]))
    _check_destination(store, outputs)
    totals = [read_totals(output, progress) for output in outputs]
    summaries = [summarise(each, request.prices) for each in totals]
    row_images = {summary.output: _row_images(summary, request) for summary in summaries}
    written = report(summaries, row_images)
    for form, text in zip(FORMS, (written.html, written.markdown, written.json), strict=True):
        store.replace(f"report.{form}", text.encode())
    store.tidy()
    cards: dict[bool, list[str]] = {True: [], False: []}
    for output, summary in zip(outputs, summaries, strict=True) if request.card else ():
        is_ours = write_card(Store(output), summary)
        cards[is_ours].append(f"{output.rstrip('/')}/{CARD_NAME}")
    to = store.uri.rstrip("/")
    files = tuple(f"{to}/report.{form}" for form in FORMS)
    return WrittenReport(to, files, tuple(cards[True]), tuple(cards[False]))


def check_file(name: str, path: str | Path | None) -> None:
    """Refuse a file that could not be written, before its content takes hours.

    Args:
        name: Argument that names it.
        path: The file; None: there is none to write.

    Raises:
        ConfigError: Its directory does not exist, or it is a directory itself.
    """
    if path is None:
        return
    if not str(path) or Path(path).is_dir() or not Path(path).parent.is_dir():
        raise ConfigError(
            f"{name}: {str(path)!r} cannot be written: name a file of a directory that exists"
        )


def write_file(path: Path, content: bytes) -> None:
    """Write a file of this machine.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _own_report(output: str) -> str:
    """The directory of an output for reports."""
    return f"{output.rstrip('/')}/report"


def _check_destination(store: Store, outputs: Sequence[str]) -> None:
    """Refuse a directory among an output's own, where `report/` is the only one for reports.

    Raises:
        ConfigError: Names the output.
    """
    for output in outputs:
        if Store(output).holds(store) and not Store(_own_report(output)).holds(store):
            raise ConfigError(
                f"--to: {store.uri} lies inside {output}; choose a directory outside it, or none "
                "for its report/"
            )


def _row_images(summary: Summary, request: ReportRequest) -> list[RowImages]:
    """Drawings of an output's rows; the model is loaded only where there are any."""
    keys = list(dict.fromkeys([*request.rows, *summary.rows_to_show(request.show)]))
    if not keys:
        return []
    from gc2ray.reporting.show import map_tokens

    return [RowImages.from_token_maps(each) for each in map_tokens(summary.output, keys)]
