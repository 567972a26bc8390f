"""The Python API: lazy names, a model in this process, answers of outputs, and the examples."""

from __future__ import annotations

import doctest
import io
import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gc2ray
from gc2ray.core.errors import Status
from gc2ray.core.records import Answer
from gc2ray.demo.rows import DemoRow, Split, demo_rows, write_rows
from gc2ray.demo.spec import MODEL
from gc2ray.engine.engine import load_engine
from gc2ray.engine.local_model import Model
from gc2ray.models.chat_template import ChatPrompt
from tests.support.outputs import (
    all_ok,
    first_plan,
    latest_answers,
    parts,
    random_outcome,
    retry_of,
    write_round,
)
from tests.support.rows import SIZES, encoded, make_job, picture, requests

ROOT = Path(__file__).parents[1]
PROMPT = "What is in the picture?"
FUNCTIONS = [name for name in gc2ray.__all__ if name[0].islower()]


def python(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


# ------------------------------------------------------------------------------------- laziness


@pytest.mark.parametrize(
    "module",
    ["gc2ray", "gc2ray.api.jobs", "gc2ray.api.outputs", "gc2ray.api.standalone", "gc2ray.cli.app"],
)
def test_importing_loads_no_large_library(module: str) -> None:
    large = {"torch", "ray", "pyarrow", "pydantic", "numpy", "aiohttp", "rich", "transformers"}
    assert python(f"import sys, {module}; print({large} & {{*sys.modules}})") == "set()"


def test_importing_loads_little_of_the_standard_library() -> None:
    """What takes time is what is imported: a bare `import gc2ray` needs next to nothing."""
    script = "import sys; before = {*sys.modules}; import gc2ray; print({*sys.modules} - before)"
    assert len(python(script).split(",")) < 10


def test_names_are_listed_before_they_are_loaded() -> None:
    script = (
        "import gc2ray, sys; print({*gc2ray.__all__} <= {*dir(gc2ray)}, 'numpy' in sys.modules)"
    )
    assert python(script) == "True False"


def test_every_public_name_exists_and_is_documented() -> None:
    for name in gc2ray.__all__:
        assert getattr(gc2ray, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'ansver'"):
        _ = gc2ray.ansver  # type: ignore[attr-defined]


def test_no_public_name_is_that_of_a_module() -> None:
    """Python sets a module on its package once it is imported: the function would be gone."""
    modules = {path.stem for path in (ROOT / "gc2ray").iterdir()}
    assert {*gc2ray.__all__} & modules == set()


def test_editors_and_mypy_see_the_types() -> None:
    """Under `TYPE_CHECKING` the package imports every public name."""
    text = (ROOT / "gc2ray/__init__.py").read_text().partition("__all__ =")[0]
    seen = set(re.findall(r"\w+", text))
    assert {*gc2ray.__all__} - {"__version__"} <= seen


def test_the_command_line_calls_the_api_only() -> None:
    imported: set[str] = set()
    for path in (ROOT / "gc2ray/cli").glob("*.py"):
        imported.update(re.findall(r"(?:from|import) (gc2ray[.\w]*)", path.read_text()))
    others = {name for name in imported if not name.startswith("gc2ray.cli.")}
    assert others == {"gc2ray", "gc2ray.api", "gc2ray.demo.demo"}


# --------------------------------------------------------------------------- a model in a process


@pytest.fixture(scope="module")
def model(tiny_paths: dict[str, Path]) -> Iterator[Model]:
    with gc2ray.load_model(tiny_paths["vicuna"], dtype="float32", max_new_tokens=8) as model:
        yield model


@pytest.fixture(scope="module")
def expected(tiny_paths: dict[str, Path]) -> list[Answer]:
    """What a worker's engine says about the same images."""
    job = make_job(tiny_paths["vicuna"])
    return sorted(load_engine(job.recipe, job.cluster).stream(requests()), key=by_row)


def by_row(answer: Answer) -> int:
    return answer.request.row


def facts(answers: list[Answer]) -> list[tuple[Any, ...]]:
    return [(a.status, a.answer, a.token_ids, a.visual_tokens_kept, a.kv_bytes) for a in answers]


def saved(folder: Path, image: Image.Image) -> Path:
    path = folder / "image.png"
    path.write_bytes(encoded(image))
    return path


@pytest.mark.parametrize(
    "given",
    [
        lambda _, image: image,
        lambda _, image: encoded(image),
        lambda _, image: memoryview(encoded(image)),
        lambda _, image: io.BytesIO(encoded(image)),
        lambda folder, image: saved(folder, image).open("rb"),
        lambda _, image: {"bytes": encoded(image), "path": "a.png"},
        lambda folder, image: {"bytes": None, "path": str(saved(folder, image))},
        lambda folder, image: saved(folder, image),
        lambda folder, image: str(saved(folder, image)),
        lambda _, image: np.asarray(image),
        lambda _, image: np.asarray(image)[:, ::-1][:, ::-1],  # not contiguous
    ],
    ids=[
        "PIL",
        "bytes",
        "memoryview",
        "buffer",
        "open file",
        "struct of bytes",
        "struct of a path",
        "path",
        "str",
        "array",
        "view of an array",
    ],
)
def test_every_kind_of_image_gives_the_answer_of_a_job(
    model: Model,
    expected: list[Answer],
    tmp_path: Path,
    given: Callable[[Path, Image.Image], Any],
) -> None:
    for seed, size in enumerate(SIZES):
        answers = model.answer(given(tmp_path, picture(size, seed)), PROMPT)
        assert facts(answers) == facts(expected[seed : seed + 1])


def test_answers_come_in_the_order_of_images_and_prompts(
    model: Model, expected: list[Answer]
) -> None:
    images = [picture(size, seed) for seed, size in enumerate(SIZES)]
    assert facts(model.answer(images, PROMPT)) == facts(expected)
    assert facts(model.answer(iter(images), [PROMPT] * len(images))) == facts(expected)
    prompts = [PROMPT, "What color is it?", PROMPT]
    one, other, again = model.answer(images[0], prompts)
    assert facts([one]) == facts([again]) == facts(expected[:1])
    assert facts([other]) == facts(model.answer(images[0], prompts[1]))
    assert model.answer([], []) == []


def test_numbers_of_images_and_prompts_must_fit(model: Model) -> None:
    images = [picture((20, 30))] * 3
    with pytest.raises(ValueError, match="3 images and 2 prompts: give one of either, or equally"):
        model.answer(images, [PROMPT] * 2)
    with pytest.raises(TypeError, match="a prompt is text, not int"):
        model.answer(images, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a prompt is text, not dict"):
        model.answer(images, {"question": "What?"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="or a numpy array, not dict"):
        model.answer({"data": b"x"}, PROMPT)
    with pytest.raises(TypeError, match="a prompt is text, not bytes"):
        model.answer(images, b"What?")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bytes, an open file or a numpy array, not float"):
        model.answer([0.5], PROMPT)  # type: ignore[list-item]
    with pytest.raises(
        TypeError, match="not list; a list within the list holds one prompt's images"
    ):
        model.answer([[[images[0]]]], PROMPT)  # type: ignore[list-item]


def test_an_unanswerable_image_or_prompt_has_an_error(model: Model, tmp_path: Path) -> None:
    cut = Image.open(io.BytesIO(encoded(picture((100, 200)), "BMP")[:500]))
    closed = io.BytesIO(encoded(picture((20, 30))))
    closed.close()
    images = [
        picture((20, 30)), b"no image", tmp_path / "none.png", np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3)), None, cut, "https://example.org/a.png", closed,
    ]  # fmt: skip
    answers = model.answer(images, PROMPT)
    assert [answer.status for answer in answers] == [Status.OK] + [Status.BAD_IMAGE] * 8
    assert "no such image file" in str(answers[2].error)
    assert "shape (4, 4) and dtype uint8; expected (height, width, 3) of uint8" in str(answers[3])
    assert "dtype float64" in str(answers[4])
    assert "image is null" in str(answers[5])
    assert "image_roots" in str(answers[7])
    assert "closed file" in str(answers[8])
    with pytest.raises(TypeError, match="with mode 'rb'"):
        model.answer(io.StringIO("text"), PROMPT)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="with mode 'rb'"), Path(__file__).open() as text:
        model.answer(text, PROMPT)  # type: ignore[arg-type]
    assert [answer.status for answer in model.answer(images[0], ["", " ", PROMPT])] == [
        Status.BAD_PROMPT, Status.BAD_PROMPT, Status.OK,
    ]  # fmt: skip


class PathWithRead(type(Path())):  # type: ignore[misc]
    """A path that can also read its file, as those of some libraries."""

    def read(self) -> str:
        return self.read_text()


def test_a_file_is_read_from_its_start_each_time(
    model: Model, expected: list[Answer], tmp_path: Path
) -> None:
    image = picture(SIZES[0], 0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")  # its end is where it stands
    assert facts(model.answer([buffer, buffer], PROMPT)) == facts([expected[0]] * 2)
    assert facts(model.answer(PathWithRead(saved(tmp_path, image)), PROMPT)) == facts(expected[:1])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "HSV", "I;16", "I", "F"])
def test_modes_of_pillow(model: Model, mode: str) -> None:
    image = picture((30, 40))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) << 8)
    else:
        image = image.convert("L" if mode in ("I", "F") else "RGB").convert(mode)
    [answer] = model.answer(image, PROMPT)
    assert answer.status == Status.OK


def test_an_image_is_rotated_by_its_exif_orientation(model: Model, tmp_path: Path) -> None:
    image = picture((100, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    image.save(path, exif=exif, quality=95)
    with Image.open(path) as opened:
        assert facts(model.answer(opened, PROMPT)) == facts(model.answer(path, PROMPT))


def test_an_interrupted_call_does_not_affect_the_next(
    model: Model, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither rows nor memory, although a notebook keeps the traceback."""
    images = [picture(size, seed) for seed, size in enumerate(SIZES)]
    model.answer(images[0], PROMPT)
    assert model._engine is not None
    engines = [weakref.ref(model._engine)]
    calls = iter([False, False, True])

    def interrupted(chat: ChatPrompt, tokens: Sequence[int]) -> str:
        if next(calls):
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(ChatPrompt, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        model.answer(images, PROMPT)
    monkeypatch.undo()
    assert kept.value.__traceback__ is not None
    assert engines[0]() is None
    assert facts(model.answer(images, PROMPT)) == facts(expected)


def test_a_closed_model_cannot_answer(tiny_paths: dict[str, Path]) -> None:
    settings = ["recipe.generation.repetition_penalty=1.1", "cluster.views_per_batch=3"]
    model = gc2ray.load_model(
        tiny_paths["vicuna"], *settings, method="random", retention=0.5, dtype="float32"
    )
    with model:
        assert model.recipe.generation.repetition_penalty == 1.1
        assert "random at retention 0.5, on cpu" in repr(model)
    model.close()
    assert "closed" in repr(model)
    with pytest.raises(RuntimeError, match="the model is closed"):
        model.answer(picture((20, 30)), PROMPT)


def test_a_setting_that_does_not_exist_is_refused(tiny_paths: dict[str, Path]) -> None:
    with pytest.raises(gc2ray.ConfigError, match="did you mean 'globalcom2'"):
        gc2ray.load_model(tiny_paths["vicuna"], method="globalcom")
    with pytest.raises(gc2ray.ConfigError, match="did you mean 'temperature'"):
        gc2ray.load_model(tiny_paths["vicuna"], "recipe.generation.temprature=1")
    with pytest.raises(gc2ray.ConfigError, match="there is no model in"):
        gc2ray.load_model("/nowhere")


def test_answers_have_a_readable_repr(model: Model) -> None:
    good, bad = model.answer([picture((100, 200)), b"no image"], PROMPT)
    assert str(good) == good.answer
    assert re.fullmatch(
        r"Answer\(status='ok', answer='.*', visual_tokens=\d+ of \d+\)", repr(good), re.DOTALL
    )
    assert repr(bad).startswith("Answer(status='bad_image', error='not an image")
    assert str(bad).startswith("[bad_image] not an image")
    plain = good.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["prompt"], plain["answer"]) == (PROMPT, good.answer)
    assert plain.keys() == bad.to_dict().keys()


# ------------------------------------------------------------------------------ answers of outputs


@pytest.mark.parametrize("listed", [False, True])
def test_the_latest_answers_of_all_rounds_are_read(tmp_path: Path, *, listed: bool) -> None:
    plan = first_plan()
    write_round(tmp_path, 0, plan, random_outcome(1, 0, listed=listed), listed=listed)
    spans = [span for shard in plan.shards for span in shard.spans]
    write_round(
        tmp_path, 1, retry_of(spans), random_outcome(1, 1, listed=listed, dead=0.0), listed=listed
    )
    latest = latest_answers(tmp_path)
    rows = gc2ray.read_answers(str(tmp_path)).to_pylist()
    assert {row["row_key"]: row for row in rows} == latest
    assert len(rows) == len(latest)
    places = [(row["source"], row["row"], row["prompt_index"]) for row in rows]
    assert places == sorted(places)
    some = gc2ray.read_answers(str(tmp_path), ["answer", "id"])
    assert some.to_pylist() == [{"answer": row["answer"], "id": row["id"]} for row in rows]


def test_answers_of_an_incomplete_run_are_read(tmp_path: Path) -> None:
    write_round(tmp_path, 0, first_plan(), all_ok)
    parts(tmp_path)[1].unlink()
    assert gc2ray.read_answers(str(tmp_path)).num_rows == 14
    for part in parts(tmp_path):
        part.unlink()
    empty = gc2ray.read_answers(str(tmp_path), ["row_key", "tag"])
    assert (empty.num_rows, empty.column_names) == (0, ["row_key", "tag"])


def test_outputs_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(gc2ray.ConfigError, match="there is no run here"):
        gc2ray.read_answers(str(tmp_path))
    write_round(tmp_path, 0, first_plan())
    with pytest.raises(gc2ray.ConfigError, match="has no column 'anwser'"):
        gc2ray.read_answers(str(tmp_path), ["anwser"])
    parts(tmp_path)[0].write_bytes(b"PAR1")
    with pytest.raises(gc2ray.ConfigError, match="run `gc2ray verify` for details"):
        gc2ray.read_answers(str(tmp_path))


# ---------------------------------------------------------------------------------------- examples


EXAMPLES = [
    "supported_models", "load_model", "Model.answer", "load_job", "check", "estimate", "tune",
    "run", "read_answers", "status", "verify", "retry", "compact", "report", "show", "evaluate",
    "submit",
]  # fmt: skip
"""In an order in which they can be typed: what reads an output comes after the run."""


def example(name: str) -> doctest.DocTest:
    thing: Any = gc2ray
    for part in name.split("."):
        thing = getattr(thing, part)
    text = thing.__doc__ or ""
    names = {"gc2ray": gc2ray, "MODEL": str(MODEL)}
    return doctest.DocTestParser().get_doctest(text, names, name, None, 0)


def test_every_function_has_an_example() -> None:
    assert {*FUNCTIONS} - {"__version__"} <= {*EXAMPLES}
    assert all(example(name).examples for name in EXAMPLES)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_examples_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[DemoRow] = list(demo_rows(Split.TEST, 6, ()))
    write_rows(tmp_path / "in.parquet", iter(rows))
    (tmp_path / "scene.png").write_bytes(rows[0].image)
    job = make_job(MODEL, "in.parquet", "out", cluster__workers=1).model_dump(mode="json")
    job["recipe"]["input"] |= {"prompt": {"column": "question"}, "keep": ["reference"]}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner()
    for name in EXAMPLES:
        said: list[str] = []
        assert runner.run(example(name), out=said.append).failed == 0, "".join(said)
