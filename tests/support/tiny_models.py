"""Which tiny models the tests have."""

from __future__ import annotations

from gc2ray.models.families.tiny import TinySpec

SPECS = {
    "vicuna": TinySpec(),
    "mistral": TinySpec(backbone="mistral", text=(48, 2, 4, 2), seed=1),
    "llama3": TinySpec(text=(64, 2, 8, 2), seed=2),
    "one-crop": TinySpec(grids=((1, 1), (1, 2)), seed=3),
}
