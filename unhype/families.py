"""What differs between base-model families, as data.

Adding a family means adding one entry to ``FAMILIES``. Nothing else may branch on a family's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class Prediction(Enum):
    """What the denoiser predicts."""

    EPSILON = "epsilon"
    VELOCITY = "velocity"
    FLOW = "flow"


class Branch(Enum):
    """Which conditionings of a classifier-free guided run carry the LoRA."""

    POSITIVE = "positive"
    ALL = "all"


@dataclass(frozen=True)
class EmbeddingSpec:
    """The prompt embedding that conditions the hypernetwork.

    Attributes:
        encoder: the text encoder it comes from.
        pooling: how its states become one vector.
        dim: length of the vector.
        pooled_width: length of the host's ``pooled_output``, which begins with the vector; none where the vector is
            not part of it, so that it must be asked of the text encoder.
    """

    encoder: str
    pooling: str
    dim: int
    pooled_width: int | None


@dataclass(frozen=True)
class RowSlice:
    """Part ``index`` of ``parts`` equal parts of a fused layer's output."""

    index: int
    parts: int


@dataclass(frozen=True)
class TargetPattern:
    """Which Linear layers below the diffusion model get LoRA.

    Attributes:
        pattern: regular expression for the whole module path.
        rows: the part of a fused layer's output that changes; all of it by default.
    """

    pattern: str
    rows: RowSlice | None = None

    def matches(self, names: Iterable[str]) -> list[str]:
        """The module paths that match, in their order."""
        return [name for name in names if re.fullmatch(self.pattern, name)]


@dataclass(frozen=True)
class FamilySpec:
    """One base-model family.

    Attributes:
        title: what people call it.
        host_classes: names of the host's model configuration classes.
        text_encoders: those that the model was made for, as the host names them.
        optional_encoders: those of them without which the host can use it, too.
        clip_type: how the host is told which model text encoders of their own files are for.
        branch: which conditionings carry the LoRA.
        per_chunk: whether the target modules see the text's states alone, so that each 77 tokens can have their own LoRA.
    """

    name: str
    title: str
    host_classes: tuple[str, ...]
    prediction: Prediction
    embedding: EmbeddingSpec
    targets: tuple[TargetPattern, ...]
    text_encoders: tuple[str, ...]
    optional_encoders: tuple[str, ...]
    clip_type: str
    branch: Branch
    per_chunk: bool


def _clip_l(pooled_width: int | None) -> EmbeddingSpec:
    """The state at the end of the text, after the final norm and before any projection, of CLIP ViT-L/14."""
    return EmbeddingSpec("clip-vit-large-patch14", "eos_unprojected", 768, pooled_width)


CROSS_ATTENTION = (TargetPattern(r".*\.attn2\.to_[kv]"),)
"""Keys and values of the text, where a U-Net attends to it."""

FAMILIES: Mapping[str, FamilySpec] = {
    spec.name: spec
    for spec in (
        FamilySpec(
            name="sd1",
            title="Stable Diffusion 1.x",
            host_classes=("SD15",),
            prediction=Prediction.EPSILON,
            embedding=_clip_l(768),
            targets=CROSS_ATTENTION,
            text_encoders=("clip_l",),
            optional_encoders=(),
            clip_type="STABLE_DIFFUSION",
            branch=Branch.POSITIVE,
            per_chunk=True,
        ),
        FamilySpec(
            name="sdxl",
            title="Stable Diffusion XL",
            host_classes=("SDXL", "SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B"),
            prediction=Prediction.EPSILON,
            embedding=_clip_l(None),  # the host pools CLIP-G alone
            targets=CROSS_ATTENTION,
            text_encoders=("clip_l", "clip_g"),
            optional_encoders=(),
            clip_type="STABLE_DIFFUSION",
            branch=Branch.POSITIVE,
            per_chunk=True,
        ),
        FamilySpec(
            name="sd3",
            title="Stable Diffusion 3",
            host_classes=("SD3",),
            prediction=Prediction.FLOW,
            embedding=_clip_l(2048),
            targets=tuple(
                TargetPattern(r"joint_blocks\.\d+\.context_block\.attn\.qkv", RowSlice(part, 3))
                for part in (1, 2)
            ),
            text_encoders=("clip_l", "clip_g", "t5xxl"),
            optional_encoders=("clip_g", "t5xxl"),
            clip_type="SD3",
            branch=Branch.POSITIVE,
            per_chunk=False,
        ),
        FamilySpec(
            name="flux",
            title="Flux",
            host_classes=("Flux", "FluxSchnell"),
            prediction=Prediction.FLOW,
            embedding=_clip_l(768),
            targets=(
                TargetPattern(r"double_blocks\.\d+\.img_attn\.qkv", RowSlice(2, 3)),
                TargetPattern(r"double_blocks\.\d+\.txt_attn\.qkv", RowSlice(2, 3)),
                TargetPattern(r"double_blocks\.\d+\.img_attn\.proj"),
                TargetPattern(r"single_blocks\.\d+\.linear1", RowSlice(2, 7)),
            ),
            text_encoders=("clip_l", "t5xxl"),
            optional_encoders=(),
            clip_type="FLUX",
            branch=Branch.ALL,
            per_chunk=False,
        ),
    )
}


def family(name: str) -> FamilySpec:
    """The entry of a family.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        return FAMILIES[name]
    except KeyError:
        raise ValueError(
            f"Unknown model family {name!r}. This version knows {', '.join(FAMILIES)}. Update the pack."
        ) from None


def family_of_host_class(host_class: str) -> FamilySpec | None:
    """The family that a class of the host's model configurations belongs to, if any."""
    return next((spec for spec in FAMILIES.values() if host_class in spec.host_classes), None)
