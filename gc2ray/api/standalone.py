"""What gc2ray does without a job and an output.

`gc2ray.load_model` comes from another module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gc2ray.models.checkpoint.known_models import SupportedModels


def supported_models(model_type: str | None = None) -> SupportedModels:
    """List the models that gc2ray answers with, and why it does not with others.

    Args:
        model_type: Only models of this type, as their config.json has it; None: all.

    Returns:
        `models` has them with their decoder, their default score and typical checkpoints, which
        are unverified; `refused` has reasons by type.

    Raises:
        ConfigError: Nothing is known of models of this type.

    Example:
        >>> [model.name for model in gc2ray.supported_models("llava_next").models]
        ['LLaVA-NeXT', 'Granite Vision 3']
        >>> "cross-attention" in gc2ray.supported_models("mllama").refused["mllama"]
        True
    """
    from gc2ray.models.checkpoint.known_models import supported_models as read

    return read(model_type)
