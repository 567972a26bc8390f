"""What a person sees of an estimate and of a tuning: tables, and how sure they are.

`--json` has all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from gc2ray.core.config.job import Job
from gc2ray.core.format import duration, money, precise, shown
from gc2ray.core.intervals import Interval, MeanInterval
from gc2ray.estimate.device_estimate import DeviceEstimate
from gc2ray.estimate.estimate import Estimate
from gc2ray.estimate.recommendation import Measured, Tuning
from gc2ray.estimate.roofline import ROOFLINE_SHARE
from gc2ray.estimate.workload import Workload
from gc2ray.report.charts import Point, front


def print_estimate(console: Console, found: Estimate, job: Job) -> None:
    """Everything, and where it is from."""
    console.print(_input_table(found, job))
    console.print(_token_table(found))
    if any(offer.misfit is None for offer in found.offers):
        console.print(_recipe_table(found))
        console.print(_retention_table(found))
    for note in (_sure(found), *_notes(found, job), *_misfits(found)):
        console.print(f"* {note}", soft_wrap=True, markup=False, highlight=False)


def _input_table(found: Estimate, job: Job) -> Table:
    table = Table("", "", title=", ".join(job.recipe.input.uris()), show_header=False)
    table.add_row("rows", f"{found.rows:,}")
    table.add_row("prompts that can be answered", shown(found.prompts))
    for status, count in found.refused.items():
        table.add_row(f"prompts that cannot: {status}", shown(count))
    table.add_row("images to encode", shown(found.images))
    table.add_row("views of them", shown(found.views))
    table.add_row("visual tokens before compression", shown(found.visual_tokens_full))
    table.add_row("text tokens", shown(found.text_tokens))
    table.add_row("output tokens of an answer", shown(found.output_tokens, precise))
    return table


def _token_table(found: Estimate) -> Table:
    table = Table(
        "method", "retention", "visual tokens kept", "tokens a prompt", "GFLOP a prompt",
        title="tokens by retention, the recipe's first",
    )  # fmt: skip
    too_long = any(item.too_long.high for item in found.forecasts)
    if too_long:
        table.add_column("too long")
    for item in found.forecasts:
        cells = (
            item.method,
            f"{item.retention:g}",
            shown(item.visual_tokens),
            shown(item.prompt_tokens),
            shown(_gflops_each(item), precise),
        )
        table.add_row(*cells, *([shown(item.too_long)] if too_long else []))
    return table


def _gflops_each(item: Workload) -> Interval:
    prompts = max(1, item.ends[1].rows)
    low, mid, high = (sum(end.flops.values()) / prompts / 1e9 for end in item.ends)
    return Interval(low, mid, high)


def _recipe_table(found: Estimate) -> Table:
    """The recipe's own retention, with ranges."""
    own = found.forecasts[0]
    table = Table(
        "device", "workers", "time", "device time", "on demand", "spot",
        title=f"time and money, {own.method} at {own.retention:g}",
    )  # fmt: skip
    for item in found.offers:
        if item.retention == own.retention and item.misfit is None:
            table.add_row(*_cells(item))
    return table


def _cells(item: DeviceEstimate) -> Iterator[str]:
    yield item.hardware
    yield str(item.workers)
    yield shown(item.hours, duration) if item.hours else ""
    yield duration(item.device_hours.mid) if item.device_hours else ""
    for kind in ("on_demand", "spot"):
        usd = (item.usd or {}).get(kind)
        yield shown(usd, money) if usd else ""


def _retention_table(found: Estimate) -> Table:
    """Best guesses, retentions side by side."""
    own = found.forecasts[0].retention
    retentions = sorted({offer.retention for offer in found.offers}, reverse=True)
    heads = [f"{kept:g}{' (recipe)' if kept == own else ''}" for kept in retentions]
    table = Table("device", *heads, title="by retention: time of one device, on-demand price")
    for device in dict.fromkeys(offer.hardware for offer in found.offers):
        offers = {o.retention: o for o in found.offers if o.hardware == device}
        if any(offer.misfit is None for offer in offers.values()):
            table.add_row(device, *(_guess(offers.get(kept)) for kept in retentions))
    return table


def _guess(item: DeviceEstimate | None) -> str:
    if item is None or item.device_hours is None:
        return "does not fit"
    usd = (item.usd or {}).get("on_demand")
    return ", ".join([duration(item.device_hours.mid), *([money(usd.mid)] if usd else [])])


def _sure(found: Estimate) -> str:
    if found.looked == found.rows:
        return (
            "Every image header and prompt was read: tokens before compression are exact, but for "
            "images that are damaged behind their header."
        )
    return (
        f"{found.looked:,} of {found.rows:,} rows were looked at; ranges hold with 95 % "
        "confidence. --all reads every image header, and for that the whole image column."
    )


def _notes(found: Estimate, job: Job) -> Iterator[str]:
    yield (
        "Tokens after compression lie between their bounds, whatever the scores; a prompt also has "
        "its text and the newlines."
    )
    yield f"Output tokens: {found.output_basis}."
    fits = [item for item in found.offers if item.misfit is None]
    yield from _audit_note(found, job)
    for device in dict.fromkeys(item.hardware for item in fits if item.basis == "run"):
        yield f"{device}: at the pace of an earlier run."
    if any(item.basis == "roofline" for item in fits):
        low, mid, high = ROOFLINE_SHARE.low, ROOFLINE_SHARE.mid, ROOFLINE_SHARE.high
        yield (
            f"Other devices: {low:.0%} to {high:.0%} of their roofline, best guess {mid:.0%}: an "
            "assumption; --like OUTPUT of an earlier run on a device replaces it. Prices are "
            "those of the hardware table; --hardware FILE brings your own."
        )


def _audit_note(found: Estimate, job: Job) -> Iterator[str]:
    """What second looks add, on the device where they add most."""
    own = found.forecasts[0].retention
    shares = [
        item.audit_seconds.mid / item.device_seconds.mid
        for item in found.offers
        if item.retention == own and item.audit_seconds and item.device_seconds
        if item.device_seconds.mid
    ]
    if not job.recipe.audit.share or not shares:
        return
    anew = len(job.recipe.audit.escalate)
    text = f"{job.recipe.audit.share:.1%} of the rows are answered uncompressed, too"
    if anew:
        times = "once" if anew == 1 else f"up to {anew} times"
        text += f", and those that differ (here half of them, each time) anew, {times}"
    yield f"{text}: up to {max(shares):.1%} of the device time, which is in all figures of it."


def _misfits(found: Estimate) -> Iterator[str]:
    seen: dict[tuple[str, str], list[str]] = {}
    for item in found.offers:
        if item.misfit is not None:
            seen.setdefault((item.hardware, item.misfit), []).append(f"{item.retention:g}")
    for (hardware, why), retentions in seen.items():
        yield f"{hardware} does not do at {', '.join(retentions)}: {why}"


def print_tuning(console: Console, found: Tuning) -> None:
    """All settings, and the verdict."""
    columns: dict[str, Callable[[Measured], str]] = {
        "setting": lambda item: item.setting.name,
        "visual tokens": lambda item: precise(item.visual_tokens),
        "ms a row": lambda item: precise(1e3 * item.seconds_per_row),
        "speed-up": lambda item: _speed_up(item.speed_up),
        "agreement": lambda item: str(item.agreement),
        "accuracy": lambda item: str(item.accuracy or ""),
        "all rows": lambda item: "" if item.usd is None else money(item.usd),
        "meets it": _marks,
    }
    shown = {name: [text(item) for item in found.measured] for name, text in columns.items()}
    shown = {name: texts for name, texts in shown.items() if any(texts)}
    table = Table(*shown)
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    console.print(table)
    console.print(
        "meets it: the target, with 90 % confidence; front: no other setting is faster and better",
        soft_wrap=True,
        highlight=False,
    )
    console.print(found.verdict, soft_wrap=True, markup=False, highlight=False)


def drawing(found: Tuning) -> str:
    """The Pareto front, as SVG."""
    points = [
        Point(
            name=item.setting.name,
            milliseconds=1e3 * item.seconds_per_row,
            quality=item.quality.mean,
            low=item.quality.low,
            high=item.quality.high,
            on_front=item.on_front,
        )
        for item in found.measured
    ]
    return front("Quality against time", points)


def _speed_up(found: MeanInterval) -> str:
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _marks(item: Measured) -> str:
    return " ".join((["yes"] if item.meets else []) + (["front"] if item.on_front else []))
