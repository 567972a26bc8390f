"""Jobs as users write them: a good one, changes of it, and what is reported of a bad one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from gc2ray.core.config.job import parse_job
from gc2ray.core.errors import ConfigError
from tests.support.rows import job_data


def job_data_with(path: str, value: object) -> dict[str, Any]:
    """A good configuration with one setting changed or added."""
    data = copy.deepcopy(job_data("model", "in", "out"))
    *above, last = path.split(".")
    owner = data
    for key in above:
        owner = owner.setdefault(key, {})
    owner[last] = value
    return data


def config_error(path: str, value: object) -> str:
    """What is reported of a job with this setting."""
    with pytest.raises(ConfigError) as caught:
        parse_job(job_data_with(path, value))
    return str(caught.value)


def write_job(tmp_path: Path, text: str) -> Path:
    """The path of a job file with this text."""
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def good_job_file(tmp_path: Path) -> Path:
    return write_job(tmp_path, yaml.safe_dump(job_data("model", "in", "out")))
