"""The hypernetwork H(c, s): a prompt embedding and a position on the erasing trajectory in, LoRA factors out.

Step 0 has no effect whatever the weights are: dW(c, s) carries the factor s / S (Sec. 3 of arXiv:2602.03410).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from .embedding import Standardize
from .lora import LoRAFactors, TargetModule


class Architecture(Enum):
    """How the factors are made."""

    ATOMS = "atoms"
    """A shared trunk weighs learned rank-1 atoms of every layer; small."""
    HEADS = "heads"
    """A pair of MLP heads a layer writes both factors, as in the paper; large."""
    EDITS = "edits"
    """A learned edit of the text's states for every concept, which all layers read; smallest with many concepts."""


@dataclass(frozen=True)
class HypernetworkConfig:
    """Sizes of a hypernetwork.

    Attributes:
        rank: atoms a layer (ATOMS), rank of the factors (HEADS), or rank of a concept's edit (EDITS).
        num_steps: S, the end of the trajectory; generation uses s = S.
        num_frequencies: frequencies that encode s.
        scale: the constant alpha_0 (HEADS).
        num_concepts: how many edits there are (EDITS).
        directions: into which all edits together move what the layers read (EDITS).
    """

    architecture: Architecture
    embedding_dim: int
    rank: int = 16
    hidden_dim: int = 128
    num_steps: int = 300
    num_frequencies: int = 4
    scale: float = 1.0
    num_concepts: int = 1
    directions: int = 64

    def __post_init__(self) -> None:
        for name in (
            "embedding_dim",
            "rank",
            "hidden_dim",
            "num_steps",
            "num_frequencies",
            "num_concepts",
            "directions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


class Hypernetwork(nn.Module):
    """What both architectures share: the input, and how s is read."""

    def __init__(self, config: HypernetworkConfig, targets: Sequence[TargetModule]) -> None:
        super().__init__()
        if not targets:
            raise ValueError("A hypernetwork needs at least one target module, got none.")
        self.config = config
        self.targets = tuple(targets)
        self.standardize = Standardize(config.embedding_dim)

    def generate(self, embedding: Tensor, s: Tensor | float | None = None) -> LoRAFactors:
        """Write the LoRA factors of each prompt.

        Args:
            embedding: c, (batch, embedding_dim).
            s: position on the trajectory in [0, S], one number or (batch,); S by default.
        """
        num_steps = self.config.num_steps
        if not isinstance(s, Tensor):
            s = float(num_steps if s is None else s)
            if not 0 <= s <= num_steps:
                raise ValueError(f"s must lie between 0 and {num_steps}, got {s}.")
            s = torch.full((len(embedding),), s, device=embedding.device)
        c = self.standardize(embedding)
        u = torch.cat([c, encode_position(s, num_steps, self.config.num_frequencies)], dim=-1)
        return self.write(u, s / num_steps)

    @property
    def input_dim(self) -> int:
        """Length of [c; tau(s)]."""
        return self.config.embedding_dim + 2 * self.config.num_frequencies

    @abstractmethod
    def write(self, u: Tensor, w: Tensor) -> LoRAFactors:
        """Factors from u = [c; tau(s)], (batch, input_dim), and w = s / S, (batch,)."""


class AtomsHypernetwork(Hypernetwork):
    """dW_l(c, s) = s/S sum_k a_lk(c, s) up_lk down_lk^T with learned atoms up_lk, down_lk and a trunk that writes a."""

    def __init__(self, config: HypernetworkConfig, targets: Sequence[TargetModule]) -> None:
        super().__init__(config, targets)
        hidden, rank = config.hidden_dim, config.rank
        self.trunk = nn.Sequential(
            nn.Linear(self.input_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.coefficients = nn.Linear(hidden, len(self.targets) * rank)
        nn.init.ones_(self.coefficients.bias)
        # up starts at zero, down and the coefficients do not: no effect at first, yet a gradient.
        self.down = nn.ParameterList(
            nn.Parameter(torch.randn(rank, t.in_features) / math.sqrt(t.in_features))
            for t in self.targets
        )
        self.up = nn.ParameterList(
            nn.Parameter(torch.zeros(t.out_features, rank)) for t in self.targets
        )

    def write(self, u: Tensor, w: Tensor) -> LoRAFactors:
        a = self.coefficients(self.trunk(u))
        a = rearrange(a, "batch (layer rank) -> layer batch rank", rank=self.config.rank)
        return LoRAFactors(
            self.targets,
            tuple(down.expand(len(u), -1, -1) for down in self.down),
            tuple(
                einsum(up, a_l, "out rank, batch rank -> batch out rank")
                for up, a_l in zip(self.up, a, strict=True)
            ),
            w.float(),
        )


class HeadsHypernetwork(Hypernetwork):
    """A(c, s) = alpha(s) (A_0 + w left(u)), B(c, s) = w right(u), alpha(s) = alpha_0 + w alpha, with w = s / S."""

    def __init__(self, config: HypernetworkConfig, targets: Sequence[TargetModule]) -> None:
        super().__init__(config, targets)
        hidden, rank = config.hidden_dim, config.rank

        def head(features: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(self.input_dim, hidden), nn.ReLU(), nn.Linear(hidden, rank * features)
            )

        self.left = nn.ModuleList(head(t.in_features) for t in self.targets)
        self.right = nn.ModuleList(head(t.out_features) for t in self.targets)
        for right in self.right:
            last = right[-1]  # pyright: ignore[reportIndexIssue]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.alpha = nn.Parameter(torch.full((len(self.targets),), config.scale))
        for index, target in enumerate(self.targets):
            self.register_buffer(
                f"initial_{index}", torch.randn(rank, target.in_features) / math.sqrt(rank)
            )

    def write(self, u: Tensor, w: Tensor) -> LoRAFactors:
        rank, step = self.config.rank, w.float().view(-1, 1, 1)
        downs, ups = [], []
        for index, (left, right) in enumerate(zip(self.left, self.right, strict=True)):
            alpha = self.config.scale + step * self.alpha[index]
            change = rearrange(left(u), "batch (rank inner) -> batch rank inner", rank=rank)
            downs.append(alpha * (self.get_buffer(f"initial_{index}") + step * change))
            ups.append(step * rearrange(right(u), "batch (out rank) -> batch out rank", rank=rank))
        return LoRAFactors(self.targets, tuple(downs), tuple(ups), (w > 0).float())


class EditsHypernetwork(Hypernetwork):
    """dW_l(c, s) = s/S up_l sum_k p_k(c) mix_k down_k, for layers that all read the same states.

    ``down`` says what of a state concept k changes, ``mix`` into which of the shared directions, ``up`` what each layer makes of
    these. p_k is 1 for the likeliest concept, less for others; the ``MOST`` likeliest act. Whether any does is for the gate to say.
    """

    MOST = 2

    def __init__(self, config: HypernetworkConfig, targets: Sequence[TargetModule]) -> None:
        super().__init__(config, targets)
        widths = {target.in_features for target in self.targets}
        if len(widths) > 1:
            raise ValueError(
                f"Edits need target modules that all read the same states, got inputs of {sorted(widths)} features. "
                "Use another architecture."
            )
        num, rank, directions, inner = (
            config.num_concepts,
            config.rank,
            config.directions,
            widths.pop(),
        )
        if num > 1:
            self.trunk = nn.Sequential(
                nn.Linear(config.embedding_dim, config.hidden_dim),
                nn.SiLU(),
                nn.Linear(config.hidden_dim, num),
            )
        self.down = nn.Parameter(torch.randn(num, rank, inner) / math.sqrt(inner))
        self.mix = nn.Parameter(torch.randn(num, directions, rank) / math.sqrt(rank))
        self.up = nn.ParameterList(
            nn.Parameter(torch.zeros(t.out_features, directions)) for t in self.targets
        )

    def shares(self, embedding: Tensor) -> Tensor:
        """Logarithms of p_k, up to a constant, of standardized embeddings: (batch, concepts)."""
        if self.config.num_concepts == 1:
            return embedding.new_zeros(len(embedding), 1)
        return self.trunk(embedding)

    def write(self, u: Tensor, w: Tensor) -> LoRAFactors:
        shares = self.shares(u[:, : self.config.embedding_dim])
        most = min(self.MOST, self.config.num_concepts)
        shares, chosen = (shares - shares.amax(1, keepdim=True)).exp().topk(most)
        down = rearrange(
            shares[:, :, None, None] * self.down[chosen],
            "batch k rank inner -> batch (k rank) inner",
        )
        mix = rearrange(self.mix[chosen], "batch k out rank -> batch out (k rank)")
        ups = (einsum(up, mix, "out d, batch d rank -> batch out rank") for up in self.up)
        return LoRAFactors(self.targets, (down,) * len(self.targets), tuple(ups), w.float())


def encode_position(s: Tensor, num_steps: int, num_frequencies: int) -> Tensor:
    """tau(s): cosines, then sines, of s omega_k with omega_k = 2 pi / (S + 1) 2^k; (batch, 2 num_frequencies)."""
    k = torch.arange(num_frequencies, device=s.device, dtype=torch.float32)
    angles = s.float()[:, None] * (2 * math.pi / (num_steps + 1)) * 2**k
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def make_hypernetwork(config: HypernetworkConfig, targets: Sequence[TargetModule]) -> Hypernetwork:
    """A new hypernetwork of the architecture that the config names."""
    match config.architecture:
        case Architecture.ATOMS:
            return AtomsHypernetwork(config, targets)
        case Architecture.HEADS:
            return HeadsHypernetwork(config, targets)
        case Architecture.EDITS:
            return EditsHypernetwork(config, targets)
