"""What gc2ray does with the output of a run: follow it, check it, complete it, report on it.

Functions import late and raise errors as those of `gc2ray.api.jobs`; so do the examples assume.
`gc2ray.read_answers` comes from another module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gc2ray.core.arguments import PriceKind, as_tuple
from gc2ray.core.config.locations import Location, as_location, as_locations

if TYPE_CHECKING:
    from gc2ray.output.compact import Dataset
    from gc2ray.output.planner import RunStatus
    from gc2ray.output.retry import Retried
    from gc2ray.output.verify import Verdict
    from gc2ray.reporting.evaluation import Evaluation
    from gc2ray.reporting.writing import WrittenReport
    from gc2ray.runner.messages import Display


def status(output: Location) -> RunStatus:
    """Read how far a run is, from its output alone.

    Example:
        >>> gc2ray.status("out").outcome.is_complete
        True
    """
    from gc2ray.output.planner import read_status

    return read_status(as_location("OUTPUT", output))


def verify(output: Location, *, deep: bool = False) -> Verdict:
    """Check that an output holds every planned row exactly once; `problems` says what is wrong.

    Args:
        output: Output of a run.
        deep: Read every answer, and not only the footers of files.

    Example:
        >>> gc2ray.verify("out", deep=True).problems
        ()
    """
    from gc2ray.output.verify import verify as check_output

    return check_output(as_location("OUTPUT", output), deep=deep)


def retry(
    output: Location,
    *overrides: str,
    statuses: str | Sequence[str] = (),
    address: str | None = None,
    display: Display | None = None,
) -> Retried:
    """Answer the rows that failed again, as a new round of the output; raises what `run` does.

    Args:
        output: Output of a run that is complete but for its failures.
        overrides: Settings of the cluster, as `"cluster.max_bad_rows=1"`.
        statuses: Only rows with these statuses, or `"dead"` ones; none: all that failed.
        address: As for `run`.
        display: As for `run`.

    Example:
        >>> gc2ray.retry("out").retry_round is None  # nothing failed
        True
    """
    from gc2ray.core.config.job import load_cluster
    from gc2ray.runner.run import retry_output

    where, cluster = as_location("OUTPUT", output), load_cluster(overrides)
    return retry_output(where, cluster, as_tuple(statuses), address, display)


def compact(
    output: Location,
    destination: Location,
    *,
    file_bytes: int = 512 << 20,
    incomplete: bool = False,
) -> Dataset:
    """Write the latest answers as a dataset of a few large Parquet files, in input order.

    Args:
        output: Output of a run.
        destination: Directory or URL of the dataset; empty, or not there yet.
        file_bytes: Size of its files.
        incomplete: Accept an output where rows are not answered yet.

    Example:
        >>> [file.name for file in gc2ray.compact("out", "dataset").files]
        ['part-00000.parquet']
    """
    from gc2ray.output.compact import compact as write

    where, to = as_location("OUTPUT", output), as_location("DESTINATION", destination)
    return write(where, to, file_bytes=file_bytes, incomplete=incomplete)


def report(  # noqa: PLR0913 - settings, given by name
    *outputs: Location,
    to: Location | None = None,
    price: str = PriceKind.ON_DEMAND,
    usd_per_hour: float | None = None,
    hardware: str | Path | None = None,
    show: int = 0,
    rows: str | Sequence[str] = (),
    card: bool = True,
    progress: Callable[[int], None] | None = None,
) -> WrittenReport:
    """Write a report of runs as a page, a text and JSON; returns the names of the files.

    Args:
        outputs: Outputs of one run or several.
        to: Directory or URL for the report; None: `report/` in the first output.
        price: `"on_demand"` or `"spot"` prices of the hardware table.
        usd_per_hour: Price of one device, in place of the table's.
        hardware: As for `estimate`.
        show: Draw the kept tokens of so many rows; loads the model and reads their images.
        rows: Rows to draw, by their `row_key`.
        card: Also write a dataset card, `README.md`, into each output.
        progress: Called with the number of parts that were read.

    Example:
        >>> gc2ray.report("out", card=False).files[0].endswith("out/report/report.html")
        True
    """
    from gc2ray.estimation.hardware import Prices, load_hardware
    from gc2ray.reporting.writing import ReportRequest, write_report

    prices = Prices(load_hardware(hardware), price, usd_per_hour)
    where = None if to is None else as_location("--to", to)
    request = ReportRequest(prices, where, show, as_tuple(rows), card=card)
    return write_report(as_locations("OUTPUT", outputs), request, progress or (lambda _: None))


def show(output: Location, row_key: str, to: str | Path | None = None) -> Path:
    """Draw the visual tokens that were kept of a row's image; returns the file's path.

    Args:
        output: Output of a run.
        row_key: The row, as the column `row_key` names it.
        to: PNG to write; None: named for output and row, in the working directory.

    Example:
        >>> gc2ray.show("out", "in.parquet#0", "tokens.png").name
        'tokens.png'
    """
    from gc2ray.reporting.heat_map import heat_map
    from gc2ray.reporting.show import image_name, map_tokens
    from gc2ray.reporting.writing import write_file

    where = as_location("OUTPUT", output)
    path = Path(to or image_name(where, row_key))
    write_file(path, heat_map(next(map_tokens(where, [row_key]))))
    return path


def evaluate(
    *outputs: Location,
    reference: str,
    metrics: str | Sequence[str] = (),
    by: str | None = None,
    lists: str | None = None,
) -> Evaluation:
    """Score the latest answers of runs against a column of right answers, with 95% intervals.

    Args:
        outputs: Outputs of one run or several; the first is compared with each other one.
        reference: Column with the right answer or a list of them, which `recipe.input.keep` names.
        metrics: Some of `exact_match`, `vqa_accuracy`, `contains`, `anls`, `yes_no`; none: all.
        by: Column to group answers by.
        lists: What a list of references is where rows have several prompts: `"any"`: each entry is
            right for every prompt; `"each"`: one entry for each prompt.

    Example:
        >>> evaluation = gc2ray.evaluate("out", reference="reference", metrics=["exact_match"])
        >>> evaluation.runs[0].scores["all"]["exact_match"].rows
        6
    """
    from gc2ray.reporting.evaluation import EvaluateRequest, evaluate_runs

    request = EvaluateRequest(reference, as_tuple(metrics), by, lists)
    return evaluate_runs(as_locations("OUTPUT", outputs), request)
