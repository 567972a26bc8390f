"""Rules that a model's generation config may have for which token is next, and who decides on them.

Answers follow none of them because a model's files ask for it: a model that has one is refused
(`gc2ray.models.checkpoint.consistency`) unless the recipe takes it over.

Not covered: following them; `repetition_penalty` is the decoders', where a recipe sets it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class TakenOver:
    """What a recipe decides in place of the model's files.

    Attributes:
        rules: Names of generation rules.
        stop_token_ids: Tokens that end an answer, beside the model's own.
    """

    rules: frozenset[str] = frozenset()
    stop_token_ids: tuple[int, ...] = ()


NOTHING = TakenOver()


def asked_for(places: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The rules that a model's files ask for.

    Args:
        places: Where they may stand; the last has the last word.
    """
    found: dict[str, object] = {}
    for name, idle in RULES.items():
        for place in places:
            if place.get(name) not in (None, idle, [], {}):
                found[name] = place[name]
    return found
