"""`RowReader`: which columns an input must have, and the requests of one of its rows.

A row has a request for each of its prompts. What is wrong with a row is a fault of its requests;
what is wrong with a schema is refused before anything is read.

Not covered: several images in a row.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

import pyarrow as pa

from gc2ray.config import InputConfig
from gc2ray.errors import BadRow, ConfigError, Status
from gc2ray.prompts import PromptSource
from gc2ray.records import ImageRef, Request
from gc2ray.shards import row_key

Record = Mapping[str, pa.Scalar]


class RowReader:
    """Rows of a recipe's input, whatever their files are.

    Attributes:
        columns: Those that are read.
    """

    def __init__(self, config: InputConfig) -> None:
        self.columns = config.columns()
        self._config = config
        self._prompt = config.prompt.source()

    def check(self, schema: pa.Schema) -> pa.Schema:
        """The columns of the first file, if they will do.

        Raises:
            ConfigError: One is missing, there twice, or of another type.
        """
        _check_columns(schema, self._config)
        _check_types(schema, self._config)
        return pa.schema([schema.field(name) for name in self.columns])

    def check_same(self, expected: pa.Schema, found: pa.Schema, source: str) -> None:
        """Hold another file against the first one's columns.

        Raises:
            ConfigError: It has not the same; the message names it.
        """
        for item in expected:
            index = found.get_field_index(item.name)
            if index < 0:
                raise ConfigError(f"recipe.input: {source} has no column {item.name!r}")
            if item.name in self._config.keep and found.field(index).type != item.type:
                raise ConfigError(
                    f"recipe.input.keep: column {item.name!r} is {found.field(index).type} in "
                    f"{source} and {item.type} in the first file"
                )

    def carried(self, schema: pa.Schema) -> pa.Schema:
        """The columns that are written back."""
        kept = [schema.field(name) for name in self._config.keep]
        return pa.schema([item.with_nullable(nullable=True) for item in kept])

    def requests(self, source: str, row: int, record: Record) -> Iterator[Request]:
        """One row; kept columns stay Arrow scalars, so that they come out as they went in."""
        images: tuple[ImageRef, ...] = ()
        trouble: BadRow | None = None
        try:
            images = (_image(_value(record, self._config.image, Status.BAD_IMAGE)),)
        except BadRow as error:
            trouble = error
        prompt = self._prompt
        carried = {name: record[name] for name in self._config.keep if record[name].is_valid}
        listed = prompt.column is not None and _is_list(record[prompt.column].type)
        texts = list(_texts(prompt, record)) if listed else [_text(prompt, record)]
        for index, text in enumerate(texts):
            fault = text if isinstance(text, BadRow) else None
            if trouble is not None:  # a new one each, because raising an exception changes it
                fault = BadRow(trouble.status, trouble.message)
            yield Request(
                row_key=row_key(source, row, index if listed else None),
                source=source,
                row=row,
                images=images,
                prompts=(text,) if isinstance(text, str) and fault is None else (),
                carried=carried,
                fault=fault,
                prompt_index=index,
                prompt_count=len(texts),
            )


def _value(record: Record, name: str, status: Status) -> object:
    """A cell as Python has it.

    Raises:
        BadRow: Python cannot have it: text that is not UTF-8, a date out of range.
    """
    try:
        return record[name].as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise BadRow(status, f"column {name!r} cannot be read: {error}") from error


def _texts(prompt: PromptSource, record: Record) -> Iterator[str | BadRow]:
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


def _text(prompt: PromptSource, record: Record) -> str | BadRow:
    """The text of a prompt, or why there is none."""
    try:
        values = {name: _value(record, name, Status.BAD_PROMPT) for name in prompt.columns()}
        return prompt.render(values)
    except BadRow as error:
        return error


def _image(cell: object) -> ImageRef:
    """An image cell: struct of bytes and path, bytes, or a path; anything else is no image."""
    if isinstance(cell, Mapping):
        return ImageRef(data=cell.get("bytes"), path=cell.get("path"))
    if isinstance(cell, bytes):
        return ImageRef(data=cell)
    if isinstance(cell, str):
        return ImageRef(path=cell)
    return ImageRef()


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(lists or pa.types.is_fixed_size_list(kind))


def _is_prompt(kind: pa.DataType) -> bool:
    return _is_text(kind) or (_is_list(kind) and _is_text(kind.value_type))


def _check_columns(schema: pa.Schema, config: InputConfig) -> None:
    for name in config.columns():
        if name not in schema.names:
            near = difflib.get_close_matches(name, schema.names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(schema.names)}"
            raise ConfigError(f"recipe.input: no column {name!r} in the input; {hint}")
        if schema.names.count(name) > 1:
            raise ConfigError(f"recipe.input: the input has several columns {name!r}")


def _check_types(schema: pa.Schema, config: InputConfig) -> None:
    kind = schema.field(config.image).type
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    struct = pa.types.is_struct(kind) and any(f.name in ("bytes", "path") for f in kind)
    if not (binary or struct or _is_text(kind)):
        raise ConfigError(
            f"recipe.input.image: column {config.image!r} is {kind}; expected a struct of bytes "
            "and path, binary, or a path"
        )
    has_bytes = binary or (struct and kind.get_field_index("bytes") >= 0)
    if not (has_bytes or config.image_roots):
        raise ConfigError(
            f"recipe.input.image_roots: column {config.image!r} is {kind}: images by path, which "
            "are read from below image_roots only, and none is set; name the directories or URLs "
            "that they are in"
        )
    column = config.prompt.column
    if column is not None and not _is_prompt(schema.field(column).type):
        kind = schema.field(column).type
        raise ConfigError(
            f"recipe.input.prompt.column: column {column!r} is {kind}; expected string, or "
            "list<string> for several prompts per image"
        )
