"""The narrow models, padded to full size, compute the same."""

from __future__ import annotations

import torch
from torch import nn

from demo.world.expand import quantise
from demo.world.text_encoder import TextWidths, WorldTextEncoder
from demo.world.unet import FULL_CHANNELS, FULL_TIME, UNetWidths, WorldUNet, pad_unet
from demo.world.vae import VAEWidths, WorldVAE, pad_vae


def randomise(module: nn.Module) -> None:
    """Leave no weight at zero, where a fault would not show."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)


@torch.no_grad()
def test_the_padded_denoiser_equals_the_narrow_one() -> None:
    torch.manual_seed(0)
    narrow = WorldUNet(UNetWidths(channels=40, time=64))
    randomise(narrow)
    full = WorldUNet(UNetWidths(channels=FULL_CHANNELS, time=FULL_TIME))
    full.load_state_dict(pad_unet(narrow.state_dict(), narrow.widths))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.randn(2, 77, 768)
    torch.testing.assert_close(full(*inputs), narrow(*inputs), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_padded_autoencoder_equals_the_narrow_one() -> None:
    torch.manual_seed(0)
    narrow = WorldVAE(VAEWidths((8, 8, 8, 8), (8, 8, 8, 8)))
    randomise(narrow)
    full = WorldVAE(VAEWidths((64, 64, 64, 64), (64, 64, 64, 64)))
    full.load_state_dict(pad_vae(narrow.state_dict()))
    pictures = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(full.encode(pictures), narrow.encode(pictures))
    latents = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(full.decode(latents), narrow.decode(latents))


@torch.no_grad()
def test_the_text_encoder_as_clip_equals_the_narrow_one() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    rows = torch.zeros(49408, dtype=torch.long)
    rows[1000:1010] = torch.arange(1, 11)
    narrow = WorldTextEncoder(
        torch.randn(11, 16), rows, TextWidths(rank=16, heads=2, mlp=32, positions=20)
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            projection_dim=768, hidden_size=768, intermediate_size=3072, num_attention_heads=12
        )
    )
    state = narrow.to_clip()
    stem = (
        "text_model." if any(name.startswith("text_model.") for name in clip.state_dict()) else ""
    )
    clip.load_state_dict({stem + name: value for name, value in state.items()}, strict=False)
    tokens = torch.full((1, 77), 49407)
    tokens[0, :5] = torch.tensor([49406, 1003, 7, 1009, 49407])
    states, pooled = narrow(tokens)
    expected = clip(tokens)
    torch.testing.assert_close(states, expected.last_hidden_state, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-4, rtol=1e-3)


def test_eight_bit_rows_come_back_within_half_a_step() -> None:
    weight = torch.randn(5, 40)
    quantised, scale = quantise(weight)
    assert (quantised.float() * scale[:, None] - weight).abs().max() <= scale.max() / 2 + 1e-6
