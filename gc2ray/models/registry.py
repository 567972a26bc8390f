"""Model architectures by the `model_type` of their config.

To add one: a `gc2ray.models.base.ModelAdapter` in a file of its own in `families/`, a line in
`FAMILIES`, and the same `model_type` in `checkpoint.consistency.MODEL_TYPES`. `families/tiny.py`
makes tiny checkpoints of LLaVA-NeXT, with which tests compare an adapter with stock transformers;
another architecture needs tiny checkpoints of its own.
"""

from __future__ import annotations

from gc2ray.models.base import ModelAdapter
from gc2ray.models.families.llava_next import LlavaNext

FAMILIES: dict[str, type[ModelAdapter]] = {"llava_next": LlavaNext}
