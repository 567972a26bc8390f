"""The commands as a user types them: output and exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from typer.testing import CliRunner

from gc2ray import __version__
from gc2ray.cli.app import app
from tests.support.commands import ROOT, gc2ray, job_file, run_command, start
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.object_servers import a_bucket
from tests.support.outputs import first_plan, parts, write_round
from tests.support.rows import prompts_of, question_list


def test_version() -> None:
    result = gc2ray("--version")
    assert (result.returncode, result.stdout) == (0, f"gc2ray {__version__}\n")


def test_no_arguments_show_the_commands() -> None:
    result = gc2ray()
    assert all(name in result.stdout + result.stderr for name in ("run", "status", "check"))


COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]


def test_help_fits_a_terminal_of_80_columns() -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["--help"], prog_name="gc2ray")
    assert max(map(len, result.stdout.splitlines())) <= 80
    lines = result.stdout.partition("Commands")[2].splitlines()
    listed = [line.split()[1] for line in lines if re.match("│ [a-z]", line)]
    assert listed == COMMANDS, "each in one line"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_is_a_sentence_and_fits(command: str) -> None:
    words = [command, "--help"]
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, words, prog_name="gc2ray")
    assert max(map(len, result.stdout.splitlines())) <= 80
    (callback,) = [c.callback for c in app.registered_commands if c.callback.__name__ == command]
    assert re.fullmatch(r"[A-Z][^.\n]{15,60}\.", callback.__doc__)


def test_a_shell_completes_commands_and_options() -> None:
    for text, completions in (("gc2ray ver", ["verify"]), ("gc2ray verify --de", ["--deep"])):
        words = {"COMP_WORDS": text, "COMP_CWORD": str(text.count(" "))}
        shell = CliRunner(env={"_GC2RAY_COMPLETE": "complete_bash", **words})
        assert shell.invoke(app, [], prog_name="gc2ray").stdout.split() == completions


def test_completion_is_installed(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("gc2ray")
    done = subprocess.run(
        ["bash", "-c", f"{script} --install-completion; exit $?"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    installed = (tmp_path / ".bash_completions" / "gc2ray.sh").read_text()
    assert "_GC2RAY_COMPLETE=complete_bash" in installed
    assert "gc2ray.sh" in (tmp_path / ".bashrc").read_text()


def test_an_unknown_key_is_refused_with_its_path_and_the_nearest(tmp_path: Path) -> None:
    path = job_file(tmp_path, tmp_path)
    result = run_command("run", path, "recipe.compression.retentoin=0.1")
    assert result.exit_code == 2
    assert result.stderr == (
        "configuration: recipe.compression.retentoin: unknown 'retentoin'; "
        "did you mean 'retention'?\n"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.input.uri=/nowhere", "no Parquet files at /nowhere"),
        ("recipe.model.path=/nowhere", "recipe.model.path: there is no model in /nowhere"),
        ("recipe.input.image=imag", "no column 'imag' in a.parquet; did you mean 'image'?"),
        ("output=nosuch://bucket/run", "output: Protocol not known: nosuch"),
        ("recipe.input.keep=[row_key]", "'row_key' is a column of the answers"),
        ("recipe.generation.stop_token_ids=[123456]", "stop_token_ids is token 123456, and the"),
    ],
)
def test_a_bad_job_is_refused_before_ray(
    tmp_path: Path,
    tiny_paths: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    message: str,
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    result = run_command("run", job_file(tmp_path, tiny_paths["vicuna"]), override)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_custom_method_is_allowed_on_the_command_line(
    tmp_path: Path, tiny_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    path = job_file(tmp_path, tiny_paths["vicuna"])
    method = "recipe.compression.method=custom_method:CenterCrop"
    refused = run_command("check", path, method, "--rows", 4)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "set recipe.compression.allow_code: true" in refused.stderr
    allowed = run_command("check", path, method, "recipe.compression.allow_code=true", "--rows", 4)
    assert allowed.exit_code == 0, allowed.output


@pytest.mark.ray
@pytest.mark.timeout(480)
def test_a_run_with_a_method_in_the_working_directory(
    tmp_path: Path, tiny_paths: dict[str, Path]
) -> None:
    """Through the console script, which does not put that directory on the Python path."""
    path = job_file(tmp_path, tiny_paths["vicuna"])
    shutil.copy(ROOT / "examples" / "custom_method.py", tmp_path)
    job = json.loads(path.read_text())
    job["recipe"]["compression"] |= {"method": "custom_method:CenterCrop", "allow_code": True}
    path.write_text(json.dumps(job))
    script = "import sys; sys.path.remove(''); from gc2ray.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "run", path],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert {row["method"] for row in rows} == {"center-crop"}


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("estimate", "--output-tokens"),
        ("estimate", "--hours"),
        ("tune", "--retention"),
        ("tune", "--min-agreement"),
        ("tune", "--min-accuracy"),
        ("tune", "--budget-usd"),
        ("tune", "--usd-per-hour"),
        ("report", "--usd-per-hour"),
    ],
)
def test_no_option_takes_nan_or_infinity(command: str, option: str, number: str) -> None:
    result = run_command(command, "job.yaml", option, number)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr


def test_status_without_a_run(tmp_path: Path) -> None:
    result = run_command("status", tmp_path / "empty")
    assert result.exit_code == 2
    assert "there is no run here" in result.stderr


def test_verify(tmp_path: Path) -> None:
    write_round(tmp_path, 0, first_plan())
    for words in (["verify", tmp_path], ["verify", tmp_path, "--deep"]):
        result = run_command(*words)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.endswith("complete: 17 of 17 planned rows are answered\n")
    for number in range(30):
        (tmp_path / f"data/notes-{number:02d}.txt").touch()
    result = run_command("verify", tmp_path)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert "data/notes-19.txt: is no planned shard's part; move it away" in lines
    assert lines[-2:] == ["and 10 more", "damaged: 17 of 17 planned rows are answered"]


def test_verify_distinguishes_incomplete_from_wrong_outputs(tmp_path: Path) -> None:
    write_round(tmp_path, 0, first_plan())
    parts(tmp_path)[1].unlink()
    result = run_command("verify", tmp_path)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-2:] == [
        "shard 1 (3 rows): not answered yet; run again",
        "incomplete: 14 of 17 planned rows are answered",
    ]


def test_compact(tmp_path: Path) -> None:
    write_round(tmp_path / "out", 0, first_plan())
    result = run_command("compact", tmp_path / "out", tmp_path / "dest", "--file-mb", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        f"17 answers to 17 rows, 0 of them failed, in 1 file: {tmp_path}/dest\n"
    )
    assert pq.read_table(tmp_path / "dest/part-00000.parquet").num_rows == 17
    result = run_command("compact", tmp_path / "out", tmp_path / "dest")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"configuration: {tmp_path}/dest: holds a finished dataset; choose another destination\n"
    )


def test_compact_of_an_incomplete_run(tmp_path: Path) -> None:
    write_round(tmp_path / "out", 0, first_plan())
    parts(tmp_path / "out")[1].unlink()
    result = run_command("compact", tmp_path / "out", tmp_path / "dest")
    assert result.exit_code == 2
    assert "shard 1 (3 rows): not answered yet; run again; pass --incomplete" in result.stderr
    result = run_command("compact", tmp_path / "out", tmp_path / "dest", "--incomplete")
    assert result.exit_code == 0
    assert result.stdout.startswith("14 answers to 14 rows, 0 of them failed")


def test_verify_without_a_run(tmp_path: Path) -> None:
    result = run_command("verify", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"configuration: {tmp_path}: there is no run here (no run.json)\n"


def test_the_last_line_is_json_as_all_others_are(tmp_path: Path) -> None:
    result = run_command("--log", "json", "verify", tmp_path)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2
    assert json.loads(line)["message"].startswith(f"configuration: {tmp_path}: there is no run")


LISTS = "recipe.input.prompt={column: prompts}"


@pytest.fixture(scope="module")
def finished(
    tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a run of twelve rows, for reading only, and what was seen of it."""
    folder = tmp_path_factory.mktemp("finished")
    path = job_file(folder, tiny_paths["vicuna"], max_bad_rows=1)  # lists have nulls
    return folder, gc2ray("run", path, LISTS)


@pytest.mark.ray
@pytest.mark.timeout(480)
def test_run_then_status(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """With lists of prompts, too, rows are rows of the input; answers are counted beside them."""
    folder, result = finished
    assert result.returncode == 0, result.stderr
    assert "12 of 12" in result.stdout
    answers = sum(map(prompts_of, range(12)))
    assert re.search(rf"answers +│ +{answers} ", result.stdout)
    shutil.copytree(folder / "out", tmp_path / "out")
    status = run_command("status", tmp_path / "out")
    assert status.exit_code == 0
    assert "2 of 2 shards committed" in status.stdout
    assert "worker processes so far" in status.stdout
    sorted((tmp_path / "out" / "data").iterdir())[0].unlink()
    status = run_command("status", tmp_path / "out")
    assert status.exit_code == 1
    assert "6 rows are not committed" in status.stdout


def test_no_cluster_at_the_address(tmp_path: Path, tiny_paths: dict[str, Path]) -> None:
    result = gc2ray("run", job_file(tmp_path, tiny_paths["vicuna"]), "--address", "127.0.0.1:1")
    assert result.returncode == 2
    assert "cannot join a Ray cluster at 127.0.0.1:1: " in result.stderr
    assert "RAY_AUTH_MODE=token" in result.stderr


def test_a_home_that_cannot_be_written(
    tmp_path: Path, tiny_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray keeps a token there, unless it is told that it needs none."""
    monkeypatch.setenv("HOME", "/proc/self")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    result = gc2ray("run", job_file(tmp_path, tiny_paths["vicuna"]))
    assert result.returncode == 2
    assert "cannot start Ray on this machine: " in result.stderr
    assert "set RAY_AUTH_MODE=disabled, or HOME" in result.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(480)
def test_an_interrupted_run_resumes(tmp_path: Path, tiny_paths: dict[str, Path]) -> None:
    path = job_file(tmp_path, tiny_paths["vicuna"], rows=300)
    data, committed = tmp_path / "out" / "data", 0
    data.mkdir(parents=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        run, before, deadline = start("run", path), committed, time.monotonic() + 200
        while len(list(data.iterdir())) == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(number)
        _, stderr = run.communicate(timeout=400)
        committed = len(list(data.iterdir()))
        assert before < committed < 50, "it was in the middle"
        assert run.returncode == 130
        reported = stderr.splitlines()[-1]
        left = rf"interrupted: {50 - committed} shards are left to answer"
        abandoned = r"(; [12] in flight were abandoned)?; run the same command again to resume"
        assert re.fullmatch(left + abandoned, reported), reported
    result = run_command("verify", tmp_path / "out", "--deep")
    rows = len(pq.read_table(data))
    assert result.stdout.endswith(f"incomplete: {rows} of 300 planned rows are answered\n")
    assert rows == 6 * committed, "what was answered before is still there"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(480)
def test_everything_may_be_in_a_bucket(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    tiny_paths: dict[str, Path],
    proxy: FaultProxy,
) -> None:
    """Model, rows, images by path, answers and the dataset of them; the answers are the same."""
    folder, _ = finished
    table = pq.read_table(folder / "in" / "a.parquet")
    images = [image["bytes"] for image in table["image"].to_pylist()]
    names = pa.array([f"{number}.png" for number in range(len(images))])
    with a_bucket(proxy.host, proxy.port) as bucket:
        fs = s3fs.S3FileSystem()
        fs.put(f"{tiny_paths['vicuna']}/", f"{bucket}/model/", recursive=True)
        for name, image in zip(names.to_pylist(), images, strict=True):
            fs.pipe_file(f"{bucket}/photos/{name}", image)
        named = table.set_column(table.schema.get_field_index("image"), "image", names)
        with fs.open(f"{bucket}/in/a.parquet", "wb") as target:
            pq.write_table(named, target, row_group_size=6)
        data = json.loads((folder / "job.yaml").read_text()) | {"output": f"{bucket}/run"}
        data["recipe"]["model"]["path"] = f"{bucket}/model"
        data["recipe"]["input"] |= {"uri": f"{bucket}/in/", "image_roots": [f"{bucket}/photos"]}
        (tmp_path / "job.yaml").write_text(json.dumps(data))
        proxy.faults = Faults(busy=0.03, dropped=0.03, lost=0.1)
        result = gc2ray("run", tmp_path / "job.yaml", LISTS)
        assert result.returncode == 0, result.stderr
        assert run_command("verify", f"{bucket}/run", "--deep").exit_code == 0
        assert run_command("compact", f"{bucket}/run", f"{bucket}/dataset").exit_code == 0
        proxy.faults = Faults()
        rows = pq.read_table(f"{bucket[5:]}/dataset/part-00000.parquet", filesystem=fs)
    local = pq.read_table(folder / "out" / "data").sort_by(
        [("row", "ascending"), ("prompt_index", "ascending")]
    )
    for column in ("row_key", "answer", "status", "visual_tokens_kept"):
        assert rows[column].to_pylist() == local[column].to_pylist()
    assert len(rows) == sum(map(prompts_of, range(12)))


def test_check_compares_every_prompt_of_the_rows(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    path = job_file(tmp_path, tiny_paths["vicuna"])
    result = run_command("check", path, "recipe.input.prompt={column: prompts}", "--rows", "5")
    assert result.exit_code == 0, result.stderr
    questions = [text for row in range(5) for text in question_list(row) or [None]]
    good = sum(text is not None for text in questions)
    assert good > 5
    assert result.stdout.count("left out: a.parquet#") == len(questions) - good
    assert f"{min(8, good)} prompts at retention 1.0" in result.stdout
    assert f"{good} of {good} answers the same" in result.stdout


@pytest.mark.parametrize("newlines", ["kept_rows", "none"])
def test_check_passes_on_a_good_model(
    tiny_paths: dict[str, Path], tmp_path: Path, newlines: str
) -> None:
    """Whatever the recipe's packing is: stock is compared with stock's."""
    packing = f"recipe.compression.newlines={newlines}"
    result = run_command("check", job_file(tmp_path, tiny_paths["vicuna"]), packing, "--rows", "5")
    assert result.exit_code == 0, result.stderr
    assert "prompt tokens: 5 of 5 prompts the same" in result.stdout
    assert "5 of 5 answers and their ends" in result.stdout
    assert "peak memory" in result.stdout
    assert "5 of 5 answers the same" in result.stdout
    assert "passed" in result.stdout
