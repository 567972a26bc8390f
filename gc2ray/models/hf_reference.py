"""The model in stock transformers, as the reference for parity checks and benchmarks.

`StockModel` is a checkpoint that transformers itself loaded. The `stock_` functions run a model
that gc2ray loaded, without its preprocessing, tower, packing or decoding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    BatchFeature,
    GenerationConfig,
    LlavaNextProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from gc2ray.compression.geometry import LITERAL
from gc2ray.core.config.generation import RULES
from gc2ray.core.errors import first_line
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.base import Family
from gc2ray.models.loading import free_device_memory, load_config, without_load_report
from gc2ray.models.processor import Processor, load_processor, processor_settings
from gc2ray.models.registry import family_of

Expand = Callable[..., Any]
"""Makes model inputs of images and text, as transformers' processors do."""


def stock_inputs(loaded: LoadedModel, images: Sequence[Image.Image], texts: Sequence[str]) -> Any:
    """The processor's model inputs; `texts` are rendered chat prompts with `<image>` in them."""
    tokenizer, config = loaded.processor.tokenizer, loaded.model.config
    bos = tokenizer.bos_token
    has_bos = bool(bos) and all(text.startswith(bos) for text in texts)
    inputs = stock_processor(tokenizer, loaded.processor.image_processor, config)(
        images=list(images),
        text=list(texts),
        padding=True,
        padding_side="left",
        add_special_tokens=not has_bos,
        return_tensors="pt",
    )
    return inputs.to(loaded.adapter.device, dtype=loaded.model.dtype)


def stock_processor(tokenizer: Any, image_processor: Any, config: Any) -> Any:
    """The processor of transformers' own for a model, made of its parts.

    It takes its numbers from the config, as files of 2024 lack some that transformers needs today.
    """
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_feature_select_strategy == "default"),
    )


@torch.inference_mode()
def stock_generate(
    loaded: LoadedModel, images: Sequence[Image.Image], texts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers of one padded batch: per row the new tokens, with padding behind the end."""
    inputs = stock_inputs(loaded, images, texts)
    output = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
    return new


@dataclass(frozen=True)
class StockSettings:
    """Settings of stock transformers; all others are those of the model's own files.

    Attributes:
        dtype: Dtype of the weights.
        device: Device that the model runs on.
        max_new_tokens: Longest answer.
        repetition_penalty: Replaces that of the files if it is not None.
        stop_token_ids: Further tokens that end an answer.
        ignored: Rules of generation_config.json that answers do not follow.
    """

    dtype: str
    device: str
    max_new_tokens: int
    repetition_penalty: float | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class StockAnswer:
    """Stock's answer to a prompt, on the host.

    Attributes:
        expanded_ids: The prompt's token ids, with what stands in the images' places.
        token_ids: The greedy answer, its end included.
        finish_reason: `stop` or `length`.
        text: The answer as its tokenizer writes it, without special tokens.
        logits: Logits after the last image's last token (the first token, where there is none),
            after every prompt token behind it, and after every token of the answer but the last,
            (P, vocabulary).
    """

    expanded_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    text: str
    logits: Tensor


class StockFailed(Exception):  # noqa: N818 - named like the project's other errors
    """Stock transformers cannot load or run the model; the message says why, in one line."""


class StockModel:
    """A checkpoint as transformers itself loads and runs it.

    The tokenizer makes the prompt from the chat template in the files; without one there, from its
    own. LLaVA-NeXT's placeholders are expanded by transformers' processor. Those of most other
    models need torchvision, for videos: there gc2ray expands them, and tower, language model and
    image processor are stock's. Use it in a `with`, which frees the model.

    Attributes:
        end_tokens: Token ids that end an answer.
        expands: Whether stock itself expands the placeholders.

    Args:
        directory: The checkpoint's directory.
        settings: Settings of the answers.

    Raises:
        StockFailed: Transformers cannot load it.
    """

    def __init__(self, directory: Path, settings: StockSettings) -> None:
        path, where = str(directory), {"trust_remote_code": False}
        with _raising_stock_failed():
            tokenizer: Any = AutoTokenizer.from_pretrained(path, **where)
            images = AutoImageProcessor.from_pretrained(path, backend="pil", **where)
            with _without_progress():
                model: Any = AutoModelForImageTextToText.from_pretrained(
                    path,
                    config=load_config(path, None),
                    dtype=getattr(torch, settings.dtype),
                    use_safetensors=True,
                    **where,
                )
            self._model = model.to(settings.device).eval()
            self._tokenizer = tokenizer
            _, self._template = processor_settings(path, None)
            self.expands = model.config.model_type == "llava_next"
            self._expand: Expand
            if self.expands:
                self._expand = stock_processor(tokenizer, images, model.config)
            else:
                self._expand = ExpandedInputs(model, load_processor(path, None))
            self._image_token_id = model.config.image_token_id
            self.end_tokens = _end_tokens(directory, tokenizer)
            self._follow(settings)

    def __enter__(self) -> StockModel:
        return self

    def __exit__(self, *_: object) -> None:
        """Free the model's memory on host and device."""
        self._model = None
        free_device_memory()

    def _follow(self, settings: StockSettings) -> None:
        """Make answers greedy, by the model's own rules unless the settings replace them.

        Other settings of the files (several answers to a prompt, a time limit) are not used, as
        gc2ray does not follow them.
        """
        own = self._model.generation_config
        rules = {name: getattr(own, name, None) for name in {*RULES} - {*settings.ignored}}
        self._stops = {*self.end_tokens, *settings.stop_token_ids}
        if settings.repetition_penalty is not None:
            rules["repetition_penalty"] = settings.repetition_penalty
        self._rules: Any = GenerationConfig(
            **{name: value for name, value in rules.items() if value is not None},
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=sorted(self._stops) or None,
            pad_token_id=min(self._stops, default=0),
            output_logits=True,
            return_dict_in_generate=True,
        )
        # `generate` takes settings that it is not given from here.
        self._model.generation_config = self._rules

    def special_token_in(self, text: str) -> str | None:
        """A special token that a text spells out, which stock reads as the token itself."""
        special = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
        return next((token for token in special if token.strip() and token.strip() in text), None)

    @torch.inference_mode()
    def answer(self, images: Sequence[Image.Image], text: str) -> StockAnswer:
        """The greedy answer to one prompt about images, or about none, and its logits.

        Raises:
            StockFailed: Transformers cannot run it.
        """
        with _raising_stock_failed():
            inputs = self._inputs(images, text)
            ids: list[int] = inputs["input_ids"][0].tolist()
            behind = ids[::-1].index(self._image_token_id) if images else len(ids) - 1
            output = self._model.generate(**inputs, generation_config=self._rules)
            read = self._model(**inputs, logits_to_keep=behind + 1).logits[0]
        written = [logits.to(read.dtype) for logits in output.logits[1:]]
        token_ids = tuple(output.sequences[0, len(ids) :].tolist())
        answer: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return StockAnswer(
            expanded_ids=tuple(ids),
            token_ids=token_ids,
            finish_reason="stop" if token_ids[-1] in self._stops else "length",
            text=answer.strip(),
            logits=torch.cat([read, *written]).cpu(),
        )

    def _inputs(self, images: Sequence[Image.Image], text: str) -> Any:
        content = [*[{"type": "image"}] * len(images), {"type": "text", "text": text}]
        prompt: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            add_generation_prompt=True,
            tokenize=False,
        )
        bos = self._tokenizer.bos_token
        inputs = self._expand(
            images=[list(images)] if images else None,
            text=[prompt],
            add_special_tokens=not (bos and prompt.startswith(bos)),
            return_tensors="pt",
        )
        return inputs.to(self._model.device, dtype=self._model.dtype)


class ExpandedInputs:
    """Inputs of a stock model whose own processor class cannot be loaded.

    Args:
        model: The model.
        processor: Its tokenizer, image processor and chat template.
    """

    def __init__(self, model: Any, processor: Processor) -> None:
        self._processor = processor
        self._family = family_of(model.config, processor)
        self._filler = int(model.config.image_token_id)
        self._takes = set(signature(model.forward).parameters)

    def __call__(
        self, images: Any, text: Sequence[str], *, add_special_tokens: bool, return_tensors: str
    ) -> BatchFeature:
        """The inputs of one prompt, as transformers' processors are called."""
        given = images[0] if images else []
        (ids,) = self._processor.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        expanded = torch.tensor([self.expanded(ids, [image.size[::-1] for image in given])])
        inputs = {"input_ids": expanded, "attention_mask": torch.ones_like(expanded)}
        if given:
            pixels = self._processor.image_processor(
                images=[given], return_tensors=return_tensors, **self._family.stock_arguments
            )
            inputs |= {name: value for name, value in pixels.items() if name in self._takes}
        return BatchFeature(inputs)

    def expanded(self, ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Token ids with each placeholder replaced by what stands for its image, of a size."""
        return expanded_ids(self._family, ids, sizes, self._filler)


def expanded_ids(
    family: Family, ids: Sequence[int], sizes: Sequence[tuple[int, int]], filler: int
) -> list[int]:
    """Token ids with each placeholder replaced by what stock writes for its image.

    Args:
        family: The model's family.
        ids: A prompt, one placeholder per image.
        sizes: The images' (height, width), in order.
        filler: What visual tokens and newlines are in the ids.
    """
    remaining, expanded = list(sizes), []
    for token in ids:
        if token != family.image_token_id:
            expanded.append(token)
            continue
        entries = family.geometry(remaining.pop(0), alone=len(sizes) == 1).entries.tolist()
        expanded += [LITERAL - entry if entry <= LITERAL else filler for entry in entries]
    return expanded


@contextmanager
def _raising_stock_failed() -> Iterator[None]:
    """Turn any error of transformers into a `StockFailed` of one line."""
    try:
        yield
    except Exception as error:
        raise StockFailed(f"{type(error).__name__}: {first_line(error)}") from error


@contextmanager
def _without_progress() -> Iterator[None]:
    """Without progress bars and the load report, as gc2ray reports problems of the same files."""
    bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with without_load_report():
            yield
    finally:
        if bars:
            enable_progress_bar()


def _end_tokens(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: of the first file that names any, else the tokenizer's end token.

    The files are read as they are written: config objects of transformers add defaults.
    """
    config = _json(directory / "config.json")
    configs = (
        _json(directory / "generation_config.json"), config.get("text_config") or {}, config
    )  # fmt: skip
    for ends in (*(config.get("eos_token_id") for config in configs), tokenizer.eos_token_id):
        if ends not in (None, []):
            return (ends,) if isinstance(ends, int) else tuple(ends)
    return ()


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return data
