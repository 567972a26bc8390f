"""`Model`: a loaded model in this process that answers images and prompts, without a job or Ray.

It brings images of any kind into the form of a job's rows and hands them to the same `Engine`, so
answers are those that a job with the same recipe gives.

Not covered: audits, which belong to jobs.
"""

from __future__ import annotations

import io
import os
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from gc2ray.core.config.job import Cluster, Job, parse_job
from gc2ray.core.config.locations import is_url
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.config.yaml_models import apply_override
from gc2ray.core.errors import BadRow, Status
from gc2ray.core.records import Answer, ImageRef, Request
from gc2ray.engine.device import cores, device_name
from gc2ray.engine.engine import Engine, load_recipe_model
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.loading import free_device_memory

ImageInput: TypeAlias = (
    "Image.Image | str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO "
    "| np.ndarray | Mapping[str, Any] | None"
)
_BYTES = (bytes, bytearray, memoryview)
_ONE_IMAGE = (Image.Image, str, os.PathLike, *_BYTES, np.ndarray, Mapping)
_LOSSLESS = {
    **dict.fromkeys(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "PNG"),
    **dict.fromkeys(("I", "F", "CMYK"), "TIFF"),
}
"""Format that keeps every pixel of an image, by Pillow's mode; other modes become RGB."""


class Model:
    """A model on the GPU of this process, or on its CPU; `gc2ray.load_model` makes one.

    A context manager: the device is free behind the `with` block, or after `close`. Calls of
    `answer` on several threads take turns.

    Attributes:
        recipe: Model, compression and generation settings.
        device: Name of the device that the model runs on.
    """

    def __init__(self, loaded: LoadedModel, recipe: Recipe, cluster: Cluster) -> None:
        self.recipe = recipe
        self.device = device_name(loaded.adapter.device)
        self._loaded: LoadedModel | None = loaded
        self._cluster = cluster
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    def answer(
        self,
        images: ImageInput | Iterable[ImageInput | Sequence[ImageInput]],
        prompts: str | Iterable[str],
    ) -> list[Answer]:
        """Answer one prompt about one image, or many of them.

        Give one image with many prompts, many images with one prompt, or equally many of both.

        Args:
            images: A PIL image, a path or URL, an image file as bytes or open (it is read from its
                start), an array of shape (height, width, 3) and dtype uint8, or a struct of bytes
                and path as in Parquet; or several of these. A list within the list is several
                images of one prompt, an empty one is a prompt about no image. URLs need a
                `recipe.input.image_roots` that covers them.
            prompts: Text, without the model's chat template; or several.

        Returns:
            One answer for each pair, in their order. An image or prompt that cannot be answered
            gets an answer with its `status` and `error`, and no exception.

        Raises:
            ValueError: The numbers of images and prompts do not fit.
            TypeError: An argument is neither an image nor text.
            RuntimeError: The model is closed.
            EngineDead: The device is lost.

        Example:
            >>> with gc2ray.load_model(MODEL) as model:
            ...     [answer] = model.answer("scene.png", "What is the digit?")
            >>> print(answer.status, answer.visual_tokens_kept < answer.visual_tokens_full)
            ok True
        """
        refs, texts = _paired(images, prompts)
        with self._lock:
            if self._loaded is None:
                raise RuntimeError("the model is closed; load it again with gc2ray.load_model")
            if self._engine is None:
                self._engine = Engine(self._loaded, self.recipe, self._cluster)
            pairs = enumerate(zip(refs, texts, strict=True))
            requests = [_request(row, given, text) for row, (given, text) in pairs]
            try:
                return answers_in_order(self._engine, requests)
            except BaseException as error:
                # Ctrl-C, say. Rows are left in the engine, so the next call makes a new one; the
                # frames of the traceback, which a notebook keeps, would hold the old one's memory.
                self._engine = None
                traceback.clear_frames(error.__traceback__)
                free_device_memory()
                raise

    def close(self) -> None:
        """Free the memory of the device; closing twice does nothing."""
        with self._lock:
            self._engine = self._loaded = None
        free_device_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        compression = self.recipe.compression
        state = f"on {self.device}" if self._loaded is not None else "closed"
        return (
            f"<gc2ray.Model {self.recipe.model.path}: {compression.method} at "
            f"retention {compression.retention_requested:g}, {state}>"
        )


def load_model(
    path: str | Path,
    *overrides: str,
    method: str = "globalcom2",
    retention: float = 0.25,
    max_new_tokens: int = 64,
    dtype: str = "bfloat16",
    revision: str | None = None,
) -> Model:
    """Load a model to answer images and prompts in this process; no Ray is involved.

    It runs on the first GPU that this process sees (`CUDA_VISIBLE_DEVICES`), and takes the memory
    of it that a worker would take; without a GPU it runs on all cores.

    Args:
        path: Directory, hub id or fsspec URL of the model.
        overrides: Any other setting of a job's `recipe` or `cluster`, as
            `"recipe.generation.temperature=0.7"` or `"cluster.gpus_per_worker=0.5"`.
        method: Compression method; `"none"` keeps every visual token.
        retention: Fraction of the visual tokens that is kept, in (0, 1].
        max_new_tokens: Longest answer, in tokens.
        dtype: Dtype of the weights: `"bfloat16"`, `"float16"` or `"float32"`.
        revision: Commit or tag of a model of the hub.

    Raises:
        ConfigError: A setting cannot be used, or the model cannot be loaded.
        OSError: The model cannot be downloaded now.

    Example:
        >>> model = gc2ray.load_model(MODEL, retention=0.5, max_new_tokens=8)
        >>> answers = model.answer("scene.png", ["What is the digit?", "What is the letter?"])
        >>> [answer.to_dict()["status"] for answer in answers]
        ['ok', 'ok']
        >>> model.close()
    """
    rows = {"uri": ".", "prompt": {"column": "prompt"}, "image_roots": ["/"]}  # of a job alone
    data: dict[str, Any] = {
        "output": ".",
        "recipe": {
            "model": {"path": os.fspath(path), "dtype": dtype, "revision": revision},
            "compression": {"method": method, "retention": retention},
            "generation": {"max_new_tokens": max_new_tokens},
            "input": rows,
        },
        "cluster": {"cpus_per_worker": cores()},
    }
    for override in overrides:
        apply_override(Job, data, override)
    job = parse_job(data)
    return Model(load_recipe_model(job.recipe, job.cluster), job.recipe, job.cluster)


def answers_in_order(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """The answers of an engine in the order of the requests."""
    order = {request.row_key: at for at, request in enumerate(requests)}
    return sorted(engine.stream(requests), key=lambda answer: order[answer.request.row_key])


def _request(row: int, given: Sequence[ImageRef | BadRow], prompt: str) -> Request:
    """The pair as a row; its key, and so its seed, is the same in every call."""
    failure = next((image for image in given if isinstance(image, BadRow)), None)
    if failure is None and not prompt.strip():
        failure = BadRow(Status.BAD_PROMPT, "the prompt is empty")
    images = tuple(image for image in given if isinstance(image, ImageRef))
    return Request(f"{row}", "", row, images, (prompt,), fault=failure)


def _paired(images: Any, prompts: Any) -> tuple[list[list[ImageRef | BadRow]], list[str]]:
    """The images of each prompt, and prompts, as lists of one length; an image is encoded once."""
    refs = [
        [_image_ref(image) for image in (given if isinstance(given, list | tuple) else [given])]
        for given in _as_list(images, _ONE_IMAGE)
    ]
    texts = list(_as_list(prompts, (str, *_BYTES, Mapping)))
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a prompt is text, not {type(text).__name__}")
    if len(refs) == 1:
        refs *= len(texts)
    elif len(texts) == 1:
        texts *= len(refs)
    if len(refs) != len(texts):
        raise ValueError(
            f"{len(refs)} images and {len(texts)} prompts: give one of either, or equally many; "
            "several images of one prompt are a list within the list"
        )
    return refs, texts


def _as_list(given: Any, single: tuple[type, ...]) -> list[Any]:
    is_one = given is None or isinstance(given, single) or hasattr(given, "read")
    return [given] if is_one or not isinstance(given, Iterable) else list(given)


def _image_ref(image: Any) -> ImageRef | BadRow:
    """An image as the engine reads it; a `BadRow` where it cannot be one.

    Raises:
        TypeError: It is of no kind that holds an image.
    """
    match image:
        case None:
            return ImageRef()
        case {"bytes": data, "path": path}:  # as a row of Parquet has it
            return _image_ref(path if data is None else data)
        case bytes() | bytearray() | memoryview():
            return ImageRef(data=bytes(image))
        case str() | os.PathLike():
            return _at(image)
        case _ if hasattr(image, "read"):
            return _read(image)
        case np.ndarray():
            return _from_array(image)
        case Image.Image():
            return _encoded(lambda: ImageOps.exif_transpose(image))
    deep = "; a list within the list holds one prompt's images, and no more lists"
    raise TypeError(
        "an image is a PIL image, a path, bytes, an open file or a numpy array, not "
        f"{type(image).__name__}{deep if isinstance(image, list | tuple) else ''}"
    )


def _at(location: str | os.PathLike[str]) -> ImageRef:
    if isinstance(location, str) and is_url(location):
        return ImageRef(path=location)
    return ImageRef(path=str(Path(location).expanduser().absolute()))


def _from_array(pixels: np.ndarray) -> ImageRef | BadRow:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        problem = f"an array of shape {pixels.shape} and dtype {pixels.dtype}"
        return BadRow(Status.BAD_IMAGE, f"{problem}; expected (height, width, 3) of uint8")
    return _encoded(lambda: Image.fromarray(np.ascontiguousarray(pixels)))


def _read(file: Any) -> ImageRef | BadRow:
    """The content of an open file from its start, as Pillow reads it."""
    if isinstance(file, io.TextIOBase):
        raise TypeError("an image file is opened for reading bytes, with mode 'rb'")
    try:
        if hasattr(file, "seek") and (not hasattr(file, "seekable") or file.seekable()):
            file.seek(0)
        data = bytes(file.read())
    except Exception as error:  # noqa: BLE001 - the object is the caller's
        return BadRow(Status.BAD_IMAGE, f"the image cannot be read: {error}")
    return ImageRef(data=data)


def _encoded(make: Any) -> ImageRef | BadRow:
    """An image as the bytes of a file that loses nothing; quickly, not small."""
    buffer = io.BytesIO()
    try:
        image = make()
        kind = _LOSSLESS.get(image.mode)
        image = image if kind else image.convert("RGB")
        image.save(buffer, kind or "PNG", **({} if kind == "TIFF" else {"compress_level": 1}))
    except (OSError, ValueError, SyntaxError, SystemError) as error:
        return BadRow(Status.BAD_IMAGE, f"the image cannot be read: {error}")
    return ImageRef(data=buffer.getvalue())
