"""Which models gc2ray answers with: facts about them, and typical checkpoints of each.

The table is for people: `gc2ray models` prints it, and it decides nothing. It is read without torch
and transformers, so it repeats what the code behind them says; tests hold it to that. Hub ids,
sizes and licences are from memory and were not looked up: they are marked as unverified wherever
they are printed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gc2ray.core.config.compression import CLASSLESS_SCORE, Score
from gc2ray.core.errors import ConfigError
from gc2ray.models.checkpoint.consistency import MODEL_TYPES
from gc2ray.models.checkpoint.family_rules import FAMILY_RULES
from gc2ray.models.checkpoint.unsupported import (
    CONVERSIONS,
    NOT_YET,
    UNSUPPORTED,
    why_unsupported,
)

NATIVE_LANGUAGES = ("llama", "mistral", "qwen2", "qwen3", "granite")
"""Language models that gc2ray's own decoder runs: `gc2ray.models.llama.MODEL_TYPES`."""


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of one kind on the Hugging Face hub; all of it unverified.

    Attributes:
        name: Their hub ids, with braces in the place of the size; a single one may have none.
        sizes: As the hub ids spell them.
        licence: Their licence in short.
    """

    name: str
    sizes: tuple[str, ...]
    licence: str

    @property
    def hub_ids(self) -> tuple[str, ...]:
        """Each of them."""
        return tuple(self.name.format(size) for size in self.sizes)

    @property
    def pattern(self) -> str:
        """All in one text, as a shell would expand it."""
        sizes = ",".join(self.sizes)
        return self.name.format(sizes if len(self.sizes) == 1 else f"{{{sizes}}}")


@dataclass(frozen=True)
class KnownModel:
    """Models of one line, with the same vision tower and kind of decoder.

    Attributes:
        model_type: The `model_type` in their config.json.
        name: What their authors call them.
        tower: Model type of the vision tower.
        languages: Model types of the language models inside.
        checkpoints: Typical ones.
        measured: Whether the compression's settings were measured on a model of this line.
    """

    model_type: str
    name: str
    tower: str
    languages: tuple[str, ...]
    checkpoints: tuple[Checkpoints, ...]
    measured: bool = False

    @property
    def sizes(self) -> tuple[str, ...]:
        """Sizes of the typical checkpoints, small ones first."""
        sizes = {size.upper() for each in self.checkpoints for size in each.sizes}
        return tuple(sorted(sizes, key=_parameters))

    @property
    def decoder(self) -> str:
        """What runs the language model: gc2ray's own decoder, or stock transformers."""
        return "native" if {*self.languages} <= {*NATIVE_LANGUAGES} else "generate"

    @property
    def score(self) -> Score:
        """The score that tokens are ranked by, where the recipe names none."""
        has_class_token = FAMILY_RULES[self.model_type].towers[self.tower] == "default"
        return "class_token" if has_class_token else CLASSLESS_SCORE

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        data = asdict(self) | {"decoder": self.decoder, "default_score": self.score}
        del data["checkpoints"]
        data["unverified_checkpoints"] = [
            {"hub_ids": each.hub_ids, "sizes": each.sizes, "licence": each.licence}
            for each in self.checkpoints
        ]
        return data


@dataclass(frozen=True)
class SupportedModels:
    """Models that gc2ray answers with, and those that it refuses.

    Attributes:
        models: Those that it answers with, line by line.
        refused: Why it does not with others, by `model_type`.
        not_yet: Types of `refused` that may be supported one day.
    """

    models: tuple[KnownModel, ...]
    refused: Mapping[str, str]
    not_yet: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        models = [model.to_dict() for model in self.models]
        return {"models": models, "not_yet": self.not_yet, "refused": dict(self.refused)}


def supported_models(model_type: str | None = None) -> SupportedModels:
    """The models that gc2ray answers with, and why not with others.

    Args:
        model_type: Only models of this type; None: all.

    Raises:
        ConfigError: Nothing is known of models of this type.
    """
    known = {*MODEL_TYPES, *UNSUPPORTED, *CONVERSIONS}
    if model_type is not None and model_type not in known:
        raise ConfigError(_unknown(model_type, sorted(known)))
    listed = known if model_type is None else {model_type}
    refused = sorted(listed - {*MODEL_TYPES})
    return SupportedModels(
        tuple(model for model in KNOWN_MODELS if model.model_type in listed & {*MODEL_TYPES}),
        {kind: _why_refused(kind) for kind in refused},
        tuple(kind for kind in refused if UNSUPPORTED.get(kind) == NOT_YET),
    )


def _why_refused(kind: str) -> str:
    """The reason as a sentence about the type, which is named before it."""
    if kind not in UNSUPPORTED:
        return str(why_unsupported({"model_type": kind}))
    clauses = UNSUPPORTED[kind].split(", and ")
    for relative, subject in (("which ", "it "), ("whose ", "its ")):
        clauses = [
            subject + clause.removeprefix(relative) if clause.startswith(relative) else clause
            for clause in clauses
        ]
    return ", and ".join(clauses)


def _parameters(size: str) -> float:
    """What a size says: all parameters, where a second number is of the active ones."""
    whole = size.partition("-")[0]
    return float(whole[:-1]) * {"M": 1e6, "B": 1e9}[whole[-1]]


def _unknown(model_type: str, known: list[str]) -> str:
    if "/" in model_type:
        return (
            f"MODEL_TYPE: {model_type!r} looks like a checkpoint; give the model_type in its "
            "config.json, or see whether a job with it passes `gc2ray check`"
        )
    near = difflib.get_close_matches(model_type.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`gc2ray models` lists those that are known"
    return (
        f"MODEL_TYPE: nothing is known of {model_type!r}, which should be the model_type in a "
        f"model's config.json; {hint}"
    )


KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        "llava_next", "LLaVA-NeXT", "clip_vision_model", ("llama", "mistral"),
        (
            Checkpoints("llava-hf/llava-v1.6-vicuna-{}-hf", ("7b", "13b"), "Llama 2"),
            Checkpoints("llava-hf/llava-v1.6-mistral-{}-hf", ("7b",), "Apache-2.0"),
            Checkpoints("llava-hf/llama3-llava-next-{}-hf", ("8b",), "Llama 3"),
            Checkpoints("llava-hf/llava-v1.6-{}-hf", ("34b",), "Apache-2.0"),
        ),
        measured=True,
    ),
    KnownModel(
        "llava_next", "Granite Vision 3", "siglip_vision_model", ("granite",),
        (Checkpoints("ibm-granite/granite-vision-3.3-{}", ("2b",), "Apache-2.0"),),
    ),
    KnownModel(
        "llava_onevision", "LLaVA-OneVision", "siglip_vision_model", ("qwen2",),
        (
            Checkpoints(
                "llava-hf/llava-onevision-qwen2-{}-ov-hf", ("0.5b", "7b"), "Apache-2.0"
            ),
            Checkpoints("llava-hf/llava-onevision-qwen2-{}-ov-hf", ("72b",), "Tongyi Qianwen"),
        ),
    ),
    KnownModel(
        "internvl", "InternVL3", "internvl_vision", ("qwen2",),
        (
            Checkpoints(
                "OpenGVLab/InternVL3-{}-hf", ("1B", "2B", "8B", "14B", "38B", "78B"), "MIT + Qwen's"
            ),
        ),
    ),
    KnownModel(
        "internvl", "InternVL3.5", "internvl_vision", ("qwen3",),
        (
            Checkpoints(
                "OpenGVLab/InternVL3_5-{}-HF", ("1B", "2B", "4B", "8B", "14B", "38B"),
                "MIT + Qwen's",
            ),
        ),
    ),
    KnownModel(
        "internvl", "InternVL3.5 MoE", "internvl_vision", ("qwen3_moe",),
        (Checkpoints("OpenGVLab/InternVL3_5-{}-HF", ("30B-A3B", "241B-A28B"), "MIT + Qwen's"),),
    ),
    KnownModel(
        "idefics3", "Idefics3", "idefics3_vision", ("llama",),
        (Checkpoints("HuggingFaceM4/Idefics3-{}-Llama3", ("8B",), "Apache-2.0"),),
    ),
    KnownModel(
        "idefics3", "SmolVLM", "idefics3_vision", ("llama",),
        (
            Checkpoints("HuggingFaceTB/SmolVLM-{}-Instruct", ("256M", "500M"), "Apache-2.0"),
            Checkpoints("HuggingFaceTB/SmolVLM-Instruct", ("2.2B",), "Apache-2.0"),
        ),
    ),
    KnownModel(
        "smolvlm", "SmolVLM2", "smolvlm_vision", ("llama",),
        (
            Checkpoints(
                "HuggingFaceTB/SmolVLM2-{}-Video-Instruct", ("256M", "500M"), "Apache-2.0"
            ),
            Checkpoints("HuggingFaceTB/SmolVLM2-{}-Instruct", ("2.2B",), "Apache-2.0"),
        ),
        measured=True,
    ),
)  # fmt: skip
"""Lines of models, those of one type together."""
