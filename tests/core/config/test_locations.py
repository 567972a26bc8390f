"""Paths and URLs that a library would read as another place."""

from __future__ import annotations

import pytest

from gc2ray.core.config.job import parse_job
from tests.support.configs import config_error, job_data_with


@pytest.mark.parametrize("key", ["output", "recipe.input.uri", "recipe.model.path"])
@pytest.mark.parametrize(
    ("place", "reported"),
    [
        ("s3:/bucket/x", "did you mean 's3://bucket/x'?"),
        ("s3:bucket/x", "did you mean 's3://bucket/x'?"),
        ("S3:/bucket/x", "did you mean 'S3://bucket/x'?"),
        ("gs:/bucket/x", "did you mean 'gs://bucket/x'?"),
        ("http:/host/x", "did you mean 'http://host/x'?"),
        ("file:/out/x", "did you mean 'file:///out/x'?"),
        ("file:out", "did you mean 'file:///out'?"),
        ("zip://a::s3:/b/a.zip", "did you mean 's3://b/a.zip'?"),
        ("$SCRATCH/x", "has a shell variable"),
        ("${SCRATCH}/x", "has a shell variable"),
        ("/data/$USER/x", "has a shell variable"),
        ("s3://$BUCKET/x", "has a shell variable"),
        ("~nobody-of-that-name/x", "there is no such user on this machine"),
        ("a\0b", "is neither a path nor a URL"),
        (" ", "is neither a path nor a URL"),
        ("", "is neither a path nor a URL"),
    ],
)
def test_a_location_that_would_be_read_as_another_is_refused(
    key: str, place: str, reported: str
) -> None:
    message = config_error(key, place)
    assert message.startswith(f"{key}: {place!r}")
    assert reported in message


@pytest.mark.parametrize(
    "place",
    ["s3://b/a$x", "C:/x", "a:b/c", "x/a$b", "~/x", "zip://a::s3://b/c.zip", "hf:a/b?split=c", "$"],
)
def test_an_unusual_location_is_accepted(place: str) -> None:
    assert parse_job(job_data_with("recipe.input.uri", place)).recipe.input.uri == place
