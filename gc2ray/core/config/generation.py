"""`GenerationConfig`: how answers are generated, and which settings of a model's files count.

It is the section `recipe.generation` of a job; decoders get it too, with the seed of each answer.
`RULES` are the settings of a model's `generation_config.json` that change answers. A model that
sets one is refused unless the recipe follows the rule or overrides it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, field_validator

from gc2ray.core.config.compression import Score
from gc2ray.core.config.yaml_models import (
    Frozen,
    unknown_key,
)

RULES: dict[str, object] = {
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": [], "force_words_ids": [],
    "constraints": [], "sequence_bias": {}, "suppress_tokens": [], "begin_suppress_tokens": [],
    "forced_bos_token_id": None, "forced_eos_token_id": None, "forced_decoder_ids": [],
    "min_length": 0, "min_new_tokens": 0, "exponential_decay_length_penalty": None,
    "stop_strings": [], "guidance_scale": 1, "watermarking_config": None, "penalty_alpha": 0,
    "dola_layers": None, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0,
    "token_healing": False,
}  # fmt: skip
"""Rules of a generation config that change which token is next, each with the value that changes
nothing. None of them is followed because a model asks for it."""
OTHER_SETTINGS = frozenset({
    # How tokens are drawn and how many: the recipe's to say.
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "renormalize_logits", "max_length", "max_new_tokens", "max_time",
    "num_return_sequences",
    # Of beams, and nothing without `num_beams`.
    "early_stopping", "length_penalty", "low_memory",
    # Which tokens they are. The first is followed (`gc2ray.models.checkpoint.consistency`).
    "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id",
    # How the same tokens are found: caches, compilation, guessing ahead.
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size",
    "compile_config", "disable_compile", "continuous_batching_config", "use_mtp", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "assistant_ensemble_weight",
    "target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type",
    # What is given back, and of which software. Logits that are not finite fail their row.
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "remove_invalid_values", "transformers_version",
})  # fmt: skip
"""Everything else that a generation config may say; it changes no answer of ours."""


class GenerationConfig(Frozen):
    """How answers are sampled, and where they end.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Tokens are sampled from the fewest whose probabilities add up to this.
        seed: Seed of the run, combined with each row's own.
        stop_token_ids: Ids of tokens that end an answer, in addition to the model's own.
        max_repeats: An answer whose last tokens (a run of up to 64, at least 16 in all) repeat
            more often than this is cut there; its `finish_reason` is `repetition`. None: never.
        repetition_penalty: Divides the logits of tokens that are already in prompt or answer
            (multiplies negative ones), as in transformers. None is 1, no penalty.
        ignore_model_rules: Names of rules in the model's generation_config.json that answers need
            not follow. Any other rule that gc2ray does not follow is refused.
    """

    max_new_tokens: int = Field(default=64, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    max_repeats: int | None = Field(default=None, gt=0)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    ignore_model_rules: tuple[str, ...] = ()

    @field_validator("ignore_model_rules")
    @classmethod
    def _check_rule_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in RULES:
                raise ValueError(unknown_key(name, sorted(RULES)))
        return names

    def taken_over(self) -> TakenOver:
        """Settings that the recipe decides instead of the model's files."""
        own = {"repetition_penalty"} if self.repetition_penalty is not None else set()
        return TakenOver(frozenset(self.ignore_model_rules) | own, self.stop_token_ids)

    @property
    def penalty(self) -> float:
        """The repetition penalty; 1 if there is none."""
        return 1.0 if self.repetition_penalty is None else self.repetition_penalty

    def mixed(self, seed: int) -> int:
        """A row's or an image's seed, mixed with the recipe's."""
        return seed ^ self.seed

    def with_seed(self, seed: int) -> GenerationConfig:
        """The same settings with the seed of one answer."""
        return self.model_copy(update={"seed": seed})


@dataclass(frozen=True)
class TakenOver:
    """Settings that a recipe decides instead of the model's files.

    Attributes:
        rules: Names of generation rules.
        stop_token_ids: Tokens that end an answer, beside the model's own.
        score: How patches are scored; None: as the model's family does.
        method: What compresses the model's images; None: nothing is known of it.
    """

    rules: frozenset[str] = frozenset()
    stop_token_ids: tuple[int, ...] = ()
    score: Score | None = None
    method: str | None = None


def rules_in(settings: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The rules that a model's files ask for.

    Args:
        settings: Settings of the files that may have rules; later ones override earlier ones.
    """
    rules: dict[str, object] = {}
    for name, idle in RULES.items():
        for some in settings:
            if some.get(name) not in (None, idle, [], {}):
                rules[name] = some[name]
    return rules


NOTHING = TakenOver()
