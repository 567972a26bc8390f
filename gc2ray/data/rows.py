"""`RowReader`: checks the columns of an input, and makes the requests of its rows.

A row has a request for each of its prompts. A problem of a row becomes a fault of its requests; a
problem of any file's schema is refused before a row is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa

from gc2ray.core.config.input import InputConfig, PromptConfig
from gc2ray.core.errors import BadRow, ConfigError, Status
from gc2ray.core.records import ImageRef, Request
from gc2ray.core.shards import row_key
from gc2ray.data.column_types import (
    carries_bytes,
    in_common,
    is_image,
    is_list,
    is_prompt,
    reads_as_text,
    sturdy,
)

Record = Mapping[str, pa.Scalar]


class RowReader:
    """Rows of a recipe's input, for any format of files.

    Attributes:
        columns: Names of the columns that are read.
    """

    def __init__(self, config: InputConfig) -> None:
        self.columns = config.columns()
        self._config = config
        self._prompt = config.prompt
        self._kept = tuple(config.kept().items())

    def check(
        self, schema: pa.Schema, source: str, folders: Mapping[str, pa.DataType]
    ) -> pa.Schema:
        """Check the columns of a file, with those that its folders spell out, and return them.

        Args:
            schema: Schema of the file.
            source: Name of the file.
            folders: Types of the columns that folders of the input spell out.

        Raises:
            ConfigError: A column is missing, ambiguous, or of a wrong type; the message names the
                file.
        """
        columns = pa.schema([_field(schema, name, source, folders) for name in self.columns])
        self._check_types(columns, source)
        return columns

    def kept_columns(self, files: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
        """The columns that are written back, with types that fit the values of all files.

        Args:
            files: Names of the files, and their columns as `check` returns them.

        Raises:
            ConfigError: No type fits a column in all files; the message names two files.
        """
        return pa.schema([pa.field(name, _shared(column, files)) for name, column in self._kept])

    def _check_types(self, columns: pa.Schema, source: str) -> None:
        def check(key: str, name: str, fits: Callable[[pa.DataType], bool], expected: str) -> None:
            kind = columns.field(name).type
            if not fits(kind):
                message = f"recipe.input.{key}: column {name!r} is {kind} in {source}"
                raise ConfigError(f"{message}; expected {expected}")

        prompt, image = self._prompt, self._config.image
        if image is not None:
            kinds = "a struct of bytes and path, binary, or a path; or a list of them"
            check("image", image, is_image, kinds)
            self._check_roots(columns.field(image).type, source)
        if prompt.column is not None:
            several = "string, or list<string> for several prompts per row"
            check("prompt.column", prompt.column, is_prompt, several)
        for name in prompt.columns() if prompt.template is not None else ():
            check("prompt.template", name, reads_as_text, "text, numbers, booleans or times")

    def _images(self, record: Record) -> tuple[ImageRef, ...]:
        """The images of a row.

        Raises:
            BadRow: They cannot be read, or are missing.
        """
        name = self._config.image
        if name is None:
            return ()
        value = _value(record, name, Status.BAD_IMAGE)
        if is_list(record[name].type):
            return _listed(value, name)  # type: ignore[arg-type]  # a list, by its type
        return (_image(value),)

    def _check_roots(self, kind: pa.DataType, source: str) -> None:
        if not (carries_bytes(kind) or self._config.image_roots):
            raise ConfigError(
                f"recipe.input.image_roots: column {self._config.image!r} is {kind} in {source}: "
                "images by path are read from below image_roots only, and none is set; set it to "
                "the directories or URLs of the images"
            )

    def requests(self, source: str, row: int, record: Record) -> Iterator[Request]:
        """The requests of one row; kept columns stay Arrow scalars, so that they do not change."""
        images: tuple[ImageRef, ...] = ()
        trouble: BadRow | None = None
        try:
            images = self._images(record)
        except BadRow as error:
            trouble = error
        prompt = self._prompt
        kept = ((name, record[column]) for name, column in self._kept)
        kept_columns = {name: cell for name, cell in kept if cell.is_valid}
        listed = prompt.column is not None and is_list(record[prompt.column].type)
        texts = list(_texts(prompt, record)) if listed else [_text(prompt, record)]
        for index, text in enumerate(texts):
            fault = text if isinstance(text, BadRow) else None
            if trouble is not None:  # one each, because raising an exception changes it
                fault = BadRow(trouble.status, trouble.message)
            yield Request(
                row_key=row_key(source, row, index if listed else None),
                source=source,
                row=row,
                images=images,
                prompts=(text,) if isinstance(text, str) and fault is None else (),
                kept_columns=kept_columns,
                fault=fault,
                prompt_index=index,
                prompt_count=len(texts),
            )


def _listed(cells: Sequence[object] | None, name: str) -> tuple[ImageRef, ...]:
    """The images of a list; none of an empty one.

    Raises:
        BadRow: The list or an image in it is null.
    """
    if cells is None:
        raise BadRow(
            Status.BAD_IMAGE, f"image column {name!r} is null; an empty list is a row without image"
        )
    for index, cell in enumerate(cells, start=1):
        if cell is None:
            raise BadRow(Status.BAD_IMAGE, f"image {index} of {len(cells)} is null")
    return tuple(map(_image, cells))


def _value(record: Record, name: str, status: Status) -> object:
    """A cell as a Python value.

    Raises:
        BadRow: Python has no such value: text that is not UTF-8, a date out of range.
    """
    try:
        return record[name].as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise BadRow(status, f"column {name!r} cannot be read: {error}") from error


def _texts(prompt: PromptConfig, record: Record) -> Iterator[str | BadRow]:
    """The prompts of a row with a list of them: at least one, so that no row is lost."""
    name = str(prompt.column)
    prompts = record[name].values
    if not prompts:
        problem = "is null" if prompts is None else "holds no prompt"
        yield BadRow(Status.BAD_PROMPT, f"prompt column {name!r} {problem}")
        return
    for index, element in enumerate(prompts):
        if element.is_valid:
            yield _text(prompt, {name: element})
        else:
            yield BadRow(Status.BAD_PROMPT, f"prompt {index} in column {name!r} is null")


def _text(prompt: PromptConfig, record: Record) -> str | BadRow:
    """The text of a prompt, or why there is none."""
    try:
        values = {name: _value(record, name, Status.BAD_PROMPT) for name in prompt.columns()}
        return prompt.render(values)
    except BadRow as error:
        return error


def _image(cell: object) -> ImageRef:
    """The image of a cell (struct of bytes and path, bytes, or path); empty for other values."""
    if isinstance(cell, Mapping):
        return ImageRef(data=cell.get("bytes"), path=cell.get("path"))
    if isinstance(cell, bytes):
        return ImageRef(data=cell)
    if isinstance(cell, str):
        return ImageRef(path=cell)
    return ImageRef()


def _field(
    schema: pa.Schema, name: str, source: str, folders: Mapping[str, pa.DataType]
) -> pa.Field:
    """A column of a file, or of its folders.

    Raises:
        ConfigError: There is none, or several.
    """
    count = schema.names.count(name)
    if count > 1:
        raise ConfigError(f"recipe.input: {source} has several columns {name!r}")
    if count and name in folders:
        raise ConfigError(
            f"recipe.input: {name!r} is a column of {source}, and folders named '{name}=…' make "
            "a column of the same name; rename one of them"
        )
    if count:
        return schema.field(name)
    if name in folders:
        return pa.field(name, folders[name])
    there = [*schema.names, *folders]
    near = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(there)}"
    raise ConfigError(f"recipe.input: no column {name!r} in {source}; {hint}")


def _shared(column: str, files: Sequence[tuple[str, pa.Schema]]) -> pa.DataType:
    """A type that fits a column's values in all files."""
    shared: pa.DataType = pa.null()
    first = ""
    for source, columns in files:
        own = columns.field(column).type
        common = in_common(shared, own)
        if common is None or not _casts(own, sturdy(common)):
            raise ConfigError(
                f"recipe.input.keep: column {column!r} is {own} in {source} and {shared} in "
                f"{first}; cast it in the input, or do not keep it"
            )
        first = first if shared.equals(common) else source
        shared = common
    return sturdy(shared)


def _casts(own: pa.DataType, shared: pa.DataType) -> bool:
    try:
        return bool(own.equals(shared) or pa.nulls(0, own).cast(shared).type.equals(shared))
    except (pa.ArrowException, NotImplementedError):
        return False
