"""Train the world's denoiser: scenes to latents once, then captions and noise without end.

Runs alone or under ``accelerate launch --num_processes N``: processes share the batch.
The learning rate follows elapsed time, so a run of any length ends annealed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from .art import Scene, compose, sample_scene
from .captions import Lexicon, write_caption
from .text_encoder import WorldTextEncoder
from .unet import UNetWidths, WorldUNet, diffusion_loss, noise_schedule
from .vae import WorldVAE
from .words import Tokenizer

log = logging.getLogger("unhype")


@dataclass(frozen=True)
class UNetTraining:
    """Settings of one run."""

    minutes: float
    batch: int = 64
    lr: float = 6e-4
    caption_dropout: float = 0.1
    word_noise: float = 1.1
    ema: float = 0.999
    save_every: int = 250
    compile: bool = False


@dataclass(frozen=True)
class LatentPool:
    """Encoded scenes, (n, 4, 8, 8), and what each shows."""

    latents: Tensor
    scenes: list[Scene]


@torch.no_grad()
def make_pool(
    vae: WorldVAE, art: Tensor, count: int, *, seed: int, pairs: float = 0.5
) -> LatentPool:
    """Paint and encode ``count`` scenes."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, pairs=pairs) for _ in range(count)]
    latents = []
    for start in range(0, count, 64):
        pictures = torch.stack([compose(art, scene, rng) for scene in scenes[start : start + 64]])
        latents.append(vae.encode(pictures))
    return LatentPool(torch.cat(latents), scenes)


def save_run(
    folder: Path, step: int, seconds: float, unet: WorldUNet, averaged: dict[str, Tensor]
) -> None:
    """Write the averaged weights and the progress; whole files only."""
    for name, state in (
        ("unet.safetensors", averaged),
        ("unet_last.safetensors", unet.state_dict()),
    ):
        half = folder / f"{name}.part"
        save_file({key: value.contiguous() for key, value in state.items()}, half)
        os.replace(half, folder / name)
    (folder / "unet.json").write_text(json.dumps({"step": step, "seconds": seconds}))


def train_unet(
    pool: LatentPool,
    encoder: WorldTextEncoder,
    tokenizer: Tokenizer,
    lexicon: Lexicon,
    *,
    widths: UNetWidths,
    training: UNetTraining,
    folder: Path,
) -> None:
    """Train until the minutes are spent; ``folder/unet.safetensors`` holds the averaged weights throughout.

    An interrupted run continues from ``folder/unet_last.safetensors`` with the time it had left.
    """
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    rank = accelerator.process_index
    torch.manual_seed(1000 + rank)
    rng = np.random.default_rng(1000 + rank)
    unet = WorldUNet(widths)
    step, spent = 0, 0.0
    if (folder / "unet_last.safetensors").exists():
        unet.load_state_dict(load_file(folder / "unet_last.safetensors"))
        progress = json.loads((folder / "unet.json").read_text())
        step, spent = progress["step"], progress["seconds"]
        averaged = load_file(folder / "unet.safetensors")
    else:
        averaged = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=training.lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )
    runnable = torch.compile(unet) if training.compile else unet
    model, optimizer = accelerator.prepare(runnable, optimizer)
    signal = noise_schedule().to(accelerator.device)
    begin, total, losses = time.monotonic(), training.minutes * 60, []
    warmup_from = step
    while True:
        seconds = torch.tensor([spent + time.monotonic() - begin])
        seconds = accelerator.reduce(seconds, "mean").item()  # pyright: ignore[reportAttributeAccessIssue]
        if seconds >= total:
            break
        rate = 0.5 * (1 + math.cos(math.pi * seconds / total))
        for group in optimizer.param_groups:
            group["lr"] = training.lr * max(rate, 0.01) * min(1.0, (step - warmup_from + 1) / 100)
        chosen = rng.integers(len(pool.scenes), size=training.batch)
        captions = [
            ""
            if rng.random() < training.caption_dropout
            else write_caption(pool.scenes[i], rng, lexicon)
            for i in chosen
        ]
        with torch.no_grad(), accelerator.autocast():
            states, _ = encoder(tokenizer(captions), noise=training.word_noise)
        latents = pool.latents[torch.from_numpy(chosen)]
        with accelerator.autocast():
            loss = diffusion_loss(model, latents, states.float(), signal)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(training.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in unet.state_dict().items():
                averaged[name].lerp_(value, 1 - decay)
        losses.append(loss.item())
        if step % training.save_every == 0 and accelerator.is_main_process:
            log.info(
                "step %d: loss %.4f after %.0f s",
                step,
                sum(losses[-250:]) / len(losses[-250:]),
                seconds,
            )
            save_run(folder, step, seconds, unet, averaged)
    if accelerator.is_main_process:
        save_run(folder, step, total, unet, averaged)
