"""CLIP-L by itself, which reads prompts for the hypernetwork: what it says of texts, and its states at their own length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Said:
    """What CLIP-L said of a batch of texts.

    Attributes:
        pooled: the unprojected states at their ends, (batch, 768).
        states: the final states of all tokens, start and padding among them, (batch, tokens, 768); the pooled ones are of these.
    """

    pooled: Tensor
    states: Tensor

    def texts(self) -> list[Tensor]:
        """The states of each text behind its start and up to its end, which is the last, (tokens, 768)."""
        at_end = (self.states == self.pooled[:, None]).all(-1)
        ends = torch.where(at_end.any(1), at_end.int().argmax(1), at_end.shape[1]).tolist()
        return [
            torch.cat([states[1:end], pooled[None]])
            for states, pooled, end in zip(self.states, self.pooled, ends, strict=True)
        ]


@contextmanager
def listening(reader: Any) -> Iterator[list[Said]]:
    """Collect what every call inside the block says."""
    heard: list[Said] = []
    # The host scales the states by the weights of words in place.
    handle = reader.transformer.register_forward_hook(
        lambda _module, _inputs, output: heard.append(Said(output[3], output[0].clone()))
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
