"""`Progress`: what a worker has done so far, as it tells the driver; `Tally` is where it counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from gc2ray.core.errors import Status
from gc2ray.core.records import Answer
from gc2ray.output.planner import FIRST_ERRORS


@dataclass(frozen=True)
class Progress:
    """What a worker has done so far; counters only grow.

    Attributes:
        ticks: Grows while the worker gets on with loading.
        rows: Rows whose first prompt is answered, committed or not: every row has exactly one.
        answers: Answers, one for each prompt.
        bad_answers: Those of them that failed.
        visual_tokens_full: Of their images, before compression.
        visual_tokens_kept: Of their images, after it.
        errors: The first few errors, as `row_key: status: message`.
    """

    ticks: int = 0
    rows: int = 0
    answers: int = 0
    bad_answers: int = 0
    visual_tokens_full: int = 0
    visual_tokens_kept: int = 0
    errors: tuple[str, ...] = ()

    def gone_on(self, before: Progress, after: Progress) -> Progress:
        """Of several workers: this, and what one of them did from `before` to `after`."""
        return Progress(
            ticks=self.ticks + after.ticks - before.ticks,
            rows=self.rows + after.rows - before.rows,
            answers=self.answers + after.answers - before.answers,
            bad_answers=self.bad_answers + after.bad_answers - before.bad_answers,
            visual_tokens_full=(
                self.visual_tokens_full + after.visual_tokens_full - before.visual_tokens_full
            ),
            visual_tokens_kept=(
                self.visual_tokens_kept + after.visual_tokens_kept - before.visual_tokens_kept
            ),
            errors=(self.errors + after.errors[len(before.errors) :])[:FIRST_ERRORS],
        )


@dataclass(eq=False)
class Tally:
    """The counters of a `Progress`, while they grow; on one thread."""

    rows: int = 0
    answers: int = 0
    bad_answers: int = 0
    visual_tokens_full: int = 0
    visual_tokens_kept: int = 0
    errors: list[str] = field(default_factory=list)

    def count(self, answer: Answer) -> None:
        """One more answer."""
        request = answer.request
        self.rows += request.prompt_index == 0
        self.answers += 1
        self.bad_answers += answer.status != Status.OK
        self.visual_tokens_full += answer.visual_tokens_full or 0
        self.visual_tokens_kept += answer.visual_tokens_kept or 0
        if answer.error is not None and len(self.errors) < FIRST_ERRORS:
            self.errors.append(f"{request.row_key}: {answer.status}: {answer.error}")

    def progress(self, ticks: int) -> Progress:
        """As it stands; callable from any thread."""
        return Progress(
            ticks,
            self.rows,
            self.answers,
            self.bad_answers,
            self.visual_tokens_full,
            self.visual_tokens_kept,
            tuple(self.errors),
        )
