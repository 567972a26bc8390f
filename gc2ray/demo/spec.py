"""The demo models' shapes, their tokenizers' words, and where trained weights lie.

The first is a stock `LlavaNextForConditionalGeneration`: views of 56 pixels in 8 x 8 patches, the
five crop grids of LLaVA-NeXT, a CLIP tower whose layer -2 makes the features. `jobs/train_demo.py`
trains it; the card in `model/README.md` says how well it does.

The second is a stock `SmolVLMForConditionalGeneration`, for the same pictures and questions: no
class token, 2 x 2 patches to a visual token, the thumbnail last, markers between views. Its views
are larger (84 pixels, 6 x 6 tokens) and images are cut into two rows or columns at most. With views
of 56 pixels and three of them along the longer side, of every ten things one would be cut between
two crops so that neither has 70 % of it; with two, things in wide images would be 7 pixels wide.
"""

from __future__ import annotations

from pathlib import Path

from gc2ray.demo.questions import CAPTION, COUNT, SIGN, family
from gc2ray.demo.scenes import COLOURS, KINDS
from gc2ray.models.families.idefics3 import ScaledCanvas
from gc2ray.models.families.tiny import TinySpec
from gc2ray.models.families.tiny_smolvlm import TinySmolVlmSpec
from gc2ray.models.image_processor import AnyRes

MODEL = Path(__file__).parent / "model"
"""Directory of the trained model, loadable by transformers."""
SMOLVLM_MODEL = Path(__file__).parent / "model_smolvlm"
"""Directory of the second; only in the repository, as `gc2ray demo` does not need it."""
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Crop grids (rows, columns) that occur."""


def demo_spec() -> TinySpec:
    """The model's sizes: 2.4 million parameters."""
    return TinySpec(
        image_size=56,
        patch_size=7,
        vision=(128, 5, 4),
        text=(192, 4, 6, 6),
        grids=GRIDS,
        activation="gelu",
        rope_theta=1e6,  # as in LLaVA-NeXT with Mistral: words match tokens far away
        corpus=_corpus(),
        vocabulary=512,
        spread=0.02,
    )


def smolvlm_spec() -> TinySmolVlmSpec:
    """The second model's sizes: 2.5 million parameters."""
    return TinySmolVlmSpec(
        tile=84,
        patch=7,
        scale=2,
        longest=168,
        vision=(128, 5, 4),
        text=(192, 4, 6, 6),
        rope_theta=1e6,
        corpus=(*map(_in_turns, _corpus()), *["\n\n"] * 4),
        vocabulary=550,
        spread=(0.05, 0.02),
    )


def demo_anyres() -> AnyRes:
    """How the model's processor cuts images (CLIP's mean and deviation, bicubic)."""
    spec = demo_spec()
    side = spec.image_size
    return AnyRes(
        tile=side,
        pinpoints=tuple((rows * side, columns * side) for rows, columns in GRIDS),
        resample=3,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        rescale=1 / 255,
    )


def smolvlm_cropping() -> ScaledCanvas:
    """How the second model's processor cuts images (mean and deviation of one half, Lanczos)."""
    spec, half = smolvlm_spec(), (0.5, 0.5, 0.5)
    return ScaledCanvas(
        tile=spec.tile, resample=1, mean=half, std=half, rescale=1 / 255, longest=spec.longest
    )


def _in_turns(text: str) -> str:
    """A text of the corpus as the second model's chat template spells roles and questions."""
    text = text.replace("USER", "User").replace(" ASSISTANT", "\nAssistant")
    return text.replace("? Where", "?\nWhere").replace("? Is", "?\nIs")


def _corpus() -> tuple[str, ...]:
    """Every word of questions and answers. Single digits only: a sign's two stay two tokens."""
    texts = [f"{text} ASSISTANT: yes no" for text in (CAPTION, COUNT, SIGN)]
    texts += ["USER: top left top right bottom left bottom right, a sign with and"]
    texts += [f"Which {family(kind)} is a {kind}? Where is the {kind}, {kind}" for kind in KINDS]
    texts += [f"What colour is the {name}? Is there a {name}" for name in COLOURS]
    return tuple(texts)
