"""The world's autoencoder: TAESD's layout, trained narrow, padded with zeros to its full width.

TAESD is ReLU convolutions without normalisation, so channels whose weights and biases are zero stay exactly zero
and a narrow network runs unchanged inside the full-width one that the host builds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kornia.filters import spatial_gradient
from torch import Tensor, nn

FULL_WIDTH = 64
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class VAEWidths:
    """Active channels at 64, 32, 16 and 8 pixels, encoder and decoder."""

    encoder: tuple[int, int, int, int] = (16, 32, 48, 64)
    decoder: tuple[int, int, int, int] = (24, 48, 64, 64)


class Clamp(nn.Module):
    """Soft clamp of the latent to [-3, 3], as TAESD's decoder begins."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Residual block of three convolutions at one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + x)


def make_encoder(widths: tuple[int, int, int, int]) -> nn.Sequential:
    """(batch, 3, 64, 64) in [0, 1] -> (batch, 4, 8, 8)."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1), Block(widths[0])]
    for before, width in zip(widths, widths[1:], strict=False):
        layers.append(nn.Conv2d(before, width, 3, padding=1, stride=2, bias=False))
        layers += [Block(width) for _ in range(3)]
    layers.append(nn.Conv2d(widths[-1], LATENT_CHANNELS, 3, padding=1))
    return nn.Sequential(*layers)


def make_decoder(widths: tuple[int, int, int, int]) -> nn.Sequential:
    """(batch, 4, 8, 8) -> (batch, 3, 64, 64), about [0, 1]."""
    at64, at32, at16, at8 = widths
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(LATENT_CHANNELS, at8, 3, padding=1), nn.ReLU()]
    for before, width in ((at8, at16), (at16, at32), (at32, at64)):
        layers += [Block(before) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, width, 3, padding=1, bias=False)]
    layers += [Block(at64), nn.Conv2d(at64, 3, 3, padding=1)]
    return nn.Sequential(*layers)


class WorldVAE(nn.Module):
    """Narrow TAESD. Latents are already in the diffusion model's scale (about unit variance)."""

    def __init__(self, widths: VAEWidths | None = None) -> None:
        super().__init__()
        widths = widths or VAEWidths()
        self.taesd_encoder = make_encoder(widths.encoder)
        self.taesd_decoder = make_decoder(widths.decoder)

    def encode(self, pictures: Tensor) -> Tensor:
        """(batch, 3, 64, 64) in [0, 1] -> (batch, 4, 8, 8)."""
        return self.taesd_encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """(batch, 4, 8, 8) -> (batch, 3, 64, 64) in [0, 1]."""
        return self.taesd_decoder(latents).clamp(0, 1)


def pad_vae(narrow: dict[str, Tensor]) -> dict[str, Tensor]:
    """The full-width state dict: every convolution zero-padded to 64 channels (3 and 4 at the ends stay)."""
    ends = (3, LATENT_CHANNELS)
    padded = {}
    for name, weight in narrow.items():
        shape = [
            size if axis > 1 or size in ends else FULL_WIDTH
            for axis, size in enumerate(weight.shape)
        ]
        full = weight.new_zeros(shape)
        full[tuple(slice(size) for size in weight.shape)] = weight
        padded[name] = full
    return padded


def roughen(latents: Tensor, most: float = 0.35) -> Tensor:
    """Add noise of a random strength to each latent, as a denoiser's errors will."""
    strength = most * torch.rand(len(latents), 1, 1, 1)
    return latents + strength * torch.randn_like(latents)


def train_vae(
    vae: WorldVAE,
    sample: Callable[[int], Tensor],
    *,
    steps: int,
    batch: int,
    lr: float = 2e-3,
    report: Callable[[int, float], None],
) -> WorldVAE:
    """Train on pictures from ``sample(batch)``: pixels and edges, latents pushed to zero mean and unit variance."""
    vae = vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    averaged = torch.optim.swa_utils.AveragedModel(
        vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    for step in range(steps):
        pictures = sample(batch).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = vae.encode(pictures).float()
            decoded = vae.taesd_decoder(roughen(latents)).float()
        pixel = F.l1_loss(decoded, pictures) + 2 * F.mse_loss(decoded, pictures)
        edges = F.l1_loss(spatial_gradient(decoded), spatial_gradient(pictures))
        moments = (
            latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        )
        loss = pixel + edges + 0.05 * moments
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(vae)
        report(step, F.mse_loss(decoded.detach(), pictures).item())
    vae.load_state_dict(averaged.module.state_dict())
    return vae
