"""Rows of several images and of none: what they share, what a bad one costs, what is counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gc2ray.core.errors import Status
from gc2ray.core.records import ImageRef, Request
from gc2ray.core.schema import stats_of
from gc2ray.models.adapter import LoadedModel
from tests.support.engines import (
    WatchedAdapter,
    answers_of,
    make_engine,
    make_patient_engine,
    tokens_of,
    with_adapter,
)
from tests.support.rows import encoded, picture, request

SIZES = [(40, 300), (100, 200), (90, 90), (200, 60)]


def ref(seed: int) -> ImageRef:
    return ImageRef(encoded(picture(SIZES[seed % 4], seed)))


def rows_of(*images: tuple[ImageRef, ...], prompt: str = "What is it?") -> list[Request]:
    return [
        replace(request(), row=row, row_key=f"rows#{row}", images=of_row, prompts=(prompt,))
        for row, of_row in enumerate(images)
    ]


MIXED = [(ref(0), ref(1)), (), (ref(2),), (ref(0), ref(1), ref(3)), (ref(1), ref(0)), (ref(2),) * 2]


@pytest.mark.parametrize("retention", [0.25, 1.0])
def test_a_batch_equals_one_by_one(loaded: LoadedModel, retention: float) -> None:
    rows = rows_of(*MIXED)
    together = tokens_of(make_engine(loaded, compression__retention=retention), rows)
    alone = [
        tokens_of(make_engine(loaded, compression__retention=retention), [row])[0] for row in rows
    ]
    assert together == alone
    assert len(set(together)) > 3


def test_tokens_are_summed_over_images(loaded: LoadedModel) -> None:
    row, *singles = rows_of((ref(0), ref(1)), (ref(0),), (ref(1),))
    (answer,) = answers_of(make_engine(loaded), [row])
    parts = answers_of(make_engine(loaded), singles)
    assert answer.kept_per_view == tuple(
        part.kept_per_view[0] for part in parts if part.kept_per_view
    )
    for name in ("visual_tokens_full", "visual_tokens_kept", "newline_tokens"):
        assert getattr(answer, name) == sum(getattr(part, name) for part in parts)
    assert (answer.images_encoded, answer.images_shared) == (2, 0)
    (prompt,) = make_engine(loaded).prompts([row])
    assert answer.prompt_tokens == len(prompt)
    assert len(prompt.visual) == 2


def test_a_row_of_text_has_no_visual_tokens(loaded: LoadedModel) -> None:
    (answer,) = answers_of(make_engine(loaded), rows_of(()))
    assert answer.status is Status.OK
    assert (answer.visual_tokens_full, answer.visual_tokens_kept) == (0, 0)
    assert answer.retention_actual is None
    assert answer.kept_per_view == ()
    assert answer.demand is not None
    assert answer.demand.flops["encode"] == answer.demand.flops["compress"] == 0
    statistics = stats_of([answer])
    assert (statistics.images, statistics.retention) == (0, {})


@pytest.mark.parametrize(
    "bad",
    [ImageRef(b"no image"), ImageRef(path="/etc/passwd"), ImageRef()],
    ids=["bytes", "path", "none"],
)
def test_a_bad_image_costs_its_row_and_is_named(loaded: LoadedModel, bad: ImageRef) -> None:
    """Also where the row's other images are those of good rows."""
    rows = rows_of((ref(0), bad, ref(1)), (ref(0),), (ref(1), ref(2)))
    answers = answers_of(make_engine(loaded), rows)
    assert [answer.status for answer in answers] == [Status.BAD_IMAGE, Status.OK, Status.OK]
    assert (answers[0].error or "").startswith("image 2 of 3: ")
    wanted = tokens_of(make_engine(loaded), rows[1:])
    assert [answer.token_ids for answer in answers[1:]] == wanted


@pytest.mark.parametrize("budget", ["image", "row"])
def test_images_beside_a_bad_one_are_not_encoded_for_its_row(
    loaded: LoadedModel, budget: str
) -> None:
    """Nor counted as shared by the rows that they are encoded for."""
    rows = rows_of((ref(0), ref(1), ImageRef(b"no image")), (ref(0),), (ref(2), ref(2)))
    watched, adapter = with_adapter(loaded)
    failed, *answers = answers_of(make_engine(watched, compression__budget=budget), rows)
    assert failed.status is Status.BAD_IMAGE
    assert [(a.images_encoded, a.images_shared) for a in answers] == (
        [(1, 0), (1, 1)] if budget == "image" else [(1, 0), (2, 0)]
    )
    assert sum(adapter.batches) == sum(a.images_encoded for a in answers)
    assert all(a.demand is not None and a.demand.flops["encode"] > 0 for a in answers)


def test_a_row_that_shows_an_image_twice_shares_it_with_no_other(loaded: LoadedModel) -> None:
    """Its beginning is kept for nobody."""
    engine = make_engine(loaded)
    (prompt,) = engine.prompts(rows_of((ref(0), ref(0))))
    assert (prompt.prefix_key, prompt.prefix_images) == (None, 0)
    first, _ = engine.prompts(rows_of((ref(1), ref(1)), (ref(1),)))
    assert first.prefix_images == 2


def test_an_image_is_encoded_once_wherever_it_stands(loaded: LoadedModel) -> None:
    watched, adapter = with_adapter(loaded)
    answers = answers_of(make_engine(watched), rows_of(*MIXED))
    assert sum(adapter.batches) == 4
    assert sum(answer.images_encoded for answer in answers) == 4
    assert sum(answer.images_shared for answer in answers) == sum(map(len, MIXED)) - 4


def test_prompts_share_what_stands_up_to_the_first_images(loaded: LoadedModel) -> None:
    """The same picture first, then another: everything up to the first one is shared."""
    engine = make_patient_engine(loaded, 3)
    rows = rows_of((ref(0), ref(1)), (ref(0), ref(2)), (ref(0), ref(3)))
    answers = answers_of(engine, rows)
    (prompt,) = make_engine(loaded).prompts(rows[:1])
    shared = sorted(answer.prompt_tokens_shared for answer in answers)
    assert shared == [0, prompt.visual[0][1], prompt.visual[0][1]]
    assert [answer.token_ids for answer in answers] == tokens_of(make_engine(loaded), rows)


def test_the_second_image_is_not_shared_behind_another_first(loaded: LoadedModel) -> None:
    engine = make_patient_engine(loaded, 2)
    answers = answers_of(engine, rows_of((ref(1), ref(0)), (ref(2), ref(0))))
    assert [answer.prompt_tokens_shared for answer in answers] == [0, 0]
    assert sum(answer.images_encoded for answer in answers) == 3


# --- one budget for a row -----------------------------------------------------------------------

SHARED = {"compression__budget": "row", "compression__retention": 0.3}


@pytest.mark.parametrize("method", ["globalcom2", "random", "pool"])
def test_rows_that_share_a_budget_answer_the_same_in_a_batch_and_alone(
    loaded: LoadedModel, method: str
) -> None:
    rows = rows_of(*MIXED, (ref(0), ref(1)))
    settings = {**SHARED, "compression__method": method}
    answers = answers_of(make_engine(loaded, **settings), rows)
    alone = [answers_of(make_engine(loaded, **settings), [row])[0] for row in rows]
    assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
    assert [a.kept_per_view for a in answers] == [a.kept_per_view for a in alone]
    assert [a.images_shared for a in answers] == [0] * 6 + [2], "the row that is there twice"


def test_a_row_keeps_in_sum_what_its_images_would_alone(loaded: LoadedModel) -> None:
    rows = rows_of((ref(0), ref(1), ref(3)))
    (own,) = answers_of(make_engine(loaded, compression__retention=0.3), rows)
    (shared,) = answers_of(make_engine(loaded, **SHARED), rows)
    assert shared.kept_per_view != own.kept_per_view
    views = sum(map(len, shared.kept_per_view or ()))
    assert abs((shared.visual_tokens_kept or 0) - (own.visual_tokens_kept or 0)) <= views


def test_a_bad_image_of_a_shared_budget_is_named(loaded: LoadedModel) -> None:
    rows = rows_of((ref(0), ref(1), ImageRef(b"no image")), (ref(0), ref(1)))
    answers = answers_of(make_engine(loaded, **SHARED), rows)
    assert [answer.status for answer in answers] == [Status.BAD_IMAGE, Status.OK]
    assert (answers[0].error or "").startswith("image 3 of 3: ")


def test_rows_that_share_a_budget_are_not_torn_where_memory_is_short(loaded: LoadedModel) -> None:
    """A batch that fails is tried again in halves, and a row's images stay together."""

    class Small(WatchedAdapter):
        def encode(self, tiles: Any, seeds: Any) -> Any:
            if len(tiles) > 3:
                raise torch.OutOfMemoryError("too many")
            return super().encode(tiles, seeds)

    rows = rows_of((ref(0), ref(1), ref(3)), (ref(1), ref(2), ref(0)), (ref(2), ref(3)))
    wanted = answers_of(make_engine(loaded, **SHARED), rows)
    small = replace(loaded, adapter=Small(loaded.adapter))
    engine = make_patient_engine(small, len(rows), **SHARED)  # all in one batch, or each may fit
    found = answers_of(engine, rows)
    assert [a.kept_per_view for a in found] == [a.kept_per_view for a in wanted]
    assert sum(answer.oom_splits for answer in found) > 0


def test_a_row_of_one_budget_needs_no_more_memory_than_its_largest_image(
    loaded: LoadedModel,
) -> None:
    class Small(WatchedAdapter):
        def encode(self, tiles: Any, seeds: Any) -> Any:
            if len(tiles) > 1:
                raise torch.OutOfMemoryError("too many")
            return super().encode(tiles, seeds)

    rows = rows_of((ref(0), ref(1), ref(3)), (ref(2),))
    wanted = answers_of(make_engine(loaded, **SHARED), rows)
    small = replace(loaded, adapter=Small(loaded.adapter))
    found = answers_of(make_patient_engine(small, len(rows), **SHARED), rows)
    assert [(a.token_ids, a.kept_per_view) for a in found] == [
        (a.token_ids, a.kept_per_view) for a in wanted
    ]
    assert found[0].oom_splits == 2, "the batch, and then the row"


def test_images_of_a_single_row_fill_the_tower(loaded: LoadedModel) -> None:
    """In groups that begin within the views that it takes at once."""
    watched, adapter = with_adapter(loaded, tower_views=8)
    rows = rows_of(tuple(map(ref, range(9))))
    (found,) = answers_of(make_engine(watched, **SHARED), rows)
    views = [len(kept) for kept in found.kept_per_view or ()]
    starts = [sum(views[:index]) // 8 for index in range(9)]
    assert adapter.batches == [starts.count(group) for group in sorted(set(starts))]
    assert max(adapter.batches) > 1
    (alone,) = answers_of(make_engine(with_adapter(loaded, tower_views=1)[0], **SHARED), rows)
    assert (found.token_ids, found.kept_per_view) == (alone.token_ids, alone.kept_per_view)


def test_what_fails_for_images_together_names_none_of_them(loaded: LoadedModel) -> None:
    broken, _ = with_adapter(loaded, error=torch.OutOfMemoryError("full"))
    (answer,) = answers_of(make_engine(broken, **SHARED), rows_of((ref(0), ref(1))))
    assert answer.status is Status.OUT_OF_MEMORY
    assert (answer.error or "").startswith("the device has not enough memory")


def test_rows_of_the_same_images_share_them_although_others_come_between(
    loaded: LoadedModel,
) -> None:
    rows = rows_of((ref(0), ref(1)), *[(ref(seed), ref(2)) for seed in range(4, 12)])
    engine = make_engine(loaded, **SHARED)
    answers_of(engine, rows)
    (again,) = answers_of(engine, rows[:1])
    assert (again.images_encoded, again.images_shared) == (0, 2)


def test_images_beside_a_bad_one_are_not_kept_for_later_rows(loaded: LoadedModel) -> None:
    """They were encoded without the share that they would have beside a good one."""
    engine = make_engine(loaded, **SHARED)
    answers_of(engine, rows_of((ref(0), ref(1), ImageRef(b"no image"))))
    assert not engine._prompt_builder._image_cache._kept
    answers_of(engine, rows_of((ref(0),)))
    assert len(engine._prompt_builder._image_cache._kept) == 1
