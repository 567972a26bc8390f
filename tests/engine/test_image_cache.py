"""Rows that show the same image share it, within the cache's bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from gc2ray.compression.methods.globalcom2 import GlobalCom2
from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import Status
from gc2ray.core.records import ImageRef
from gc2ray.core.schema import stats_of
from gc2ray.engine.engine import Engine
from gc2ray.engine.image_cache import CachedImage, ImageCache, image_key
from gc2ray.models.adapter import LoadedModel
from tests.support.engines import (
    NEW_TOKENS,
    QUESTIONS,
    answers_of,
    make_engine,
    make_patient_engine,
    rows_of_one_image,
    tokens_of,
    with_adapter,
)
from tests.support.rows import encoded, make_recipe, picture, request


@pytest.mark.parametrize("method", ["globalcom2", "random", "pool"])
def test_rows_that_show_one_image_share_it_and_answer_the_same(
    loaded: LoadedModel, method: str
) -> None:
    watched, adapter = with_adapter(loaded)
    rows = rows_of_one_image(3, QUESTIONS)
    alone = [tokens_of(make_engine(loaded, compression__method=method), [row])[0] for row in rows]
    assert len(set(alone)) > 1, "all answers alike: nothing could fail"
    engine = make_engine(watched, compression__method=method)
    answers = answers_of(engine, rows)
    assert [answer.token_ids for answer in answers] == alone
    assert sum(adapter.batches) == 1, "the image was encoded again"
    assert sorted(answer.images_shared for answer in answers) == [0, 1, 1, 1]
    total = stats_of(answers)
    assert total.images_shared == 3
    assert total.visual_tokens_kept == 4 * (answers[0].visual_tokens_kept or 0)
    assert sum("encode" in answer.stage_ns for answer in answers) == 1


def test_the_shared_prefix_of_prompts_is_computed_once(loaded: LoadedModel) -> None:
    """Text before the image and the image: all but the question, and the answer's start."""
    engine = make_patient_engine(loaded, 4)
    answers = answers_of(engine, rows_of_one_image(3, QUESTIONS))
    shared = [answer.prompt_tokens_shared for answer in answers]
    assert sorted(map(bool, shared)) == [False, True, True, True]
    prompt = engine.prompts(rows_of_one_image(3, QUESTIONS)[:1])[0]
    assert max(shared) == prompt.visual[0][1]
    other = [replace(row, images=(ImageRef(encoded(picture((40, 300), 4))),)) for row in
             rows_of_one_image(3, QUESTIONS)[:1]]  # fmt: skip
    engine.rows = 1
    assert answers_of(engine, other)[0].prompt_tokens_shared == 0


def test_shared_work_is_counted_once(loaded: LoadedModel) -> None:
    engine = make_patient_engine(loaded, 4, compression__retention=0.25)
    answers = answers_of(engine, rows_of_one_image(3, QUESTIONS))
    stats, shape = stats_of(answers), loaded.adapter.shape
    assert (stats.images, stats.images_shared) == (1, 3)
    views = len(answers[0].kept_per_view[0] if answers[0].kept_per_view else ())
    assert stats.flops["encode"] == stats.flops_full["encode"] == shape.tower.needed(views)
    kept, full = stats.visual_tokens_kept // 4, stats.visual_tokens_full // 4
    assert stats.flops["compress"] == shape.tower.projector(kept + stats.newline_tokens // 4)
    whole = full + stats.newline_tokens_full // 4
    assert stats.flops_full["compress"] == shape.tower.projector(whole)
    for answer in answers:
        assert answer.demand is not None
        assert answer.demand_full is not None
        prompt, shared = answer.prompt_tokens or 0, answer.prompt_tokens_shared
        assert answer.demand.flops["prefill"] == shape.text.needed_prefill(prompt, shared)
        more = whole - kept - stats.newline_tokens // 4
        uncompressed = shape.text.needed_prefill(prompt + more, shared and shared + more)
        assert answer.demand_full.flops["prefill"] == uncompressed


def test_an_image_is_encoded_again_after_clear_cache(loaded: LoadedModel) -> None:
    watched, adapter = with_adapter(loaded)
    engine = make_engine(watched)
    for _ in range(2):
        answers_of(engine, [request()])
    assert len(adapter.batches) == 1
    engine.clear_cache()
    answers_of(engine, [request()])
    assert len(adapter.batches) == 2


def test_a_prompt_prefix_is_computed_again_after_clear_cache(loaded: LoadedModel) -> None:
    engine = make_patient_engine(loaded, 4)
    answers_of(engine, rows_of_one_image(3, QUESTIONS))

    def answer_again() -> list[bool]:
        answers = answers_of(engine, rows_of_one_image(3, QUESTIONS))
        return sorted(answer.prompt_tokens_shared > 0 for answer in answers)

    assert answer_again() == [True] * 4
    engine.clear_cache()
    assert answer_again() == [False, True, True, True]


def test_a_broken_image_fails_every_row_that_shows_it(loaded: LoadedModel) -> None:
    cut = encoded(picture((100, 200), 1))[:200]
    rows = [replace(row, images=(ImageRef(cut),)) for row in rows_of_one_image(3, QUESTIONS)]
    answers = answers_of(make_engine(loaded), [*rows, replace(request(seed=9), row=9)])
    assert [answer.status for answer in answers] == [*[Status.BAD_IMAGE] * 4, Status.OK]
    assert len({answer.error for answer in answers[:4]}) == 1


def test_a_method_that_reads_the_prompt_shares_nothing(loaded: LoadedModel) -> None:
    class Reading(GlobalCom2):
        reads_prompt: ClassVar[bool] = True

    recipe = make_recipe("unused", generation__max_new_tokens=NEW_TOKENS)
    watched, adapter = with_adapter(loaded)
    engine = Engine(watched, recipe, Cluster(), Reading())
    answers = answers_of(engine, rows_of_one_image(3, [*QUESTIONS, QUESTIONS[0]]))
    assert sum(adapter.batches) == 4
    assert sum(answer.images_shared for answer in answers) == 1


def test_cached_images_stay_within_the_byte_limit() -> None:
    pictures = ImageCache(kept_bytes=100)

    def made(key: str, tokens: int) -> None:
        picture_, new = pictures.find(key)
        assert new
        picture_.packed = torch.zeros(tokens, 1)
        pictures.keep(picture_)

    made("a", 10)
    made("b", 10)
    assert not pictures.find("a")[1]  # and so used after b
    made("c", 10)
    assert [pictures.find(key)[1] for key in ("a", "c", "b")] == [False, False, True]
    made("d", 26)
    assert [pictures.find(key)[1] for key in ("a", "c", "d")] == [True, True, True]


def test_an_image_in_use_is_found_and_a_discarded_one_is_not() -> None:
    pictures = ImageCache(kept_bytes=0)
    held, _ = pictures.find("a")
    assert pictures.find("a") == (held, False)
    assert held.row_count == 2
    pictures.discard(held)
    assert pictures.find("a")[1]


def test_an_image_is_identified_by_its_bytes() -> None:
    assert image_key(b"x") == image_key(b"x") != image_key(b"y")
    assert image_key(b"x") != image_key(b"x", "q") != image_key(b"x", "r")
    assert CachedImage(image_key(b"x")).seed == CachedImage(image_key(b"x")).seed < 2**56
