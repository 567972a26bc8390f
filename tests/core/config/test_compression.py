"""Which compression a recipe can ask for."""

from __future__ import annotations

import pytest

from gc2ray.compression.packing import Packing
from gc2ray.compression.policy import CompressionPolicy
from gc2ray.core.config.compression import METHODS
from gc2ray.core.config.job import parse_job
from tests.support.configs import config_error, job_data_with
from tests.support.rows import job_data


def test_an_unknown_method_is_named_with_its_nearest() -> None:
    message = config_error("recipe.compression.method", "globalcom")
    assert message.startswith("recipe.compression.method: unknown 'globalcom'; did you mean '")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_configured(method: str) -> None:
    config = parse_job(job_data_with("recipe.compression.method", method)).recipe.compression
    assert CompressionPolicy.from_config(config).compressor.name == method
    assert config.retention_requested == (0.25 if METHODS[method].takes_retention else 1.0)


def test_the_papers_packing_is_the_default() -> None:
    config = parse_job(job_data("model", "in", "out")).recipe.compression
    assert (
        CompressionPolicy.from_config(config).packing
        == Packing()
        == Packing("compact", "kept_rows")
    )
    data = job_data_with("recipe.compression.positions", "original")
    data["recipe"]["compression"]["newlines"] = "all"
    assert CompressionPolicy.from_config(parse_job(data).recipe.compression).packing == Packing(
        "original", "all"
    )


@pytest.mark.parametrize("retention", [1, 1e-6, "0.5"])
def test_retention_in_range_is_taken(retention: object) -> None:
    job = parse_job(job_data_with("recipe.compression.retention", retention))
    assert job.recipe.compression.retention == float(retention)
