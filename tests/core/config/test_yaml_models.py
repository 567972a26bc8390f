"""Settings from files and overrides: what is refused, and what the message says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from gc2ray.core.config.job import Cluster, load_job, parse_job
from gc2ray.core.errors import ConfigError
from tests.support.configs import config_error, good_job_file, job_data_with, write_job
from tests.support.rows import job_data


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("outptu", "output"),
        ("clutser", "cluster"),
        ("recipe.modle", "model"),
        ("recipe.compression.retentoin", "retention"),
        ("recipe.input.max_image_byte", "max_image_bytes"),
        ("recipe.input.prompt.colunm", "column"),
        ("cluster.worker", "workers"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest(path: str, nearest: str) -> None:
    key = path.split(".")[-1]
    assert config_error(path, 1) == f"{path}: unknown {key!r}; did you mean {nearest!r}?"


def test_an_unknown_key_without_a_near_match_lists_all_keys() -> None:
    message = config_error("recipe.generation.zzz", 1)
    assert message == (
        "recipe.generation.zzz: unknown 'zzz'; known: max_new_tokens, temperature, top_p, seed, "
        "stop_token_ids, max_repeats, repetition_penalty, ignore_model_rules"
    )


def test_every_problem_is_reported_at_once() -> None:
    data = job_data_with("recipe.compression.retention", 2)
    data["cluster"] = {"tries": 0}
    del data["output"]
    with pytest.raises(ConfigError) as caught:
        parse_job(data)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "output",
        "recipe.compression.retention",
        "cluster.tries",
    ]
    assert lines[0] == "output: required, and not set"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_setting_takes_nan_or_infinity(value: float) -> None:
    """NaN passes no comparison, and nothing means what it says at an infinite temperature."""
    job = parse_job(job_data("model", "in", "out"))
    numbers = [
        f"{where}.{name}"
        for where, section in {
            "recipe.compression": job.recipe.compression,
            "recipe.generation": job.recipe.generation,
            "recipe.audit": job.recipe.audit,
            "cluster": job.cluster,
        }.items()
        for name, field in type(section).model_fields.items()
        if "float" in str(field.annotation)
    ]
    assert len(numbers) >= 12
    for path in numbers:
        shown = [value] if path.endswith("escalate") else value
        assert config_error(path, shown).startswith(path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("recipe.compression.retention", 0),
        ("recipe.compression.retention", -0.1),
        ("recipe.compression.retention", 1.01),
        ("recipe.compression.retention", float("nan")),
        ("recipe.compression.temperature", 0),
        ("recipe.compression.positions", "absolute"),
        ("recipe.compression.newlines", "some"),
        ("recipe.generation.max_new_tokens", 0),
        ("recipe.generation.temperature", -1),
        ("recipe.generation.top_p", 0),
        ("recipe.generation.top_p", 1.1),
        ("recipe.model.dtype", "float64"),
        ("recipe.input.keep", "id"),
        ("recipe.input.max_image_pixels", 0),
        ("cluster.workers", 0),
        ("cluster.gpus_per_worker", -1),
        ("cluster.max_bad_rows", 1.5),
        ("cluster.stall_seconds", 0),
        ("cluster.shard_rows", 2.5),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_path(path: str, value: object) -> None:
    message = config_error(path, value)
    assert message.startswith(f"{path}: ")
    assert message.endswith(f"got {value!r}")
    assert "\n" not in message


def test_settings_cannot_be_changed_afterwards() -> None:
    job = parse_job(job_data("model", "in", "out"))
    with pytest.raises(ValidationError, match="frozen"):
        job.recipe.compression.retention = 0.5


def test_a_job_file_equals_its_data(tmp_path: Path) -> None:
    assert load_job(good_job_file(tmp_path)) == parse_job(job_data("model", "in", "out"))


def test_overrides_are_applied_and_typed(tmp_path: Path) -> None:
    job = load_job(
        good_job_file(tmp_path),
        [
            "recipe.compression.retention=0.5",
            "recipe.compression.retention=0.75",  # the last one holds
            "recipe.input.keep=[id, name]",
            "recipe.input.prompt.constant=What? = how?",
            "recipe.model.revision=null",
            "cluster.shard_rows=7",
            "cluster.tries=5",
            "output=s3://bucket/run",
        ],
    )
    assert job.recipe.compression.retention == 0.75
    assert job.recipe.input.keep == ("id", "name")
    assert job.recipe.input.prompt.constant == "What? = how?"
    assert job.recipe.model.revision is None
    assert (job.cluster.shard_rows, job.cluster.tries) == (7, 5)
    assert job.output == "s3://bucket/run"


def test_an_override_may_open_a_section(tmp_path: Path) -> None:
    data = job_data("model", "in", "out")
    del data["cluster"]
    job = load_job(write_job(tmp_path, yaml.safe_dump(data)), ["cluster.workers=3"])
    assert job.cluster == Cluster(workers=3)


AS_TYPED = [
    "Describe the object #1 only",
    "What is this: a cat?",
    "{question} Be brief.",
    "[INST] What? [/INST]",
    "@everyone",
    "*bold*",
    "%d and &x",
    "'quoted'",
    '"quoted" # twice',
    "  blanks before and behind  ",
    "- a list",
    "[a, list]",
    "{a: map}",
    "yes",
    "off",
    "0100",
    "1:30",
    "1e-3",
    "2024-01-01",
    "12",
    "!tag",
    "| >",
    "a=b",
    "tab\tand\nline",
    "emoji \U0001f600",
    "~",
]


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_is_read_as_typed(tmp_path: Path, text: str) -> None:
    """Wherever a setting is text alone: no quoting, nothing dropped."""
    job = load_job(
        good_job_file(tmp_path),
        [f"recipe.input.prompt.constant={text}", f"recipe.model.revision={text}"],
    )
    assert job.recipe.input.prompt.constant == text
    assert job.recipe.model.revision == text
    assert load_job(write_job(tmp_path, job.to_yaml())).recipe == job.recipe


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("recipe.input.uri=data/run [v2]/*.parquet", ("data/run [v2]/*.parquet",)),
        ("recipe.input.uri=[aq]*.parquet", ("[aq]*.parquet",)),
        ("recipe.input.uri=[a, 'b c', s3://x/y]", ("a", "b c", "s3://x/y")),
        ("recipe.input.uri=a, b # c", ("a, b # c",)),
    ],
)
def test_an_override_is_a_list_only_in_list_syntax(
    tmp_path: Path, override: str, found: tuple[str, ...]
) -> None:
    assert load_job(good_job_file(tmp_path), [override]).recipe.input.uris() == found


def test_an_empty_override_is_null_where_null_is_allowed(tmp_path: Path) -> None:
    for text in ("", "null"):
        job = load_job(good_job_file(tmp_path), [f"recipe.model.revision={text}"])
        assert job.recipe.model.revision is None
        with pytest.raises(ConfigError, match="output: "):
            load_job(good_job_file(tmp_path), [f"output={text}"])


@pytest.mark.parametrize("number", ["1e-3", "0.001", ".001", "1.0e-3"])
def test_numbers_are_numbers(tmp_path: Path, number: str) -> None:
    job = load_job(good_job_file(tmp_path), [f"recipe.compression.retention={number}"])
    assert job.recipe.compression.retention == 0.001


def test_an_override_opens_a_section_that_is_empty(tmp_path: Path) -> None:
    data = {**job_data("model", "in", "out"), "cluster": None}
    job = load_job(write_job(tmp_path, yaml.safe_dump(data)), ["cluster.tries=7"])
    assert job.cluster.tries == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nonsense", "'nonsense': overrides are written a.b=c"),
        ("=3", "'=3': overrides are written a.b=c"),
        ("a..b=3", "'a..b=3': overrides are written a.b=c"),
        ("output.x=1", "'output.x=1': output has no keys below it"),
        ("cluster.workers=[", "'cluster.workers=[': '[' is not valid YAML: "),
        ("cluster.tries=5 # or 6", "'cluster.tries=5 # or 6': '5 # or 6' is not valid YAML: '# or"),
        ("recipe.input.prompt={constant: a: b}", "'recipe.input.prompt={constant: a: b}': "),
        ("cluster.worker=3", "cluster.worker: unknown 'worker'; did you mean 'workers'?"),
        ("cluster.workers=two", "cluster.workers: expected a number above 0, or {min: …, max: …}"),
        ("cluster.workers={min: 3, max: 2}", "cluster.workers: min is 3, more than max, 2"),
        ("cluster.workers={min: 3}", "cluster.workers.max: required, and not set"),
        ("cluster.workers.max=0", "'cluster.workers.max=0': workers has no keys below it"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(good_job_file(tmp_path), [override])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "path", ["output", "recipe.input.prompt.constant", "recipe.input.keep", "recipe.input.uri"]
)
def test_a_lone_surrogate_is_refused_with_its_key(path: str) -> None:
    """As bytes of a shell are that are not UTF-8."""
    bad = "caf\udce9"
    message = config_error(
        path, [bad] if path.endswith("keep") else {"constant": bad}.get(path, bad)
    )
    assert message.startswith(f"{path}: 'caf\\udce9' is not text: a lone surrogate")


def test_a_number_for_a_text_setting_must_be_quoted() -> None:
    message = config_error("recipe.model.revision", 1234567)
    assert message.endswith("(in quotes it is text); got 1234567")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text", "3"])
def test_yaml_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = write_job(tmp_path, text)
    with pytest.raises(ConfigError, match="expected keys output, recipe, cluster"):
        load_job(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: No such file"):
        load_job(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_job(tmp_path)


def test_a_binary_job_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"output: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        load_job(path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("recipe.compression.retention", "on"),
        ("recipe.generation.max_new_tokens", "yes"),
        ("cluster.max_bad_rows", "no"),
        ("cluster.tries", "true"),
        ("recipe.input.max_image_bytes", "Off"),
    ],
)
def test_booleans_are_not_numbers(tmp_path: Path, path: str, value: str) -> None:
    """Retention `on` would be 1, and nothing compressed."""
    with pytest.raises(ConfigError, match=rf"{path}: true and false .* are not valid here; got"):
        load_job(good_job_file(tmp_path), [f"{path}={value}"])
