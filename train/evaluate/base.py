"""What an evaluation is made of: questions, evaluators that look at pictures, and models that draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from unhype.host.denoise import TextBatch
from unhype.lora import LoRAFactors

from ..config import TrainConfig
from ..denoiser import DenoiserLike


class Kind(Enum):
    """Why a prompt is asked."""

    TARGET = "target"
    SYNONYM = "held-out synonym"
    SIBLING = "sibling"
    UNRELATED = "unrelated"
    SCENE = "scene"
    LONG = "long prompt"
    PLAIN = "nothing erased"


@dataclass(frozen=True)
class Question:
    """One prompt of an evaluation.

    Attributes:
        shows: labels of what its pictures should hold; of TARGET, SYNONYM and LONG the erased concept alone, of SCENE the erased one first.
        word: the word that the prompt uses for it.
    """

    kind: Kind
    text: str
    shows: tuple[str, ...]
    word: str = ""


@dataclass(frozen=True)
class Judgement:
    """What an evaluator sees in n pictures.

    Attributes:
        scores: how surely each label is in the picture, (n, labels) in [0, 1].
        features: for distances between pictures, (n, dim).
        least: score below which a label is no answer; a picture of nothing else has a likeliest label, too.
    """

    scores: Tensor
    features: Tensor
    least: float = 0.0

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def top(self) -> Tensor:
        """The surest label of each picture, (n,), -1 if it shows none."""
        return self.scores.argmax(-1).masked_fill(self.scores.amax(-1) < self.least, -1)

    @staticmethod
    def cat(parts: Sequence[Judgement]) -> Judgement:
        """Several, one after the other."""
        return Judgement(
            torch.cat([p.scores for p in parts]),
            torch.cat([p.features for p in parts]),
            max((p.least for p in parts), default=0.0),
        )


class Evaluator(Protocol):
    """Says what pictures show.

    Attributes:
        labels: what it can see.
        present: the score from which a label counts as in the picture.
    """

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def present(self) -> float: ...

    def judge(self, pictures: Tensor) -> Judgement:
        """Look at pictures, (n, 3, height, width) in [0, 1]."""
        ...


class PictureModel(DenoiserLike, Protocol):
    """A frozen model that also draws."""

    def sample(
        self,
        text: TextBatch,
        factors: LoRAFactors | None,
        *,
        steps: int,
        guidance_scale: float,
        noise: Tensor,
    ) -> Tensor:
        """Latents (n, channels, height, width), one prompt and one LoRA a row, applied as the nodes do."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (n, 3, height, width) in [0, 1]."""
        ...

    def noise(self, seeds: Sequence[int], size: int) -> Tensor:
        """What sampling starts from for each seed, (n, channels, height, width); ``size`` in pixels."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How an evaluation draws; ``size`` in pixels."""

    steps: int
    guidance_scale: float
    size: int
    batch_size: int = 16


@dataclass(frozen=True)
class Task:
    """Concepts to erase, what training may know of them, and the questions afterwards."""

    config: TrainConfig
    questions: tuple[Question, ...]


class World(Protocol):
    """A model with everything needed to compare methods on it.

    Attributes:
        sampling: how its pictures are drawn.
        most: how many concepts a task may have.
    """

    @property
    def name(self) -> str: ...

    @property
    def sampling(self) -> Sampling: ...

    @property
    def most(self) -> int: ...

    def model(self) -> PictureModel: ...

    def evaluator(self) -> Evaluator: ...

    def task(self, num_concepts: int, seed: int) -> Task:
        """A task with so many concepts; another seed gives others."""
        ...
