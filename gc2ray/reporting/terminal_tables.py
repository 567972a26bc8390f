"""Prints what was estimated, measured, scored or checked: tables, and how certain figures are.

`--json` prints all figures instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gc2ray.core.arguments import PriceKind
from gc2ray.core.config.job import Job
from gc2ray.core.format import duration, interval_text, money, precise, size
from gc2ray.core.intervals import Interval, MeanInterval
from gc2ray.engine.parity.result import TOLERANCE, Parity
from gc2ray.estimation.device_estimate import DeviceEstimate
from gc2ray.estimation.estimate import Estimate
from gc2ray.estimation.recommendation import Measured, Tuning
from gc2ray.estimation.roofline import ROOFLINE_SHARE
from gc2ray.estimation.workload import Workload
from gc2ray.models.checkpoint.known_models import KnownModel, SupportedModels
from gc2ray.reporting.evaluation import ALL, Evaluation, RunScores

MOST = 0.5
"""Share of the operations from which the tower is what a run mostly pays for."""


def print_estimate(console: Console, result: Estimate, job: Job) -> None:
    """Print all tables of an estimate, and notes on where the figures come from."""
    console.print(_input_table(result, job))
    console.print(_token_table(result))
    if any(item.misfit is None for item in result.devices):
        console.print(_recipe_table(result))
        console.print(_retention_table(result))
    for note in (_sample_note(result), *_notes(result, job), *_misfits(result), *result.left_out):
        console.print(f"* {note}", soft_wrap=True, markup=False, highlight=False)


def _input_table(result: Estimate, job: Job) -> Table:
    table = Table("", "", title=escape(", ".join(job.recipe.input.uris())), show_header=False)
    table.add_row("rows", f"{result.rows:,}")
    table.add_row("prompts that can be answered", interval_text(result.prompts))
    for status, count in result.refused.items():
        table.add_row(f"prompts that cannot: {status}", interval_text(count))
    table.add_row("images to encode", interval_text(result.images))
    table.add_row("views of these images", interval_text(result.views))
    table.add_row("visual tokens before compression", interval_text(result.visual_tokens_full))
    table.add_row("text tokens", interval_text(result.text_tokens))
    table.add_row("output tokens per answer", interval_text(result.output_tokens, precise))
    return table


def _token_table(result: Estimate) -> Table:
    table = Table(
        "method", "retention", "visual tokens kept", "tokens a prompt", "GFLOP a prompt",
        title="tokens by retention, the recipe's first",
    )  # fmt: skip
    too_long = any(item.too_long.high for item in result.workloads)
    if too_long:
        table.add_column("too long")
    for item in result.workloads:
        cells = (
            escape(item.method),
            f"{item.retention:g}",
            interval_text(item.visual_tokens),
            interval_text(item.prompt_tokens),
            interval_text(_gflops_each(item), precise),
        )
        table.add_row(*cells, *([interval_text(item.too_long)] if too_long else []))
    return table


def _gflops_each(item: Workload) -> Interval:
    prompts = max(1, item.work[1].rows)
    low, mid, high = (sum(end.flops.values()) / prompts / 1e9 for end in item.work)
    return Interval(low, mid, high)


def _recipe_table(result: Estimate) -> Table:
    """The recipe's own retention, with ranges."""
    own = result.workloads[0]
    items = [d for d in result.devices if d.retention == own.retention and d.misfit is None]
    kinds = _price_kinds(result.devices)
    table = Table(
        "device", "workers", "time", "device time", *(kind.replace("_", " ") for kind in kinds),
        title=escape(f"time and cost, {own.method} at {own.retention:g}"),
    )  # fmt: skip
    for item in items:
        table.add_row(*_cells(item, kinds))
    return table


def _price_kinds(devices: Sequence[DeviceEstimate]) -> list[str]:
    """Kinds of prices that are known for any device."""
    return [kind for kind in PriceKind if any(kind in (item.usd or {}) for item in devices)]


def _cells(item: DeviceEstimate, kinds: Sequence[str]) -> Iterator[str]:
    yield escape(item.hardware)
    yield str(item.workers)
    yield interval_text(item.hours, duration) if item.hours else ""
    yield duration(item.device_hours.mid) if item.device_hours else ""
    for kind in kinds:
        usd = (item.usd or {}).get(kind)
        yield interval_text(usd, money) if usd else ""


def _retention_table(result: Estimate) -> Table:
    """Best guesses, retentions side by side."""
    own = result.workloads[0].retention
    retentions = sorted({item.retention for item in result.devices}, reverse=True)
    heads = [f"{kept:g}{' (recipe)' if kept == own else ''}" for kept in retentions]
    price = ", on-demand price" if PriceKind.ON_DEMAND in _price_kinds(result.devices) else ""
    table = Table("device", *heads, title=f"by retention: device time{price}")
    for device in dict.fromkeys(item.hardware for item in result.devices):
        by_retention = {i.retention: i for i in result.devices if i.hardware == device}
        if any(item.misfit is None for item in by_retention.values()):
            table.add_row(escape(device), *(_guess(by_retention.get(kept)) for kept in retentions))
    return table


def _guess(item: DeviceEstimate | None) -> str:
    if item is None or item.device_hours is None:
        return "does not fit"
    usd = (item.usd or {}).get(PriceKind.ON_DEMAND)
    return ", ".join([duration(item.device_hours.mid), *([money(usd.mid)] if usd else [])])


def _sample_note(result: Estimate) -> str:
    if result.sampled_rows == result.rows:
        return (
            "Every image header and prompt was read: tokens before compression are exact, except "
            "for images that are damaged behind their header."
        )
    return (
        f"{result.sampled_rows:,} of {result.rows:,} rows were sampled; ranges hold with 95 % "
        "confidence. --all reads every image header, and with it the whole image column."
    )


def _notes(result: Estimate, job: Job) -> Iterator[str]:
    yield (
        "Tokens after compression lie within these bounds whatever the images show; a prompt also "
        "has its text and the newline tokens."
    )
    yield f"Output tokens: {result.output_basis}."
    yield from _tower_note(result)
    fits = [item for item in result.devices if item.misfit is None]
    yield from _audit_note(result, job)
    for device in dict.fromkeys(item.hardware for item in fits if item.basis == "run"):
        yield f"{device}: from the rates of an earlier run."
    if any(item.basis == "roofline" for item in fits):
        low, mid, high = ROOFLINE_SHARE.low, ROOFLINE_SHARE.mid, ROOFLINE_SHARE.high
        yield (
            f"A device without an earlier run is assumed to reach {low:.0%} to {high:.0%} of its "
            f"roofline, best guess {mid:.0%}; --like OUTPUT, an earlier run, replaces this "
            "assumption."
        )
    unpriced = dict.fromkeys(item.hardware for item in fits if not item.usd)
    if unpriced:
        yield (
            f"No cost of {', '.join(unpriced)}: the hardware table has no price; use --hardware "
            "FILE with your own."
        )


def _tower_note(result: Estimate) -> Iterator[str]:
    """That selection saves little, where the tower is what images cost."""
    own = result.workloads[0]
    operations = own.work[1].flops
    share = operations["encode"] / max(1, sum(operations.values()))
    if share >= MOST:
        yield (
            f"The vision tower takes {share:.0%} of the operations at retention {own.retention:g}. "
            "Compression begins behind it, so a lower retention saves little more; fewer or "
            "smaller views would."
        )


def _audit_note(result: Estimate, job: Job) -> Iterator[str]:
    """The share of audits on the device where it is largest."""
    own = result.workloads[0].retention
    shares = [
        item.audit_seconds.mid / item.device_seconds.mid
        for item in result.devices
        if item.retention == own and item.audit_seconds and item.device_seconds
        if item.device_seconds.mid
    ]
    if not job.recipe.audit.share or not shares:
        return
    steps = len(job.recipe.audit.escalate)
    text = f"{job.recipe.audit.share:.1%} of the rows are also answered uncompressed"
    if steps:
        times = "once" if steps == 1 else f"up to {steps} times"
        text += f", and rows that differ (assumed: half of them, each time) again, {times}"
    yield f"{text}: up to {max(shares):.1%} of the device time, included in all figures."


def _misfits(result: Estimate) -> Iterator[str]:
    retentions: dict[tuple[str, str], list[str]] = {}
    for item in result.devices:
        if item.misfit is not None:
            reason = (item.hardware, item.misfit)
            retentions.setdefault(reason, []).append(f"{item.retention:g}")
    for (hardware, why), values in retentions.items():
        yield f"{hardware} does not fit retention {', '.join(values)}: {why}"


def print_tuning(console: Console, result: Tuning) -> None:
    """Print all settings, and the verdict."""
    columns: dict[str, Callable[[Measured], str]] = {
        "setting": lambda item: escape(item.setting.name),
        "tokens": lambda item: precise(item.visual_tokens),
        "ms/row": lambda item: precise(1e3 * item.seconds_per_row),
        "speed-up": lambda item: _on_two_lines(item.speed_up),
        "agreement": lambda item: _on_two_lines(item.agreement),
        "accuracy": lambda item: _on_two_lines(item.accuracy) if item.accuracy else "",
        "all rows": lambda item: "" if item.usd is None else money(item.usd),
        "target": _marks,
    }
    cells = {name: [text(item) for item in result.measured] for name, text in columns.items()}
    cells = {name: texts for name, texts in cells.items() if any(texts)}
    table = Table(padding=0, show_lines=True)
    for name in cells:  # 80 columns are enough for all; a long name of a method is folded
        table.add_column(name, no_wrap=name != "setting", overflow="fold")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    console.print(table)
    notes = [
        "tokens: visual tokens of a row; intervals hold with 95 % confidence",
        "target: met with 90 % confidence; front: no other setting is both faster and better",
        *([result.no_cost] if result.no_cost else []),
        result.verdict,
    ]
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)


def _on_two_lines(value: MeanInterval) -> str:
    return f"{value.mean:.2f}\n{value.low:.2f}-{value.high:.2f}"


def _marks(item: Measured) -> str:
    return "\n".join((["met"] if item.meets else []) + (["front"] if item.on_front else []))


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """A table for each run, and a paragraph for each comparison."""
    for run in evaluation.runs:
        console.print(_scores_table(run, evaluation.metrics))
        if run.unanswered_rows:
            console.print(
                f"{run.output}: {run.unanswered_rows:,} more rows have no answer and are "
                "not scored",
                soft_wrap=True,
                markup=False,
            )
    for compared in evaluation.comparisons:
        console.print(
            f"{compared.first} against {compared.second}: same answer on {compared.same} of "
            f"{compared.same.rows} prompts; {compared.only_first} and {compared.only_second} are "
            "in one run only",
            soft_wrap=True,
            markup=False,
        )
        for metric, difference in compared.differences.items():
            console.print(f"  {metric}: {difference}", markup=False)


def _scores_table(run: RunScores, metrics: Sequence[str]) -> Table:
    """Metrics are rows: with the intervals five of them beside each other are too wide."""
    tokens = run.visual_tokens_each
    each = "" if tokens is None else f", {tokens:.0f} visual tokens each"
    title = escape(f"{run.output}: {run.answers} answers, {run.failed} failed{each}")
    table = Table(title=title, caption="95% bootstrap intervals; failed answers score 0")
    for column in ("group", "answers", "metric", "score"):
        table.add_column(column)
    for name in sorted(run.scores, key=lambda group: (group != ALL, group)):
        scores = run.scores[name]
        for index, metric in enumerate(metric for metric in metrics if metric in scores):
            mean = scores[metric]
            table.add_row("" if index else escape(name), str(mean.rows), metric, str(mean))
        table.add_section()
    return table


def print_models(console: Console, supported: SupportedModels) -> None:
    """Print supported models, and how many are refused; or why, where only those are given."""
    if not supported.models:
        for kind, why in supported.refused.items():
            text = " yet" if kind in supported.not_yet else f": {why}"
            console.print(f"{kind} is not supported{text}", markup=False, soft_wrap=True)
        return
    console.print(_model_table(supported.models))
    console.print(_checkpoint_table(supported.models))
    console.print(
        "Decoder: gc2ray's own, or stock transformers' generate. Settings: those of the "
        "compression, measured on a demo model or not. Unverified: from memory, not looked up.",
        highlight=False,
    )
    if supported.refused:
        others = len(supported.refused) - len(supported.not_yet)
        console.print(
            f"Not supported yet: {', '.join(supported.not_yet)}. {others} other model types are "
            "refused; for the reason: gc2ray models MODEL_TYPE",
            highlight=False,
        )


def _model_table(models: Sequence[KnownModel]) -> Table:
    table = Table("model type", "models, sizes", "decoder", "default score", "settings")
    for model in models:
        name = f"{model.name}\n{', '.join(model.sizes)}"
        measured = "measured" if model.measured else "not measured"
        table.add_row(model.model_type, name, model.decoder, model.score, measured)
    for column in table.columns:
        column.no_wrap = column.header != "models, sizes"
    return table


def _checkpoint_table(models: Sequence[KnownModel]) -> Table:
    """Hub ids, short enough for one line each."""
    table = Table("typical checkpoints (unverified)", "licence (unverified)")
    table.columns[0].overflow = "fold"
    for model in models:
        for checkpoints in model.checkpoints:
            table.add_row(escape(checkpoints.pattern), checkpoints.licence)
    return table


def print_parity(console: Console, parity: Parity) -> None:
    """Print how far answers are those of stock transformers, and whether the check passed."""
    for line in parity_lines(parity):
        console.print(line, markup=False, soft_wrap=True)
    color, word = ("green", "passed") if parity.passed else ("red", "failed")
    console.print(f"[bold {color}]{word}[/]")


def parity_lines(parity: Parity) -> list[str]:
    """The result of a parity check in lines of text."""
    batches = f"batch against one by one, as configured: {parity.same_alone} of {parity.prompts} "
    batches += "answers the same" + _allowed_differences(parity)
    device = f", {size(parity.device_bytes)} of the GPU" if parity.device_bytes else ""
    return [
        *(f"left out: {line}" for line in parity.left_out),
        *(f"failed: {line}" for line in parity.failed),
        *_against_stock(parity),
        batches,
        f"peak memory: {size(parity.host_bytes)} of the host{device}",
    ]


def _allowed_differences(parity: Parity) -> str:
    """Differences between batches and single rows that are allowed."""
    if parity.dtype == "float32":
        return ""
    if parity.near_ties is None:
        return " (sampled in half precision, so only counted)"
    return f", {parity.near_ties} more but for a near tie (allowed)"


EXPANDED_HERE = (
    "  (images' placeholders were expanded by gc2ray in both: transformers' own processor of this "
    "model needs torchvision)"
)


def _against_stock(parity: Parity) -> list[str]:
    if parity.stock_error is not None:
        return [f"stock transformers cannot run the model: {parity.stock_error}"]
    stock, prompts = parity.stock, parity.stock.prompts
    if not prompts:
        return ["no prompt could be compared with stock transformers"]
    others = "; the others are not compared any further"
    rest = others if stock.same_prompts < prompts else ""
    ends = f"ends of answers: {_listed(stock.our_ends)}; stock's: {_listed(stock.stock_ends)}"
    ties = ""
    if parity.dtype != "float32":
        ties = f", {stock.near_ties} more but for a near tie (allowed)"
    return [
        f"{prompts} prompts at retention 1.0 against stock transformers:",
        f"  prompt tokens: {stock.same_prompts} of {prompts} prompts the same{rest}",
        *([] if stock.expanded_by_stock else [EXPANDED_HERE]),
        f"  {ends}",
        f"  largest logit difference: {stock.difference:.2e} of the largest logit (allowed "
        f"{TOLERANCE[parity.dtype]:.0e}){stock.where}",
        f"  greedy answers: {stock.same_tokens} of {stock.tokens} tokens the same, "
        f"{stock.same_answers} of {prompts} answers and their ends and texts{ties}",
    ]


def _listed(ends: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ends))) or "none"
