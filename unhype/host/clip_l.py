"""CLIP-L by itself, which reads prompts for the hypernetwork: what it says of texts, and its states at their own length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from comfy.sd import CLIP

READER = "clip_l"
"""The host's name of the text model whose states are read."""


def find_reader(clip: CLIP) -> Any:
    """The CLIP-L of a CLIP.

    Raises:
        ValueError: it has none.
    """
    reader = getattr(clip.cond_stage_model, READER, None)
    if reader is None:
        raise ValueError(
            f"The connected CLIP ({type(clip.cond_stage_model).__name__}) has no CLIP-L, which reads the prompts for the "
            "hypernetwork. Connect the CLIP of a full checkpoint, or load clip_l with the other text encoders."
        )
    return reader


@contextmanager
def listening(reader: Any) -> Iterator[list[Tensor]]:
    """Collect the unprojected pooled states, (batch, 768), of every call inside the block."""
    heard: list[Tensor] = []
    handle = reader.transformer.register_forward_hook(
        lambda _module, _inputs, output: heard.append(output[3])
    )
    try:
        yield heard
    finally:
        handle.remove()


def has_known_form(reader: Any) -> bool:
    """Whether CLIP-L has the parts that ``final_states`` calls."""
    model = getattr(reader.transformer, "text_model", None)
    embeddings = getattr(model, "embeddings", None)
    return (
        all(hasattr(embeddings, part) for part in ("token_embedding", "position_embedding"))
        and all(hasattr(model, part) for part in ("encoder", "final_layer_norm"))
        and not reader.enable_attention_masks
    )


def final_states(
    reader: Any, embeddings: Tensor, layer: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Final states of token embeddings (batch, tokens, dim), and those of another layer if one is asked for.

    The host always runs 77 tokens. CLIP is causal, so what follows the end never reaches its state: these run at their length.
    """
    model, length = reader.transformer.text_model, embeddings.shape[1]
    states = embeddings.float()
    states = states + model.embeddings.position_embedding.weight[:length].to(states)
    lowest = torch.finfo(states.dtype).min
    mask = torch.full((length, length), lowest, device=states.device).triu_(1)
    with _inputs_kept(model.encoder):
        states, inner = model.encoder(states, mask=mask, intermediate_output=layer)
    if inner is not None and reader.layer_norm_hidden_state:
        inner = model.final_layer_norm(inner)
    return model.final_layer_norm(states), inner


@contextmanager
def _inputs_kept(encoder: nn.Module) -> Iterator[None]:
    """Give norms a copy of their input inside the block, where a gradient is wanted: the host's code overwrites it."""
    hooks = []
    if torch.is_grad_enabled():
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:]))
            for layer in encoder.modules()
            if isinstance(layer, nn.LayerNorm)
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
