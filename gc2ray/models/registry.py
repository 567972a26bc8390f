"""Model architectures, one file each.

To add one: a class with the methods of `gc2ray.models.base.ModelAdapter` in a file of its own in
`families/`, a line in `FAMILIES` under the config's `model_type`, and the same `model_type` in
`checkpoint.consistency.MODEL_TYPES`. The parity tests run over the registry's tiny models.
"""

from __future__ import annotations

from gc2ray.models.families.llava_next import LlavaNext

FAMILIES: dict[str, type[LlavaNext]] = {"llava_next": LlavaNext}
