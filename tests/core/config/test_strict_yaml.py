"""YAML as it is read: nothing twice, nothing ambiguous, no code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gc2ray.core.config.job import load_job, parse_job
from gc2ray.core.errors import ConfigError
from tests.support.configs import good_job_file, write_job
from tests.support.rows import job_data


@pytest.mark.parametrize("number", ["0100", "1:30", "-010", "00", "1:30.5", "9" * 5000])
def test_ambiguous_numbers_are_refused(tmp_path: Path, number: str) -> None:
    """YAML reads the first as 64, and the second as 90."""
    with pytest.raises(ConfigError) as caught:
        load_job(good_job_file(tmp_path), [f"cluster.stall_seconds={number}"])
    assert "is not valid YAML: " in str(caught.value)
    text = good_job_file(tmp_path).read_text() + f"x: {number}\n"
    with pytest.raises(ConfigError, match=r"job\.yaml: not valid YAML: .*\(line \d+, column 4\)"):
        load_job(write_job(tmp_path, text))


@pytest.mark.parametrize(
    ("more", "key", "line"),
    [
        ("output: other", "output", 9),
        ("cluster: {tries: 1, tries: 2}", "tries", 9),
        ('cluster: {"tries": 1, tries: 2}', "tries", 9),
        ("cluster:\n  workers: {max: 1, min: 1, max: 2}", "max", 10),
        ("cluster:\n  tries: 1\n  stall_seconds: 3\n  tries: 2", "tries", 12),
        ("x: [a, {b: 1, b: 1}]", "b", 9),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "<<", 10),
    ],
)
def test_a_duplicate_key_is_named_with_its_line(
    tmp_path: Path, more: str, key: str, line: int
) -> None:
    good = "output: o\nrecipe:\n  model:\n    path: m\n  input:\n    uri: a\n    prompt:\n"
    path = write_job(tmp_path, f"{good}      column: q\n{more}\n")
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    reported = f"{path}: not valid YAML: the key {key!r} is there twice (line {line}, column "
    assert str(caught.value).startswith(reported)


def test_a_duplicate_key_in_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the key 'retention' is there twice"):
        load_job(
            write_job(tmp_path, '{"recipe": {"compression": {"retention": 1, "retention": 2}}}')
        )


def test_merge_keys_may_be_overridden(tmp_path: Path) -> None:
    """Also in a mapping that is merged on, and is one itself."""
    data = job_data("model", "in", "out")
    data.pop("cluster")
    text = yaml.safe_dump(data)
    cluster = "cluster:\n  <<: &b\n    <<: &a {tries: 1, stall_seconds: 7}\n    tries: 2\n"
    job = load_job(write_job(tmp_path, f"{text}{cluster}  shard_rows: 3\n"))
    assert (job.cluster.tries, job.cluster.stall_seconds, job.cluster.shard_rows) == (2, 7, 3)


@pytest.mark.parametrize(
    "text", ["a: [", "a: b: c", "\tx: 1", "a: 1\n--- \nb: 2", "a: \0", "[" * 5000]
)
def test_broken_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = write_job(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    assert str(caught.value).startswith(f"{path}: not valid YAML: ")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = good_job_file(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_job(path) == parse_job(job_data("model", "in", "out"))


def test_json_with_escaped_surrogate_pairs_is_read(tmp_path: Path) -> None:
    """Which escapes an emoji as two halves."""
    data = job_data("model", "in", "out")
    data["recipe"]["input"]["prompt"] = {"constant": "Is it \U0001f600, \xe9 or \u20ac?"}
    text = json.dumps(data)
    assert "\\ud83d\\ude00" in text
    job = load_job(write_job(tmp_path, text))
    assert job.recipe.input.prompt.constant == "Is it \U0001f600, \xe9 or \u20ac?"


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ude00\\ud83d", "a\\ud83db"])
def test_a_lone_surrogate_is_refused_with_its_line(tmp_path: Path, half: str) -> None:
    path = write_job(tmp_path, f'output: o\nrecipe:\n  x: "{half}"\n')
    with pytest.raises(ConfigError, match=r"a lone surrogate.* \(line 3, column 6\)"):
        load_job(path)


@pytest.mark.parametrize("lines", [7, 40])
def test_nested_aliases_make_no_huge_message(tmp_path: Path, lines: int) -> None:
    """Aliases of lists of aliases, written out, would."""
    text = "x0: &x0 [lol,lol,lol,lol,lol,lol,lol,lol,lol]\n"
    for number in range(1, lines):
        nine = ",".join([f"*x{number - 1}"] * 9)
        text += f"x{number}: &x{number} [{nine}]\n"
    text += f"output: *x{lines - 1}\nrecipe: {{input: {{keep: *x{lines - 1}}}}}\n"
    with pytest.raises(ConfigError) as caught:
        load_job(write_job(tmp_path, text))
    assert len(str(caught.value)) < 10_000


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = write_job(tmp_path, f"output: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_job(path)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_job(
            good_job_file(tmp_path), [f"cluster.tries=!!python/object/apply:os.mkdir ['{mark}']"]
        )
    assert not mark.exists()


def test_an_escape_beyond_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a valid character"):
        load_job(write_job(tmp_path, 'output: "\\UFFFFFFFF"'))
