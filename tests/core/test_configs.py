"""Every file in configs/ loads and says where its answers go."""

from __future__ import annotations

from pathlib import Path

import pytest

from gc2ray.compression.policy import CompressionPolicy
from gc2ray.core.config.job import load_job
from gc2ray.demo.demo import CONFIG, demo_job

CONFIGS = [CONFIG, *sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))]


def test_the_documented_configs_exist() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {
        "demo",
        "llava-next-7b-caption",
        "llava-next-7b-vqa",
        "llava-next-13b-caption",
        "internvl3-8b-several-images",
    }


def test_the_demo_keeps_everything_in_its_directory() -> None:
    """Where it is by default, nothing of the file is changed."""
    assert demo_job(Path("demo-output")) == load_job(CONFIG)
    assert str(demo_job(Path("there")).model_dump()).count("demo-output") == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    job = load_job(path)
    assert CompressionPolicy.from_config(job.recipe.compression).compressor.name == "globalcom2"
    assert job.recipe.generation.max_new_tokens > 0
    if path.stem != "demo":
        assert job.output.startswith("s3://")
        assert job.recipe.input.uri.startswith("s3://")
