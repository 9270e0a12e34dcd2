"""The world's denoiser: the host's SD1.5 UNet class at one resolution level, trained narrow, padded exactly.

Zero-padding a narrow UNet into the full 320 channels changes nothing when active channels fill whole normalisation
groups, heads keep their 40 dimensions, and layer norm takes its statistics over all 320 channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

FULL_CHANNELS, FULL_TIME, GROUPS = 320, 1280, 32
HEAD_DIM = 40
CONTEXT = 768
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class UNetWidths:
    """Active channels of 320 and active time features of 1280."""

    channels: int = 120
    time: int = 320


class WideLayerNorm(nn.Module):
    """Layer norm of a vector that stands for a 320-wide one whose other entries are zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        mean = x.sum(-1, keepdim=True) / FULL_CHANNELS
        square = x.square().sum(-1, keepdim=True) / FULL_CHANNELS
        return (x - mean) * torch.rsqrt(square - mean.square() + 1e-5) * self.weight + self.bias


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm whose groups are those of the padded 320- or 640-channel tensor."""
    return nn.GroupNorm(channels * GROUPS // FULL_CHANNELS, channels, eps=1e-5)


class ResBlock(nn.Module):
    """Residual block with additive time embedding; ``joined`` inputs are two tensors of ``channels``."""

    def __init__(self, channels: int, time: int, *, joined: bool = False) -> None:
        super().__init__()
        wide = channels * 2 if joined else channels
        groups = channels * GROUPS // FULL_CHANNELS
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, wide, eps=1e-5), nn.SiLU(), nn.Conv2d(wide, channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, channels))
        self.out_layers = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.skip_connection = nn.Conv2d(wide, channels, 1) if joined else nn.Identity()
        nn.init.zeros_(self.out_layers[3].weight)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class Attention(nn.Module):
    """Multi-head attention with 40-wide heads; keys and values from the context."""

    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", d=HEAD_DIM)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(
            rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        )


class GEGLU(nn.Module):
    """Gated linear unit of the feed-forward block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, channels * 8)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Feed-forward block, laid out as the host names it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels), nn.Identity(), nn.Linear(channels * 4, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(channels, channels), Attention(channels, CONTEXT)
        self.ff = FeedForward(channels)
        self.norm1, self.norm2, self.norm3 = (WideLayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """One transformer block over the picture's positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(channels * GROUPS // FULL_CHANNELS, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels)])
        self.proj_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[2]
        hidden = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        return x + self.proj_out(rearrange(hidden, "b (h w) c -> b c h w", h=height))


class WorldUNet(nn.Module):
    """Noise predictor in SD1.5's layout with ``channel_mult [1]`` and one residual block a level."""

    def __init__(self, widths: UNetWidths | None = None) -> None:
        super().__init__()
        self.widths = widths = widths or UNetWidths()
        c, time = widths.channels, widths.time
        self.time_embed = nn.Sequential(
            nn.Linear(FULL_CHANNELS, time), nn.SiLU(), nn.Linear(time, time)
        )
        self.input_blocks = nn.ModuleList(
            [
                nn.ModuleList([nn.Conv2d(LATENT_CHANNELS, c, 3, padding=1)]),
                nn.ModuleList([ResBlock(c, time), SpatialTransformer(c)]),
            ]
        )
        self.middle_block = nn.ModuleList(
            [ResBlock(c, time), SpatialTransformer(c), ResBlock(c, time)]
        )
        self.output_blocks = nn.ModuleList(
            [
                nn.ModuleList([ResBlock(c, time, joined=True), SpatialTransformer(c)])
                for _ in range(2)
            ]
        )
        self.out = nn.Sequential(
            group_norm(c), nn.SiLU(), nn.Conv2d(c, LATENT_CHANNELS, 3, padding=1)
        )

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Predict noise (batch, 4, 8, 8) at integer timesteps (batch,) for text states (batch, 77, 768)."""
        half = FULL_CHANNELS // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
        angles = timestep[:, None].float() * frequencies
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))

        def run(parts: nn.ModuleList, hidden: Tensor) -> Tensor:
            for part in parts:
                hidden = part(hidden, time if isinstance(part, ResBlock) else context)
            return hidden

        first = self.input_blocks[0][0](x)  # pyright: ignore[reportIndexIssue]
        second = run(self.input_blocks[1], first)  # pyright: ignore[reportArgumentType]
        hidden = run(self.middle_block, second)
        for parts, skip in zip(self.output_blocks, (second, first), strict=True):
            hidden = run(parts, torch.cat([hidden, skip], dim=1))  # pyright: ignore[reportArgumentType]
        return self.out(hidden)


def _place(size: int, widths: UNetWidths) -> tuple[int, list[tuple[slice, int]]]:
    """Full size of an axis of active size ``size``, and where its active runs begin in it."""
    c = widths.channels
    runs = {
        c: (FULL_CHANNELS, [0]),
        2 * c: (2 * FULL_CHANNELS, [0, FULL_CHANNELS]),
        4 * c: (4 * FULL_CHANNELS, [0]),
        8 * c: (8 * FULL_CHANNELS, [0, 4 * FULL_CHANNELS]),
    }
    if size not in runs:
        return size, [(slice(0, size), 0)]
    full, starts = runs[size]
    step = size // len(starts)
    return full, [(slice(i * step, (i + 1) * step), start) for i, start in enumerate(starts)]


def pad_unet(narrow: dict[str, Tensor], widths: UNetWidths) -> dict[str, Tensor]:
    """The 320-channel state dict that computes exactly what the narrow one does."""
    padded = {}
    for name, weight in narrow.items():
        axes = []
        for axis, size in enumerate(weight.shape):
            time_axis = (
                name.startswith("time_embed") and (axis == 0 or name.startswith("time_embed.2"))
            ) or ("emb_layers" in name and axis == 1)
            fixed = axis >= 2 or size in (LATENT_CHANNELS, CONTEXT)
            if name.startswith("time_embed.0") and axis == 1:
                fixed = True
            if time_axis:
                axes.append((FULL_TIME, [(slice(0, size), 0)]))
            elif fixed:
                axes.append((size, [(slice(0, size), 0)]))
            else:
                axes.append(_place(size, widths))
        full = weight.new_zeros([size for size, _ in axes])
        rows = axes[0][1]
        columns = axes[1][1] if len(axes) > 1 else [(slice(None), 0)]
        for row, row_start in rows:
            for column, column_start in columns:
                part = weight[row] if weight.dim() == 1 else weight[row, column]
                where = [slice(row_start, row_start + part.shape[0])]
                if weight.dim() > 1:
                    where.append(slice(column_start, column_start + part.shape[1]))
                full[tuple(where)] = part
        padded[name] = full
    return padded


def noise_schedule() -> Tensor:
    """SD1.5's cumulative signal share at its 1000 steps (scaled-linear betas)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float()


def diffusion_loss(unet: nn.Module, latents: Tensor, context: Tensor, signal: Tensor) -> Tensor:
    """Noise-prediction loss at random steps, weighted as an error of the velocity (Salimans & Ho 2022).

    Plain noise errors hardly count where noise is strong, which is where the caption decides what is drawn.

    Args:
        latents: (batch, 4, 8, 8).
        context: text states, (batch, 77, 768).
        signal: cumulative signal share, (1000,).
    """
    timestep = torch.randint(len(signal), (len(latents),))
    share = signal[timestep][:, None, None, None]
    noise = torch.randn_like(latents)
    noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
    return ((unet(noisy, timestep, context).float() - noise).square() / share).mean()
