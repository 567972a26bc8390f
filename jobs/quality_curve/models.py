"""The demo's models: where each lies, and what can be measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gc2ray.core.config.compression import CLASSLESS_SCORE, Newlines, Positions, Score
from gc2ray.demo.spec import MODEL, SMOLVLM_MODEL, demo_anyres, smolvlm_cropping
from gc2ray.models.families.idefics3 import ScaledCanvas
from gc2ray.models.image_processor import AnyRes

Grid = tuple[int, int]
Packing = tuple[Positions, Newlines]

PAPERS_PACKING: Packing = ("compact", "kept_rows")
METHODS = ("globalcom2", "local", "uniform", "random", "pool")
"""Those of all models; `downsample` is no method."""


@dataclass(frozen=True)
class DemoModel:
    """A model, and what can be measured on it.

    Attributes:
        name: Its `model_type`, which names it on the command line and in `docs/quality.json`.
        title: What the page calls it.
        directory: Where its files lie.
        about: What the page says of it.
        smaller: What `downsample` means on it.
        cropping: How it cuts images.
        methods: Methods that it can be compressed by, `globalcom2` first.
        scores: Scores that its tower can have; the paper's for such towers first.
        default_score: The one that it has where none is asked for.
        packings: Positions and newlines beside the paper's.
        low: Retentions at which methods and scores are compared row by row; at those `globalcom2`
            and `local` keep about as many tokens.
        grids: Crop grids (rows, columns) by which `globalcom2` and `local` are compared.
        has_markers: Whether literal tokens stand around its views.
    """

    name: str
    title: str
    directory: Path
    about: str
    smaller: str
    cropping: AnyRes | ScaledCanvas
    methods: tuple[str, ...]
    scores: tuple[Score, ...]
    default_score: Score
    packings: tuple[Packing, ...]
    low: tuple[float, ...]
    grids: Mapping[str, frozenset[Grid]]
    has_markers: bool = False

    @property
    def has_newlines(self) -> bool:
        """Whether it has learned newlines, which a packing can leave out."""
        return any(newlines != "kept_rows" for _, newlines in self.packings)

    @property
    def plot(self) -> str:
        """File name of its plot."""
        return f"quality-{self.name.replace('_', '-')}.svg"


LLAVA_NEXT = DemoModel(
    name="llava_next",
    title="LLaVA-NeXT",
    directory=MODEL,
    about="Views of 64 tokens, a class token, the thumbnail first, newlines behind rows.",
    smaller=(
        "`downsample` compresses nothing: the image is made smaller, by the processor's filter and "
        "with its proportions, until its visual tokens fit the retention. As AnyRes scales any "
        "image up to a canvas, that means fewer crops, and two at least, and a thumbnail that is "
        "blurred, too; where nothing fits, the fewest tokens are read."
    ),
    cropping=demo_anyres(),
    methods=("globalcom2", "globalcom2-reference", *METHODS[1:]),
    scores=("class_token", "mean_distance", "mean_query", "received", "distinct"),
    default_score="class_token",
    packings=(("compact", "none"), ("original", "kept_rows"), ("original", "none")),
    low=(0.1, 0.05),
    # Three crops do not divide the thumbnail's eight rows: regions of unequal size are compared.
    grids={
        "1x3 and 3x1 grids": frozenset({(1, 3), (3, 1)}),
        "other grids": frozenset({(1, 2), (2, 1), (2, 2)}),
    },
)
SMOLVLM = DemoModel(
    name="smolvlm",
    title="SmolVLM",
    directory=SMOLVLM_MODEL,
    about=(
        "Views of 36 tokens, each of 2 x 2 patches, no class token, the thumbnail last, markers "
        "around views: 8 to 13 tokens an image, which count as text and not as visual tokens."
    ),
    smaller=(
        "`downsample` compresses nothing. The processor scales any image to the same longer side, "
        "so a smaller image would have as many tokens; instead that side (`longest_edge`) is "
        "lowered by whole views. Here this leaves one choice, a single view without crops and "
        "their markers; where it does not fit either, it is read nevertheless."
    ),
    cropping=smolvlm_cropping(),
    methods=METHODS,
    scores=("mean_distance", "mean_query", "received", "distinct"),
    default_score=CLASSLESS_SCORE,
    packings=(("original", "kept_rows"),),
    # 0.05 of 36 tokens is 1.8: `local` rounds that down to 1, `globalcom2` keeps a third more.
    low=(0.25, 0.1),
    grids={
        "1x2 and 2x1 grids": frozenset({(1, 2), (2, 1)}),
        "2x2 grids": frozenset({(2, 2)}),
    },
    has_markers=True,
)
MODELS = {model.name: model for model in (LLAVA_NEXT, SMOLVLM)}
"""By name."""
