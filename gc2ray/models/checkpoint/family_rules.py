"""`FamilyRules`: what the files of one architecture must say, and what they say twice.

`gc2ray.models.checkpoint.consistency` has the checks that hold for all of them. To add one: a line
in `FAMILY_RULES`, and functions for what only this architecture has.

Names of settings are those of transformers; values that a file leaves out are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gc2ray.models.checkpoint.description import Checkpoint, as_json, mapping, number

Check = Callable[[Checkpoint], Iterator[str]]
"""Yields the problems of one kind."""
SQUARE = ("shortest_edge", "height", "width")
LONGEST = "longest_edge"
CUT_STEPS = frozenset({"do_resize", "do_rescale", "do_normalize", "do_convert_rgb"})
SUFFIX = re.compile("(Fast|Pil)$")
"""What transformers writes behind the type of an image processor that has another backend."""
ANY_RESOLUTION = re.compile(r"anyres_max_[1-9]\d*")
DEFAULT_SEQUENCE = 256
"""Transformers' value of image_seq_length where InternVL's config.json leaves it out."""


@dataclass(frozen=True)
class FamilyRules:
    """The rules for checkpoints of one architecture.

    Attributes:
        image_processors: Types of image processors that cut images as gc2ray does; each may be
            written with what transformers appends for another backend.
        towers: Model types of vision towers, each with its `vision_feature_select_strategy`; None
            if the config has none.
        view_edges: Settings of the image processor that hold the side of a view, with the names
            of edges in them.
        done_steps: Steps of image processing that are always done.
        idle_steps: Steps that change nothing here.
        paired_sides: Whether the config may have sizes as [height, width].
        checks: What only this architecture has.
    """

    image_processors: tuple[str, ...]
    towers: Mapping[str, str | None]
    view_edges: tuple[tuple[str, tuple[str, ...]], ...] = (("size", SQUARE),)
    done_steps: frozenset[str] = CUT_STEPS
    idle_steps: frozenset[str] = frozenset()
    paired_sides: bool = False
    checks: tuple[Check, ...] = ()

    def cuts_like(self, image_processor: object) -> bool:
        """Whether an image processor of this type cuts images as the family does."""
        return SUFFIX.sub("", str(image_processor)) in self.image_processors

    def side(self, size: object) -> int | None:
        """The side in pixels that a size in the config names; None if it names none."""
        if self.paired_sides and isinstance(size, list | tuple):
            return number(size[0]) if len({*map(str, size)}) == 1 else None
        return number(size)

    def view_sides(self, images: Mapping[str, object]) -> Iterator[tuple[str, object]]:
        """Sides in pixels of the views that an image processor cuts, with the settings' names."""
        for name, edges in self.view_edges:
            size = images.get(name)
            if isinstance(size, dict):
                yield from ((name, size[edge]) for edge in edges if size.get(edge) is not None)
            elif size is not None:
                yield name, size


def patches_per_side(checkpoint: Checkpoint) -> int | None:
    """Patches in a row of a view; None where the config does not say."""
    rules = FAMILY_RULES[checkpoint.config["model_type"]]
    side, patch = (rules.side(checkpoint.vision.get(name)) for name in ("image_size", "patch_size"))
    return side // patch if side and patch else None


# --- Checks of single families. ------------------------------------------------------------------


def _pinpoints(checkpoint: Checkpoint) -> Iterator[str]:
    grids = []
    for location, part in (
        ("config.json", checkpoint.config),
        ("the image processor", checkpoint.images),
    ):
        written = part.get("image_grid_pinpoints")
        if written is None:
            continue
        try:
            grids.append({(int(height), int(width)) for height, width in written})
        except (TypeError, ValueError):
            grids.append({(0, 0)})
        if not grids[-1] or min(map(min, grids[-1])) <= 0:
            yield (
                f"image_grid_pinpoints of {location} is {as_json(written)}, and should be a list "
                "of [height, width] in pixels"
            )
    if len(grids) == 2 and grids[0] != grids[1]:
        yield (
            f"image_grid_pinpoints are {as_json(sorted(grids[0]))} in config.json, and "
            f"{as_json(sorted(grids[1]))} in the image processor: correct the wrong ones"
        )


def _whole_views(checkpoint: Checkpoint) -> Iterator[str]:
    """Canvases are cut into whole views."""
    side = number(checkpoint.vision.get("image_size"))
    pinpoints = checkpoint.config.get("image_grid_pinpoints") or ()
    odd = [edges for edges in pinpoints if side and any(int(edge) % side for edge in edges)]
    if odd:
        yield (
            f"image_grid_pinpoints in config.json has {as_json(odd[0])}, which cannot be cut into "
            f"views of {side} pixels (vision_config.image_size): correct the wrong one"
        )


def _aspect_ratio(checkpoint: Checkpoint) -> Iterator[str]:
    """How many tokens OneVision's canvas may have: the model reads one, its processor the other."""
    name = "vision_aspect_ratio"
    own, theirs = checkpoint.config.get(name), checkpoint.processor.get(name)
    if own is not None and not ANY_RESOLUTION.fullmatch(str(own)):
        yield f'{name} in config.json is {as_json(own)}, and should be "anyres_max_9" or the like'
    yield from _different(name, own, theirs)
    name = "vision_feature_select_strategy"
    yield from _different(name, checkpoint.config.get(name), checkpoint.processor.get(name))


def _different(name: str, own: object, theirs: object) -> Iterator[str]:
    if None not in (own, theirs) and own != theirs:
        yield (
            f"{name} is {as_json(own)} in config.json, and {as_json(theirs)} in the processor: "
            "correct the wrong one"
        )


def _canvas_tokens(checkpoint: Checkpoint) -> Iterator[str]:
    yield from _view_tokens(checkpoint, "num_image_tokens", patches_per_side(checkpoint))


def _shuffled_tokens(checkpoint: Checkpoint) -> Iterator[str]:
    """InternVL: merged tokens, in the processor and in a note of the config."""
    ratio, patches = checkpoint.config.get("downsample_ratio"), patches_per_side(checkpoint)
    if ratio is None or patches is None:
        return
    merged = round(1 / ratio, 6) if isinstance(ratio, int | float) and 0 < ratio <= 1 else 0
    if not merged or patches % merged:
        yield (
            f"downsample_ratio in config.json is {as_json(ratio)}, and should merge {patches} x "
            f"{patches} patches of a view evenly, as 0.5 does"
        )
        return
    side = patches // int(merged)
    yield from _view_tokens(checkpoint, "image_seq_length", side)
    noted = checkpoint.config.get("image_seq_length", DEFAULT_SEQUENCE)
    if noted not in (side**2, DEFAULT_SEQUENCE):
        yield (
            f"image_seq_length in config.json is {as_json(noted)}, and its sizes make {side**2} "
            "tokens of a view: correct the wrong one"
        )


def _scaled_tokens(checkpoint: Checkpoint) -> Iterator[str]:
    """Idefics3 and SmolVLM: tokens merged by a factor."""
    factor, patches = checkpoint.config.get("scale_factor"), patches_per_side(checkpoint)
    if factor is None or patches is None:
        return
    if (number(factor) or 0) <= 0 or patches % factor:
        yield (
            f"scale_factor in config.json is {as_json(factor)}, and should divide the {patches} "
            "patches in a row of a view"
        )
        return
    yield from _view_tokens(checkpoint, "image_seq_len", patches // factor)


def _view_tokens(checkpoint: Checkpoint, name: str, side: int | None) -> Iterator[str]:
    """The processor's tokens of a view, against side x side of the config's."""
    theirs = checkpoint.processor.get(name)
    if theirs is not None and side is not None and theirs != side**2:
        yield (
            f"{name} is {as_json(theirs)} in the processor, and the sizes in config.json make "
            f"{side**2} tokens of a view: correct the wrong one"
        )


def _tiles(checkpoint: Checkpoint) -> Iterator[str]:
    """How many tiles InternVL may cut; `crop_to_patches` is on, whatever the file says."""
    written = {name: checkpoint.images.get(name) for name in ("min_patches", "max_patches")}
    for name, value in written.items():
        if value is not None and (number(value) or 0) <= 0:
            yield f"{name} of the image processor is {as_json(value)}, and should be above 0"
    least, most = map(number, written.values())
    if least is not None and most is not None and least > most:
        yield f"the image processor has min_patches {least}, above max_patches {most}"


def _one_layer(checkpoint: Checkpoint) -> Iterator[str]:
    """InternVL of transformers, unlike LLaVA, cannot join the features of several layers."""
    named = checkpoint.config.get("vision_feature_layer")
    if named is not None and number(named) is None:
        yield (
            f"vision_feature_layer in config.json is {as_json(named)}, and should be one layer's "
            "number; use the config.json that it was published with"
        )


def _longest_edges(checkpoint: Checkpoint) -> Iterator[str]:
    for name in ("size", "max_image_size"):
        value = checkpoint.images.get(name)
        if value is not None and (number(mapping(value).get(LONGEST)) or 0) <= 0:
            yield (
                f'{name} of the image processor is {as_json(value)}, and should be {{"{LONGEST}": '
                "PIXELS}"
            )


# --- The families. -------------------------------------------------------------------------------

_IDEFICS3 = FamilyRules(
    image_processors=("Idefics3ImageProcessor", "SmolVLMImageProcessor"),
    towers=dict.fromkeys(("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision")),
    view_edges=(("max_image_size", (LONGEST,)),),
    done_steps=CUT_STEPS | {"do_image_splitting"},
    idle_steps=frozenset({"do_pad"}),
    checks=(_longest_edges, _scaled_tokens),
)
FAMILY_RULES: Mapping[str, FamilyRules] = MappingProxyType({
    "llava_next": FamilyRules(
        image_processors=("LlavaNextImageProcessor",),
        towers={"clip_vision_model": "default", "siglip_vision_model": "full"},
        view_edges=(("size", SQUARE), ("crop_size", SQUARE)),
        done_steps=CUT_STEPS | {"do_pad"},
        idle_steps=frozenset({"do_center_crop"}),  # a view already has the size
        checks=(_pinpoints, _whole_views),
    ),
    "llava_onevision": FamilyRules(
        image_processors=("LlavaOnevisionImageProcessor",),
        towers={"siglip_vision_model": "full"},
        view_edges=(("size", SQUARE), ("crop_size", SQUARE)),
        idle_steps=frozenset({"do_center_crop", "do_pad"}),  # padded are batches, not images
        checks=(_pinpoints, _whole_views, _aspect_ratio, _canvas_tokens),
    ),
    "internvl": FamilyRules(
        image_processors=("GotOcr2ImageProcessor",),
        towers={"internvl_vision": "default"},
        idle_steps=frozenset({"do_center_crop", "do_pad"}),  # this processor has neither
        paired_sides=True,
        checks=(_one_layer, _tiles, _shuffled_tokens),
    ),
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
})  # fmt: skip
"""By `model_type` of the config."""
