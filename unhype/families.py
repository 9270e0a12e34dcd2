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
        start: where it begins in the host's ``pooled_output``.
    """

    encoder: str
    pooling: str
    dim: int
    start: int = 0


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
        branch: which conditionings carry the LoRA.
    """

    name: str
    title: str
    host_classes: tuple[str, ...]
    prediction: Prediction
    embedding: EmbeddingSpec
    targets: tuple[TargetPattern, ...]
    branch: Branch


CLIP_L = EmbeddingSpec(encoder="clip-vit-large-patch14", pooling="eos_unprojected", dim=768)

FAMILIES: Mapping[str, FamilySpec] = {
    spec.name: spec
    for spec in (
        FamilySpec(
            name="sd1",
            title="Stable Diffusion 1.x",
            host_classes=("SD15",),
            prediction=Prediction.EPSILON,
            embedding=CLIP_L,
            targets=(TargetPattern(r".*\.attn2\.to_[kv]"),),
            branch=Branch.POSITIVE,
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
