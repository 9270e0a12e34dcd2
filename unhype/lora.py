"""LoRA factors, one set for every prompt of a batch: dW = scale * up @ down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from einops import einsum
from torch import Tensor


@dataclass(frozen=True)
class TargetModule:
    """One Linear layer that gets LoRA.

    Attributes:
        name: module path below the diffusion model.
        out_features: rows that change.
        start: first row that changes; not 0 only in fused layers.
        full_out_features: rows of the whole layer.
    """

    name: str
    in_features: int
    out_features: int
    start: int = 0
    full_out_features: int = 0

    def __post_init__(self) -> None:
        if not self.full_out_features:
            object.__setattr__(self, "full_out_features", self.out_features)
        if self.in_features < 1 or self.out_features < 1:
            raise ValueError(
                f"Target module {self.name!r} must have at least one input and one output, "
                f"got {self.in_features} and {self.out_features}."
            )
        if self.start < 0 or self.start + self.out_features > self.full_out_features:
            raise ValueError(
                f"Target module {self.name!r} changes rows {self.start} to {self.start + self.out_features}, "
                f"but the layer has {self.full_out_features}."
            )

    @property
    def key(self) -> str:
        """A name that also tells parts of one fused layer apart."""
        return f"{self.name}[{self.start}]" if self.is_slice else self.name

    @property
    def is_slice(self) -> bool:
        """Whether only some rows of the layer change."""
        return self.out_features != self.full_out_features


class Spelling(Enum):
    """How a LoRA file names its tensors."""

    HOST = "host"
    """``diffusion_model.<path>.lora_up.weight``: the host's generic spelling."""
    KOHYA = "kohya"
    """``lora_unet_<path_with_underscores>.lora_up.weight``."""
    PEFT = "peft"
    """``diffusion_model.<path>.lora_B.weight``."""


UP_DOWN = {
    Spelling.HOST: ("lora_up.weight", "lora_down.weight"),
    Spelling.KOHYA: ("lora_up.weight", "lora_down.weight"),
    Spelling.PEFT: ("lora_B.weight", "lora_A.weight"),
}


@dataclass(frozen=True)
class LoRAFactors:
    """Low-rank changes of the target modules for a batch of prompts.

    Attributes:
        targets: the layers, in the order of ``down`` and ``up``.
        down: (batch, rank, in_features) a layer.
        up: (batch, out_features, rank) a layer.
        scale: (batch,); 0 means no effect.
    """

    targets: tuple[TargetModule, ...]
    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]
    scale: Tensor

    def __post_init__(self) -> None:
        if not len(self.targets) == len(self.down) == len(self.up):
            raise ValueError(
                f"LoRA factors for {len(self.targets)} target modules need as many down and up tensors, "
                f"got {len(self.down)} and {len(self.up)}."
            )
        for target, down, up in zip(self.targets, self.down, self.up, strict=True):
            batch = len(self.scale)
            rank = down.shape[1] if down.dim() == 3 else 0
            wanted = (batch, rank, target.in_features), (batch, target.out_features, rank)
            if (tuple(down.shape), tuple(up.shape)) != wanted:
                raise ValueError(
                    f"LoRA factors of {target.key} have shapes {tuple(down.shape)} and {tuple(up.shape)}, "
                    f"expected {wanted[0]} and {wanted[1]}."
                )

    def __len__(self) -> int:
        return len(self.scale)

    @property
    def active(self) -> Tensor:
        """Which prompts have any effect, (batch,) of bool."""
        return self.scale != 0

    def delta(self, index: int) -> Tensor:
        """dW of one layer, (batch, out_features, in_features)."""
        return self.scale.view(-1, 1, 1) * (self.up[index] @ self.down[index])

    def squared_norms(self) -> Tensor:
        """Squared Frobenius norm of every dW, (batch, targets), without building any dW."""
        norms = []
        for down, up in zip(self.down, self.up, strict=True):
            rows = einsum(up, up, "batch out r, batch out q -> batch r q")
            columns = einsum(down, down, "batch r inner, batch q inner -> batch r q")
            norms.append((rows * columns).sum((1, 2)))
        return torch.stack(norms, dim=1).clamp(min=0) * self.scale.square()[:, None]

    def squared_norm(self) -> Tensor:
        """Squared Frobenius norm over all layers, (batch,)."""
        return self.squared_norms().sum(1)

    def rows(self, index: Tensor | Sequence[int]) -> LoRAFactors:
        """The factors of some prompts, in the order of ``index``."""
        index = torch.as_tensor(index, device=self.scale.device)
        return replace(
            self,
            down=tuple(down[index] for down in self.down),
            up=tuple(up[index] for up in self.up),
            scale=self.scale[index],
        )

    def scaled(self, strength: Tensor | float) -> LoRAFactors:
        """The same with the scale multiplied by ``strength``, a number or (batch,)."""
        return replace(self, scale=self.scale * strength)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LoRAFactors:
        """The same on another device or in another precision."""
        return replace(
            self,
            down=tuple(down.to(device, dtype) for down in self.down),
            up=tuple(up.to(device, dtype) for up in self.up),
            scale=self.scale.to(device, dtype),
        )

    def state_dict(self, row: int = 0, spelling: Spelling = Spelling.HOST) -> dict[str, Tensor]:
        """One prompt's factors as a LoRA file holds them; ``alpha`` = scale * rank.

        Parts of fused layers are written at full height, other rows zero, so that any reader can apply them.
        """
        up_name, down_name = UP_DOWN[spelling]
        result = {}
        for target, down, up in zip(self.targets, self.down, self.up, strict=True):
            stem = _stem(target.name, spelling)
            full = up.new_zeros(target.full_out_features, up.shape[2])
            full[target.start : target.start + target.out_features] = up[row].detach()
            if f"{stem}.{up_name}" in result:  # a second part of the same layer: stack the ranks
                result[f"{stem}.{up_name}"] = torch.cat([result[f"{stem}.{up_name}"], full], dim=1)
                result[f"{stem}.{down_name}"] = torch.cat(
                    [result[f"{stem}.{down_name}"], down[row].detach()]
                )
            else:
                result[f"{stem}.{up_name}"] = full
                result[f"{stem}.{down_name}"] = down[row].detach().clone()
            rank = result[f"{stem}.{down_name}"].shape[0]
            result[f"{stem}.alpha"] = self.scale[row].detach().float().cpu() * rank
        return result


def combine(rows: Sequence[Sequence[LoRAFactors]], targets: Sequence[TargetModule]) -> LoRAFactors:
    """One row of factors for each sum of single rows: ranks are joined, and padded with zeros to the largest.

    A sum of rows without effect has scale 0.
    """
    downs, ups = [], []
    for target in targets:
        parts = [
            [(f, f.targets.index(target)) for f in factors if target in f.targets]
            for factors in rows
        ]
        rank = max((sum(f.down[i].shape[1] for f, i in part) for part in parts), default=0) or 1
        down = torch.zeros(len(rows), rank, target.in_features)
        up = torch.zeros(len(rows), target.out_features, rank)
        for row, part in enumerate(parts):
            start = 0
            for f, i in part:
                end = start + f.down[i].shape[1]
                down[row, start:end] = f.down[i][0]
                up[row, :, start:end] = f.up[i][0] * f.scale[0]
                start = end
        downs.append(down)
        ups.append(up)
    scale = torch.tensor([float(any(f.active[0] for f in factors)) for factors in rows])
    return LoRAFactors(tuple(targets), tuple(downs), tuple(ups), scale)


def read_state_dict(
    state: Mapping[str, Tensor], targets: Sequence[TargetModule], spelling: Spelling = Spelling.HOST
) -> LoRAFactors:
    """Read a LoRA file's tensors back as the factors of one prompt, with scale 1 and alpha folded into ``up``.

    Raises:
        ValueError: a target module has no tensors in ``state``.
    """
    up_name, down_name = UP_DOWN[spelling]
    downs, ups = [], []
    for target in targets:
        stem = _stem(target.name, spelling)
        missing = [name for name in (up_name, down_name) if f"{stem}.{name}" not in state]
        if missing:
            raise ValueError(
                f"The LoRA has no {stem}.{missing[0]}. It must cover every target module; "
                "was it made for another model, or in another spelling?"
            )
        down, up = state[f"{stem}.{down_name}"], state[f"{stem}.{up_name}"]
        alpha = state.get(f"{stem}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        downs.append(down[None])
        ups.append(up[None, target.start : target.start + target.out_features] * scale)
    return LoRAFactors(tuple(targets), tuple(downs), tuple(ups), torch.ones(1))


def _stem(name: str, spelling: Spelling) -> str:
    if spelling is Spelling.KOHYA:
        return f"lora_unet_{name.replace('.', '_')}"
    return f"diffusion_model.{name}"
