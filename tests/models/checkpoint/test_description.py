"""What a model's files say of end tokens and added tokens, and in which of them it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gc2ray.core.config.generation import NOTHING
from gc2ray.core.errors import ConfigError
from gc2ray.models import loading
from gc2ray.models.checkpoint.consistency import check_directory
from tests.support.model_files import (
    CONFIG,
    GENERATION,
    TEXT,
    TOKENIZER,
    Change,
    all_of,
    edited,
    without,
)


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        (edited(GENERATION, eos_token_id=[5, 6]), (5, 6)),
        (all_of(edited(GENERATION, eos_token_id=None), edited(*TEXT, eos_token_id=7)), (7,)),
        (
            all_of(
                without(GENERATION), edited(*TEXT, eos_token_id=7), edited(CONFIG, eos_token_id=9)
            ),
            (7,),
        ),
        (all_of(without(GENERATION), edited(*TEXT, eos_token_id=[7, 8])), (7, 8)),
        (all_of(without(GENERATION), edited(*TEXT, eos_token_id=None)), (1,)),
        (
            all_of(
                without(GENERATION),
                edited(*TEXT, eos_token_id=None),
                edited(CONFIG, eos_token_id=9),
            ),
            (9,),
        ),
    ],
)
def test_the_first_file_with_end_tokens_decides(
    model: Path, change: Change, ends: tuple[int, ...]
) -> None:
    """The generation config, the text config as written, the config, the tokenizer."""
    change(model)
    assert check_directory(model).ends == ends
    loaded = loading.load(str(model), revision=None, dtype="float32", device="cpu")
    assert loaded.end_tokens == ends


@pytest.mark.parametrize(
    ("written", "is_there"),
    [({"eos_token": "A"}, True), ({"eos_token": None, "tokenizer_class": "Llama"}, False)],
)
def test_an_end_token_of_the_tokenizer_alone_is_found_at_loading(
    model: Path, written: dict[str, object], is_there: object
) -> None:
    """One of the vocabulary's, and one that a class may have: files alone do not tell."""
    without(GENERATION)(model)
    edited(*TEXT, eos_token_id=None)(model)
    edited(TOKENIZER, **written)(model)
    assert check_directory(model).ends == ()
    if is_there:
        loaded = loading.load(str(model), revision=None, dtype="float32", device="cpu")
        assert loaded.end_tokens == (loaded.processor.tokenizer.convert_tokens_to_ids("A"),)
    else:
        with pytest.raises(ConfigError, match="no token is named that ends an answer"):
            loading.load(str(model), revision=None, dtype="float32", device="cpu")


def test_most_of_a_large_tokenizer_is_not_parsed(model: Path) -> None:
    """What lies behind the added tokens may be anything, here: a decoy, and no end."""
    text = (model / "tokenizer.json").read_text()
    decoy = json.dumps({"note": '"added_tokens": [] '})[:-1]
    start = text.index('"added_tokens"')
    end = text.index('"normalizer"')
    (model / "tokenizer.json").write_text(f'{decoy}, {text[start:end]} "model": ')
    found = check_directory(model, NOTHING)
    assert found.tokens["<image>"] == 3
