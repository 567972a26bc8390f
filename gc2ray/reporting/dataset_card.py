"""The dataset card of an output: `README.md` in Hugging Face form, to be pushed as it is.

It names the model, the method and the cost, with the figures of the report. The publisher adds
licence, language and name; of paths on a disk, only the last part is shown. A card that somebody
has changed is theirs: gc2ray recognises its own by a marker and leaves any other alone.

Not covered: how good the answers are.
"""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from gc2ray.core.format import money, precise, seconds_text
from gc2ray.core.version import __version__
from gc2ray.data.store import Store
from gc2ray.reporting.page import KWH_JOULES, templates
from gc2ray.reporting.summary import Summary

CARD_NAME = "README.md"
MARKER = "<!-- written by `gc2ray report`; remove this line to keep your own changes -->"
SIZES = (
    (10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"),
)  # fmt: skip
"""Hugging Face's size classes, each with its upper bound."""


def write_card(store: Store, summary: Summary) -> bool:
    """Write the card of an output into it; return False if a card of the user's own is there.

    Args:
        store: The output.
        summary: Summary of the output.
    """
    present = store.read(CARD_NAME)
    if present is not None and MARKER.encode() not in present:
        return False
    store.replace(CARD_NAME, card(summary).encode())
    return True


def card(summary: Summary) -> str:
    """The text of a card."""
    recipe = {name: part for name, part in summary.recipe.items() if name != "input"}
    recipe["model"] = {**recipe["model"], "path": _public(recipe["model"]["path"])}
    share = summary.visual.share
    return (
        templates()
        .get_template("card.md.j2")
        .render(
            head=yaml.safe_dump(_head(summary), sort_keys=False),
            marker=MARKER,
            name=summary.output.rstrip("/").split("/")[-1],
            version=__version__,
            answers=summary.answers,
            errors=summary.errors,
            kept=f"{1.0 if share is None else share:.1%}",
            facts=list(_facts(summary)),
            statuses=sorted(summary.stats.by_status.items(), key=lambda item: -item[1]),
            retries=len(summary.rounds) > 1,
            costs=list(_costs(summary)),
            recipe=yaml.safe_dump(recipe, sort_keys=False).strip().replace("```", "~~~"),
        )
    )


def _public(path: str) -> str:
    """A hub id or URL, or the last part of a path on a disk."""
    return path.rstrip("/").split("/")[-1] if path.startswith(("/", "~", ".")) else path


def _head(summary: Summary) -> dict[str, object]:
    """Metadata that the hub reads."""
    first = summary.rounds[0]
    answers = sum(first.by_status.values())
    size = next((name for below, name in SIZES if answers < below), "10B<n<100B")
    return {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            }
        ],
        "task_categories": ["visual-question-answering", "image-to-text"],
        "size_categories": [size],
        "tags": ["gc2ray", "synthetic"],
    }


def _facts(summary: Summary) -> Iterator[tuple[str, str]]:
    model, first = summary.recipe["model"], summary.rounds[0]
    revision = f" at {model['revision']}" if model["revision"] else ""
    yield "model", f"{_public(model['path'])}{revision}, {model['dtype']}"
    yield "compression", f"{summary.method}, retention {summary.retention_requested:g}"
    yield "visual tokens", f"{summary.visual.full:,} before, {summary.visual.kept:,} after"
    if summary.audit is not None:
        agreed = f"{summary.audit.agreed.mid:.1%} of {summary.audit.audits:,}"
        yield "same answer uncompressed", f"{agreed} audited answers"
        again = sum(step.rows for step in summary.audit.steps)
        if again:
            yield "answered again at a higher retention", f"{again:,} of those that differed"
    yield "rows answered", f"{first.rows:,} of {first.planned_rows:,}"
    if summary.started is not None:
        yield "started", f"{summary.started:%Y-%m-%d %H:%M} UTC"
    yield "recipe fingerprint", summary.fingerprint


def _costs(summary: Summary) -> Iterator[tuple[str, str]]:
    costs = summary.costs
    if costs.device_seconds:
        total = seconds_text(costs.device_seconds)
        useful = seconds_text(costs.useful_seconds)
        yield "device time", f"{total}, {useful} of it useful"
    if costs.devices:
        yield "workers", ", ".join(f"{item.workers} x {item.device}" for item in costs.devices)
    if costs.usd is not None:
        yield f"price ({costs.price})", money(costs.usd)
    if summary.energy_joules:
        yield "energy of the devices", f"{precise(summary.energy_joules / KWH_JOULES)} kWh"
