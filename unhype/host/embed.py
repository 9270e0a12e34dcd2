"""Conditioning and text to the embeddings that a hypernetwork reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..families import EmbeddingSpec

if TYPE_CHECKING:
    from comfy.sd import CLIP

Entry = tuple[Tensor | None, Mapping[str, Any]] | list[Any]
"""One entry of the host's CONDITIONING: text states and a dictionary."""


def read_embedding(entry: Entry, spec: EmbeddingSpec) -> Tensor | None:
    """The vectors that a conditioning entry carries, (n, dim), n is nearly always 1; nothing if it carries none.

    Raises:
        ValueError: the vectors are of another text encoder.
    """
    pooled = entry[1].get("pooled_output")
    if pooled is None:
        return None
    return _cut(pooled, spec, "The conditioning's pooled output")


def require_embedding(embedding: Tensor | None, index: int, spec: EmbeddingSpec) -> Tensor:
    """The embedding of entry ``index``; ``ValueError`` if there is none."""
    if embedding is None:
        raise ValueError(
            f"Entry {index + 1} of the conditioning has no pooled output (got None), and the LoRA is made from it: "
            f"{spec.dim} numbers of {spec.encoder}. Encode the prompt with CLIP Text Encode, or connect a CLIP and "
            "the text to CLIPToLoRA as well."
        )
    return embedding


@torch.no_grad()
def embed_text(clip: CLIP, text: str, spec: EmbeddingSpec) -> Tensor:
    """The vector of every 77-token chunk of a text, (chunks, dim); a conditioning carries only the first one's."""
    tokens: dict[str, list[Any]] = clip.tokenize(text)
    encode: Any = clip.encode_from_tokens
    vectors = []
    for index in range(max(len(chunks) for chunks in tokens.values())):
        chunk = {key: [chunks[min(index, len(chunks) - 1)]] for key, chunks in tokens.items()}
        _, pooled = encode(chunk, return_pooled="unprojected")
        if pooled is None:
            raise ValueError(
                f"The connected CLIP pools nothing; the LoRA is made from {spec.encoder}. "
                "Connect the CLIP of a checkpoint that has it."
            )
        vectors.append(_cut(pooled, spec, "The connected CLIP's pooled output"))
    return torch.cat(vectors)


def _cut(pooled: Tensor, spec: EmbeddingSpec, what: str) -> Tensor:
    """The part of (n, width) that the spec names, in single precision."""
    if pooled.dim() != 2 or pooled.shape[1] != spec.start + spec.dim:
        raise ValueError(
            f"{what} has shape {tuple(pooled.shape)}, expected (n, {spec.start + spec.dim}) of {spec.encoder}. "
            "Use the CLIP of a model of the kind that the pack was trained on."
        )
    return pooled[:, spec.start :].float().cpu()
