"""Configuration: what is refused, what the message says, and what identifies a recipe."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gc2ray.compression.packing import Packing
from gc2ray.compression.policy import CompressionPolicy
from gc2ray.core.config.compression import METHODS
from gc2ray.core.config.generation import NOTHING, GenerationConfig, TakenOver
from gc2ray.core.config.job import Cluster, Job, WorkerRange, load_cluster, load_job, parse_job
from gc2ray.core.config.recipe import parse_recipe, recipe_difference
from gc2ray.core.errors import ConfigError
from gc2ray.core.records import ANSWER_COLUMNS
from tests.support.rows import job_data, make_job


def data_with(path: str, value: object) -> dict[str, Any]:
    """A good configuration with one setting changed or added."""
    data = copy.deepcopy(job_data("model", "in", "out"))
    *above, last = path.split(".")
    owner = data
    for key in above:
        owner = owner.setdefault(key, {})
    owner[last] = value
    return data


def refusal(path: str, value: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_job(data_with(path, value))
    return str(caught.value)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def good_yaml(tmp_path: Path) -> Path:
    return written(tmp_path, yaml.safe_dump(job_data("model", "in", "out")))


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
    assert refusal(path, 1) == f"{path}: unknown {key!r}; did you mean {nearest!r}?"


def test_an_unknown_key_like_no_other_gets_the_list() -> None:
    message = refusal("recipe.generation.zzz", 1)
    assert message == (
        "recipe.generation.zzz: unknown 'zzz'; known: max_new_tokens, temperature, top_p, seed, "
        "stop_token_ids, max_repeats, repetition_penalty, ignore_model_rules"
    )


def test_every_problem_is_reported_at_once() -> None:
    data = data_with("recipe.compression.retention", 2)
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


def test_an_unknown_method_is_named_with_its_nearest() -> None:
    message = refusal("recipe.compression.method", "globalcom")
    assert message.startswith("recipe.compression.method: unknown 'globalcom'; did you mean '")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_configured(method: str) -> None:
    config = parse_job(data_with("recipe.compression.method", method)).recipe.compression
    assert CompressionPolicy.from_config(config).compressor.name == method
    assert config.retention_requested == (0.25 if METHODS[method].takes_retention else 1.0)


def test_the_papers_packing_is_the_default() -> None:
    config = parse_job(job_data("model", "in", "out")).recipe.compression
    assert (
        CompressionPolicy.from_config(config).packing
        == Packing()
        == Packing("compact", "kept_rows")
    )
    data = data_with("recipe.compression.positions", "original")
    data["recipe"]["compression"]["newlines"] = "all"
    assert CompressionPolicy.from_config(parse_job(data).recipe.compression).packing == Packing(
        "original", "all"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_setting_takes_what_is_no_number(value: float) -> None:
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
        assert refusal(path, shown).startswith(path)


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
    message = refusal(path, value)
    assert message.startswith(f"{path}: ")
    assert message.endswith(f"got {value!r}")
    assert "\n" not in message


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_a_seed_that_torch_cannot_take_is_refused(seed: int) -> None:
    assert refusal("recipe.generation.seed", seed).startswith("recipe.generation.seed: ")


def test_a_rule_that_no_model_has_is_refused_with_the_nearest() -> None:
    where = "recipe.generation.ignore_model_rules"
    assert refusal(where, ["min_length", "no_repeat_ngrams"]).startswith(
        f"{where}: unknown 'no_repeat_ngrams'; did you mean 'no_repeat_ngram_size'?"
    )
    assert "unknown 'temperature'; known: bad_words_ids, " in refusal(where, ["temperature"])


def test_a_recipe_takes_over_what_it_sets_and_what_it_names() -> None:
    assert GenerationConfig().taken_over() == NOTHING
    generation = GenerationConfig(
        ignore_model_rules=("min_length",), repetition_penalty=1.0, stop_token_ids=(7,)
    )
    assert generation.taken_over() == TakenOver(
        frozenset({"min_length", "repetition_penalty"}), (7,)
    )


def test_a_local_model_must_be_there(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path):
        model = parse_job(data_with("recipe.model.path", str(path))).recipe.model
        with pytest.raises(ConfigError, match=r"recipe\.model\.path: there is no model in"):
            model.check()
    (tmp_path / "config.json").write_text("{}")
    model.check()


@pytest.mark.parametrize(
    "path",
    [
        "somebody/some-model",
        "s3://bucket/model",
        "file:///nowhere",
        "zip://a::./b.zip",
        "/a::zip://b",
    ],
)
def test_a_model_of_the_hub_or_behind_a_url_is_not_checked(path: str) -> None:
    model = parse_job(data_with("recipe.model.path", path)).recipe.model
    model.check()
    assert not model.is_local
    assert model.is_url == ("://" in path)


def test_image_limits_are_checked_before_anything_starts() -> None:
    assert "recipe.input.max_image_pixels" in refusal("recipe.input.max_image_pixels", 10**9)
    assert "recipe.input.image_roots" in refusal("recipe.input.image_roots", [""])


@pytest.mark.parametrize("retention", [1, 1e-6, "0.5"])
def test_retention_in_range_is_taken(retention: object) -> None:
    job = parse_job(data_with("recipe.compression.retention", retention))
    assert job.recipe.compression.retention == float(retention)


@pytest.mark.parametrize(
    "prompt", [{}, {"column": "a", "constant": "b"}, {"template": "{a}", "column": "a"}]
)
def test_a_prompt_is_exactly_one_of_three(prompt: dict[str, str]) -> None:
    message = refusal("recipe.input.prompt", prompt)
    assert message.startswith(
        "recipe.input.prompt: set exactly one of column, template, constant; got "
    )


@pytest.mark.parametrize(
    "template",
    ["{x.__class__}", "{x[0]}", "{}", "{0}", "{x!r}", "{x:>100000000}", "{x:{y}}", "{a b}"],
)
def test_a_template_takes_plain_columns_only(template: str) -> None:
    message = refusal("recipe.input.prompt", {"template": template})
    assert "only plain column names are allowed" in message


@pytest.mark.parametrize("template", ["{x", "x}"])
def test_a_broken_template_is_refused(template: str) -> None:
    assert refusal("recipe.input.prompt", {"template": template}).startswith("recipe.input.prompt:")


@pytest.mark.parametrize("column", sorted(ANSWER_COLUMNS))
def test_a_kept_column_may_not_hide_an_answer_column(column: str) -> None:
    message = refusal("recipe.input.keep", ["id", column])
    assert message.startswith(f"recipe.input.keep: '{column}' is a column of the answers; write ")


@pytest.mark.parametrize(
    "keep", [["id", "id"], ["id", {"x": "id"}], [{"x": "a"}, {"y": "a"}]], ids=str
)
def test_a_name_is_written_once(keep: list[object]) -> None:
    assert "recipe.input.keep: a column is named twice" in refusal("recipe.input.keep", keep)


@pytest.mark.parametrize(
    ("kept", "reported"),
    [
        ({"x": "answer"}, "'answer' is a column of the answers; write it under another name"),
        ({"a": "b", "c": "d"}, "a renamed column is written {column: name}, each by itself"),
        ({}, "a renamed column is written {column: name}, each by itself"),
        ({"a": 1}, "recipe.input.keep"),
        (1, "recipe.input.keep"),
    ],
    ids=str,
)
def test_a_renaming_that_makes_no_sense_is_refused(kept: object, reported: str) -> None:
    assert reported in refusal("recipe.input.keep", ["id", kept])


def test_a_kept_column_may_be_renamed() -> None:
    """Which is written into the recipe; that of one that renames nothing stays what it was."""
    keep = ["id", {"answer": "reference"}, {"answer": "again"}]
    recipe = parse_job(data_with("recipe.input.keep", keep)).recipe
    assert recipe.input.kept() == {"id": "id", "reference": "answer", "again": "answer"}
    assert recipe.input.columns() == ("image", "id", "answer")
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    assert parse_recipe(recipe.model_dump(mode="json")).fingerprint() == recipe.fingerprint()
    plain = parse_job(data_with("recipe.input.keep", ["id", "answer_"])).recipe
    assert '"keep":["id","answer_"]' in plain.model_dump_json(exclude_defaults=True)


def test_an_empty_template_is_refused() -> None:
    for template in ("", " \n"):
        assert "the template is empty" in refusal("recipe.input.prompt", {"template": template})


def test_what_comes_later_is_refused_by_name() -> None:
    for key in ("adapter", "quantization"):
        message = refusal(f"recipe.model.{key}", "x")
        assert message == f"recipe.model.{key}: not supported yet; leave it null"


def test_columns_are_read_once_each() -> None:
    data = data_with("recipe.input.prompt", {"template": "{a} {b} {a}"})
    data["recipe"]["input"]["keep"] = ["b", "image", "id"]
    assert parse_job(data).recipe.input.columns() == ("image", "a", "b", "id")


def test_settings_cannot_be_changed_afterwards() -> None:
    job = parse_job(job_data("model", "in", "out"))
    with pytest.raises(ValidationError, match="frozen"):
        job.recipe.compression.retention = 0.5


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    assert load_job(good_yaml(tmp_path)) == parse_job(job_data("model", "in", "out"))


def test_overrides_are_applied_and_typed(tmp_path: Path) -> None:
    job = load_job(
        good_yaml(tmp_path),
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
    job = load_job(written(tmp_path, yaml.safe_dump(data)), ["cluster.workers=3"])
    assert job.cluster == Cluster(workers=3)


def test_a_cluster_alone() -> None:
    assert load_cluster(["cluster.workers=3"]) == Cluster(workers=3)
    assert load_cluster([]) == Cluster()
    for override, message in [
        ("recipe.model.path=x", "only cluster.* may be set"),
        ("cluster.worker=3", "cluster.worker: unknown 'worker'; did you mean 'workers'?"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_cluster([override])


def test_a_number_of_workers_is_as_many_as_fit() -> None:
    assert Cluster(workers=3).workers == WorkerRange(min=1, max=3)
    assert Cluster(workers={"min": 2, "max": 9}).workers == WorkerRange(min=2, max=9)
    assert Cluster().workers is None


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
def test_text_is_what_was_typed(tmp_path: Path, text: str) -> None:
    """Wherever a setting is text alone: no quoting, nothing dropped."""
    job = load_job(
        good_yaml(tmp_path),
        [f"recipe.input.prompt.constant={text}", f"recipe.model.revision={text}"],
    )
    assert job.recipe.input.prompt.constant == text
    assert job.recipe.model.revision == text
    assert load_job(written(tmp_path, job.to_yaml())).recipe == job.recipe


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("recipe.input.uri=data/run [v2]/*.parquet", ("data/run [v2]/*.parquet",)),
        ("recipe.input.uri=[aq]*.parquet", ("[aq]*.parquet",)),
        ("recipe.input.uri=[a, 'b c', s3://x/y]", ("a", "b c", "s3://x/y")),
        ("recipe.input.uri=a, b # c", ("a, b # c",)),
    ],
)
def test_text_or_a_list_is_a_list_where_it_is_written_so(
    tmp_path: Path, override: str, found: tuple[str, ...]
) -> None:
    assert load_job(good_yaml(tmp_path), [override]).recipe.input.uris() == found


def test_nothing_is_null_where_a_setting_may_be(tmp_path: Path) -> None:
    for text in ("", "null"):
        job = load_job(good_yaml(tmp_path), [f"recipe.model.revision={text}"])
        assert job.recipe.model.revision is None
        with pytest.raises(ConfigError, match="output: "):
            load_job(good_yaml(tmp_path), [f"output={text}"])


@pytest.mark.parametrize("number", ["1e-3", "0.001", ".001", "1.0e-3"])
def test_numbers_are_numbers(tmp_path: Path, number: str) -> None:
    job = load_job(good_yaml(tmp_path), [f"recipe.compression.retention={number}"])
    assert job.recipe.compression.retention == 0.001


@pytest.mark.parametrize("number", ["0100", "1:30", "-010", "00", "1:30.5", "9" * 5000])
def test_numbers_that_may_mean_another_are_refused(tmp_path: Path, number: str) -> None:
    """YAML reads the first as 64, and the second as 90."""
    with pytest.raises(ConfigError) as caught:
        load_job(good_yaml(tmp_path), [f"cluster.stall_seconds={number}"])
    assert "is not valid YAML: " in str(caught.value)
    text = good_yaml(tmp_path).read_text() + f"x: {number}\n"
    with pytest.raises(ConfigError, match=r"job\.yaml: not valid YAML: .*\(line \d+, column 4\)"):
        load_job(written(tmp_path, text))


def test_an_override_opens_a_section_that_is_empty(tmp_path: Path) -> None:
    data = {**job_data("model", "in", "out"), "cluster": None}
    job = load_job(written(tmp_path, yaml.safe_dump(data)), ["cluster.tries=7"])
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
        load_job(good_yaml(tmp_path), [override])
    assert str(caught.value).startswith(message)


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
def test_a_key_that_is_there_twice_is_named_with_its_line(
    tmp_path: Path, more: str, key: str, line: int
) -> None:
    good = "output: o\nrecipe:\n  model:\n    path: m\n  input:\n    uri: a\n    prompt:\n"
    path = written(tmp_path, f"{good}      column: q\n{more}\n")
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    reported = f"{path}: not valid YAML: the key {key!r} is there twice (line {line}, column "
    assert str(caught.value).startswith(reported)


def test_a_key_that_is_there_twice_in_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the key 'retention' is there twice"):
        load_job(written(tmp_path, '{"recipe": {"compression": {"retention": 1, "retention": 2}}}'))


def test_merge_keys_may_be_overridden(tmp_path: Path) -> None:
    """Also in a mapping that is merged on, and is one itself."""
    data = job_data("model", "in", "out")
    data.pop("cluster")
    text = yaml.safe_dump(data)
    cluster = "cluster:\n  <<: &b\n    <<: &a {tries: 1, stall_seconds: 7}\n    tries: 2\n"
    job = load_job(written(tmp_path, f"{text}{cluster}  shard_rows: 3\n"))
    assert (job.cluster.tries, job.cluster.stall_seconds, job.cluster.shard_rows) == (2, 7, 3)


@pytest.mark.parametrize(
    "text", ["a: [", "a: b: c", "\tx: 1", "a: 1\n--- \nb: 2", "a: \0", "[" * 5000]
)
def test_broken_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    assert str(caught.value).startswith(f"{path}: not valid YAML: ")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_nothing(tmp_path: Path) -> None:
    path = good_yaml(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_job(path) == parse_job(job_data("model", "in", "out"))


def test_a_configuration_as_json_writes_it(tmp_path: Path) -> None:
    """Which escapes an emoji as two halves."""
    data = job_data("model", "in", "out")
    data["recipe"]["input"]["prompt"] = {"constant": "Is it \U0001f600, \xe9 or \u20ac?"}
    text = json.dumps(data)
    assert "\\ud83d\\ude00" in text
    job = load_job(written(tmp_path, text))
    assert job.recipe.input.prompt.constant == "Is it \U0001f600, \xe9 or \u20ac?"


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ude00\\ud83d", "a\\ud83db"])
def test_half_a_character_is_refused_with_its_line(tmp_path: Path, half: str) -> None:
    path = written(tmp_path, f'output: o\nrecipe:\n  x: "{half}"\n')
    with pytest.raises(ConfigError, match=r"a lone surrogate.* \(line 3, column 6\)"):
        load_job(path)


@pytest.mark.parametrize(
    "path", ["output", "recipe.input.prompt.constant", "recipe.input.keep", "recipe.input.uri"]
)
def test_what_is_no_text_is_refused_with_its_key(path: str) -> None:
    """As bytes of a shell are that are not UTF-8."""
    bad = "caf\udce9"
    message = refusal(path, [bad] if path.endswith("keep") else {"constant": bad}.get(path, bad))
    assert message.startswith(f"{path}: 'caf\\udce9' is not text: a lone surrogate")


@pytest.mark.parametrize("lines", [7, 40])
def test_a_few_lines_do_not_make_gigabytes(tmp_path: Path, lines: int) -> None:
    """Aliases of lists of aliases, written out, would."""
    text = "x0: &x0 [lol,lol,lol,lol,lol,lol,lol,lol,lol]\n"
    for number in range(1, lines):
        nine = ",".join([f"*x{number - 1}"] * 9)
        text += f"x{number}: &x{number} [{nine}]\n"
    text += f"output: *x{lines - 1}\nrecipe: {{input: {{keep: *x{lines - 1}}}}}\n"
    with pytest.raises(ConfigError) as caught:
        load_job(written(tmp_path, text))
    assert len(str(caught.value)) < 10_000


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
def test_a_place_that_would_become_another_is_refused(key: str, place: str, reported: str) -> None:
    message = refusal(key, place)
    assert message.startswith(f"{key}: {place!r}")
    assert reported in message


def test_an_image_root_that_would_become_another_is_refused() -> None:
    assert "did you mean 's3://b/x'?" in refusal("recipe.input.image_roots", ["/ok", "s3:/b/x"])


@pytest.mark.parametrize(
    "place",
    ["s3://b/a$x", "C:/x", "a:b/c", "x/a$b", "~/x", "zip://a::s3://b/c.zip", "hf:a/b?split=c", "$"],
)
def test_a_place_that_only_looks_odd_is_taken(place: str) -> None:
    assert parse_job(data_with("recipe.input.uri", place)).recipe.input.uri == place


def test_a_number_where_text_belongs_is_to_be_quoted() -> None:
    message = refusal("recipe.model.revision", 1234567)
    assert message.endswith("(in quotes it is text); got 1234567")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text", "3"])
def test_yaml_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match="expected keys output, recipe, cluster"):
        load_job(path)


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = written(tmp_path, f"output: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_job(path)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_job(good_yaml(tmp_path), [f"cluster.tries=!!python/object/apply:os.mkdir ['{mark}']"])
    assert not mark.exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: No such file"):
        load_job(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_job(tmp_path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"output: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        load_job(path)


CHANGES: dict[str, object] = {
    "model.path": "other",
    "model.revision": "main",
    "model.dtype": "float16",
    "compression.method": "random",
    "compression.retention": 0.26,
    "compression.temperature": 9,
    "compression.positions": "original",
    "compression.newlines": "none",
    "compression.allow_code": True,
    "generation.max_new_tokens": 9,
    "generation.temperature": 0.1,
    "generation.top_p": 0.9,
    "generation.seed": 1,
    "generation.stop_token_ids": [7],
    "generation.max_repeats": 4,
    "generation.repetition_penalty": 1.2,
    "generation.ignore_model_rules": ["no_repeat_ngram_size"],
    "audit.share": 0.01,
    "audit.escalate": [0.5],
    "audit.min_similarity": 0.9,
    "input.uri": "elsewhere",
    "input.image": "picture",
    "input.prompt": {"column": "prompt"},
    "input.keep": ["id"],
    "input.image_roots": ["/images"],
    "input.max_image_bytes": 5,
    "input.max_image_pixels": 5,
}
"""Every recipe setting that has a choice, and another value of it."""

ONE_CHOICE = {
    "compression.source_sha256",  # where the method is gc2ray's; see test_method_source.py
    "model.adapter",
    "model.quantization",
}


def test_the_changes_cover_every_setting() -> None:
    recipe = parse_job(job_data("model", "in", "out")).recipe
    settings = {f"{a}.{b}" for a, values in recipe.model_dump().items() for b in values}
    assert settings == {*CHANGES, *ONE_CHOICE}


@pytest.mark.parametrize("path", CHANGES)
def test_every_setting_changes_the_fingerprint_and_the_difference(path: str) -> None:
    found = data_with(f"recipe.{path}", CHANGES[path])
    if path == "audit.escalate":  # only what is audited can be answered anew
        found["recipe"]["audit"]["share"] = 0.5
    before = data_with("recipe.audit.share", 0.5 if path == "audit.escalate" else 0.0)
    stored, yours = parse_job(before).recipe, parse_job(found).recipe
    assert stored.fingerprint() != yours.fingerprint()
    lines = recipe_difference(stored, yours)
    assert lines
    assert all(line.startswith(f"recipe.{path}") for line in lines)


def test_the_cluster_and_the_output_do_not_change_the_fingerprint() -> None:
    a = parse_job(job_data("model", "in", "out"))
    data = job_data("model", "in", "elsewhere")
    data["cluster"] = {"workers": 7, "kv_tokens": 9, "views_per_batch": 1, "tries": 9}
    b = parse_job(data)
    assert a.recipe.fingerprint() == b.recipe.fingerprint()
    assert recipe_difference(a.recipe, b.recipe) == []


def test_a_default_said_aloud_is_the_same_recipe() -> None:
    data = data_with("recipe.compression.temperature", 10)
    data["recipe"]["input"]["keep"] = []
    recipe = parse_job(job_data("model", "in", "out")).recipe
    assert parse_job(data).recipe.fingerprint() == recipe.fingerprint()


def test_the_difference_is_readable() -> None:
    stored = parse_job(job_data("model", "in", "out")).recipe
    data = data_with("recipe.compression.retention", 0.5)
    data["recipe"]["input"]["prompt"] = {"column": "question"}
    assert recipe_difference(stored, parse_job(data).recipe) == [
        "recipe.compression.retention: 0.25 (stored) -> 0.5 (yours)",
        "recipe.input.prompt.column: None (stored) -> 'question' (yours)",
        "recipe.input.prompt.constant: 'What is in the picture?' (stored) -> None (yours)",
    ]


def test_a_recipe_survives_its_json() -> None:
    recipe = parse_job(data_with("recipe.input.keep", ["id"])).recipe
    again = parse_recipe(recipe.model_dump(mode="json"))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


def test_a_job_needs_no_cluster() -> None:
    data = job_data("model", "in", "out")
    del data["cluster"]
    assert parse_job(data) == Job(output="out", recipe=parse_job(data).recipe, cluster=Cluster())


def test_a_default_spelled_out_is_the_same_recipe() -> None:
    """So a setting that a later version adds leaves old recipes what they are."""
    plain = parse_job(job_data("model", "in", "out")).recipe
    spelled = parse_job(data_with("recipe.compression.temperature", 10.0)).recipe
    assert plain.fingerprint() == spelled.fingerprint()


def test_local_paths_are_made_absolute_and_urls_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    data = job_data("model", "in/*.parquet", "out")
    data["recipe"]["input"]["image_roots"] = ["photos", "s3://bucket/photos"]
    located = parse_job(data).located()
    assert located.output == f"{tmp_path}/out"
    assert located.recipe.model.path == f"{tmp_path}/model"
    assert located.recipe.input.uri == f"{tmp_path}/in/*.parquet"
    assert located.recipe.input.image_roots == (f"{tmp_path}/photos", "s3://bucket/photos")
    for model in ("somebody/model", "s3://bucket/model", "zip://model::s3://bucket/model.zip"):
        remote = parse_job(job_data(model, "s3://bucket/in", "s3://bucket/out"))
        assert remote.located() == remote


def test_a_model_in_the_home_directory_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    job = parse_job(job_data("~/model", "in", "out"))
    assert job.located().recipe.model.path == f"{tmp_path}/model"
    assert parse_job(job_data("./m", "in", "out")).located().recipe.model.path == str(
        Path("m").absolute()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "in/*.parquet"}, "recipe.input.uri: 'in/*.parquet'"),
        (
            {"input__image_roots": ["s3://images", "~/images"]},
            "recipe.input.image_roots: '~/images'",
        ),
        ({"model": "./model"}, "recipe.model.path: './model'"),
        ({"output": "out"}, "output: 'out'"),
    ],
)
def test_paths_of_this_machine_mean_nothing_on_another(
    changes: dict[str, object], message: str
) -> None:
    places = {"model": "hub/model", "source": "/data/in", "output": "s3://bucket/out"}
    make_job(**places).check_portable()
    job = make_job(**{**places, **changes})
    with pytest.raises(ConfigError, match=re.escape(message)):
        job.check_portable()


def test_a_job_written_as_yaml_is_read_back_the_same(tmp_path: Path) -> None:
    job = make_job("hub/model", "/data/in", "s3://bucket/out", compression__retention=0.1)
    (tmp_path / "job.yaml").write_text(job.to_yaml())
    assert load_job(tmp_path / "job.yaml") == job


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
def test_true_and_false_are_no_numbers(tmp_path: Path, path: str, value: str) -> None:
    """Retention `on` would be 1, and nothing compressed."""
    with pytest.raises(ConfigError, match=rf"{path}: true and false .* are not valid here; got"):
        load_job(good_yaml(tmp_path), [f"{path}={value}"])


def test_a_character_that_there_is_none_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a valid character"):
        load_job(written(tmp_path, 'output: "\\UFFFFFFFF"'))
