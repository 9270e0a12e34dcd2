"""The world on disk: compact weights as committed, and the SD1.5-class checkpoint the host loads."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .text_encoder import VOCAB, TextWidths, WorldTextEncoder
from .unet import UNetWidths, pad_unet
from .vae import pad_vae

WEIGHTS = Path(__file__).parent / "weights"
COMPACT = WEIGHTS / "world.safetensors"
EVALUATOR = WEIGHTS / "evaluator.safetensors"
CHECKPOINT_NAME = "unhype-demo-world.safetensors"
LATENT_SCALE = 0.18215
COMPACT_FORMAT = "1"


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit rows and their scales: (rows, columns) int8, (rows,) fp32."""
    scale = weight.abs().amax(-1).clamp(min=1e-8) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def write_compact(
    path: Path,
    *,
    unet: dict[str, Tensor],
    unet_widths: UNetWidths,
    vae: dict[str, Tensor],
    text: WorldTextEncoder,
) -> None:
    """Write the trained narrow models: half precision, matrices of the text encoder in 8 bits."""
    tensors = {f"unet.{name}": value.half() for name, value in unet.items()}
    tensors |= {f"vae.{name}": value.half() for name, value in vae.items()}
    for name, value in text.state_dict().items():
        if name == "rows":
            tensors["text.rows"] = value.to(torch.int32)
        elif value.dim() == 2 and value.numel() > 100_000:
            tensors[f"text.{name}"], tensors[f"text.{name}.scale"] = quantise(value)
        else:
            tensors[f"text.{name}"] = value.half()
    metadata = {
        "unhype.world": COMPACT_FORMAT,
        "widths": json.dumps({"unet": asdict(unet_widths), "text": asdict(text.widths)}),
        "licence": "Apache-2.0; trained on art listed in demo/LICENSES.md",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, half, metadata)
    os.replace(half, path)


def read_compact(
    path: Path,
) -> tuple[dict[str, Tensor], UNetWidths, dict[str, Tensor], WorldTextEncoder]:
    """The narrow models in single precision: UNet weights, its widths, VAE weights, text encoder.

    Raises:
        ValueError: the file is not a compact world of this version.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("unhype.world") != COMPACT_FORMAT:
            raise ValueError(
                f"{path} holds world format {metadata.get('unhype.world')!r}, expected {COMPACT_FORMAT!r}. "
                "Restore the file from the repository or run `make world`."
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    widths = json.loads(metadata["widths"])
    scales = {
        name.removesuffix(".scale"): value
        for name, value in tensors.items()
        if name.endswith(".scale")
    }
    plain = {}
    for name, value in tensors.items():
        if name.endswith(".scale"):
            continue
        if name in scales:
            plain[name] = value.float() * scales[name][:, None]
        else:
            plain[name] = value.long() if name == "text.rows" else value.float()

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value
            for name, value in plain.items()
            if name.startswith(prefix)
        }

    text_state = part("text.")
    text = WorldTextEncoder(text_state["table"], text_state["rows"], TextWidths(**widths["text"]))
    text.load_state_dict(text_state)
    return part("unet."), UNetWidths(**widths["unet"]), part("vae."), text.eval()


def expand(compact: Path = COMPACT, out: Path = Path(CHECKPOINT_NAME)) -> Path:
    """Write the single-file SD1.5-class checkpoint that the stock CheckpointLoaderSimple loads.

    The file is about 300 MB in half precision. An existing file made from the same compact weights is kept.
    """
    stamp = f"{compact.stat().st_size}-{compact.stat().st_mtime_ns}"
    note = out.with_suffix(".source")
    if out.exists() and note.exists() and note.read_text() == stamp:
        return out
    unet, widths, vae, text = read_compact(compact)
    tensors = {
        f"model.diffusion_model.{name}": value for name, value in pad_unet(unet, widths).items()
    }
    tensors |= {f"first_stage_model.{name}": value for name, value in pad_vae(vae).items()}
    tensors["first_stage_model.vae_scale"] = torch.tensor(LATENT_SCALE)
    tensors["first_stage_model.vae_shift"] = torch.tensor(0.0)
    tensors |= {
        f"cond_stage_model.transformer.text_model.{name}": value
        for name, value in text.to_clip().items()
    }
    if (
        len(tensors["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"])
        != VOCAB
    ):
        raise ValueError(
            f"{compact} does not cover CLIP's {VOCAB} tokens; restore it from the repository."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    half = out.with_suffix(".part")
    single = {"first_stage_model.vae_scale", "first_stage_model.vae_shift"}
    save_file(
        {
            name: (value if name in single else value.half()).contiguous()
            for name, value in tensors.items()
        },
        half,
        {
            "modelspec.title": "UnHype demo world",
            "modelspec.license": "Apache-2.0; art in demo/LICENSES.md",
        },
    )
    os.replace(half, out)
    note.write_text(stamp)
    return out
