"""Conditioning and text to the embeddings that a hypernetwork reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..families import EmbeddingSpec
from .bypass import CHUNK
from .tap import DIGEST, LEDGER, TOKENS, VECTORS, Heard, Placed, digest, tap

if TYPE_CHECKING:
    from comfy.sd import CLIP

OTHER_TEXT = ("gligen", "cross_attn_controlnet")
"""Where a conditioning may carry text that no hypernetwork reads."""

Entry = tuple[Tensor | None, Mapping[str, Any]] | list[Any]
"""One entry of the host's CONDITIONING: text states and a dictionary."""


@dataclass(frozen=True)
class EntryEmbeddings:
    """What a conditioning entry tells of its text.

    Attributes:
        rows: pooled vectors, (n, dim), one a row of the entry's states, or of each row's tokens, (n, tokens, dim), zeros behind;
            n is nearly always 1.
        further: vectors of other text in the entry, (m, dim): later 77 tokens, windows or tokens, joined or mixed prompts.
        complete: whether they are known to cover all of the entry's text.
        chunks: the vectors of every 77 tokens, in their order, (n, dim) each, if there are several and all are known.
    """

    rows: Tensor
    further: Tensor
    complete: bool
    chunks: tuple[Tensor, ...] | None = None

    def and_also(self, vectors: Tensor) -> EntryEmbeddings:
        """The same with further vectors, (m, dim)."""
        return replace(self, further=torch.cat([self.further, vectors]))


def read_entry(
    entry: Entry, spec: EmbeddingSpec, *, tokens: bool = False
) -> EntryEmbeddings | None:
    """The vectors that a conditioning entry carries; nothing if it carries none.

    Args:
        tokens: whether of every token, in place of the ends of texts and windows.

    Raises:
        ValueError: the vectors are of another text encoder.
    """
    states, extras = entry[0], entry[1]
    pooled: Tensor | None = extras.get("pooled_output")
    if states is not None and not states.any() and (pooled is None or not pooled.any()):
        nothing = torch.zeros(1, spec.dim)  # Conditioning Zero Out
        return EntryEmbeddings(nothing, nothing[:0], complete=True)
    rows = None
    if pooled is not None and spec.pooled_width is not None:
        rows = _cut(pooled, spec, "The conditioning's pooled output")
    heard = _find(states, extras)
    known = None if heard is None else heard.tokens if tokens else heard.ends
    if tokens and known is None and rows is not None and states is not None:
        rows = _final_tokens(states, rows)
    carried: Tensor | None = extras.get(TOKENS if tokens else VECTORS)
    further = [] if carried is None else [carried]
    if known is not None:
        further.append(known.vectors)
    if rows is None and not further:
        return None
    vectors = torch.cat(further).unique(dim=0) if further else torch.zeros(0, spec.dim)
    chunks = None
    if known is not None and states is not None:
        chunks = _by_chunk(known, states.shape[1])
    read_in_full = heard is not None and (tokens or heard.windowed)
    complete = read_in_full and not any(key in extras for key in OTHER_TEXT)
    return EntryEmbeddings(vectors[:1] if rows is None else rows, vectors, complete, chunks)


def _find(states: Tensor | None, extras: Mapping[str, Any]) -> Heard | None:
    """What was read of an entry's text by the CLIP that encoded it, if that is known of all of it."""
    if states is None or len(states) != 1:
        return None
    if DIGEST in extras and extras[DIGEST] == digest(states[0]):
        return Heard.told(extras)
    return LEDGER.find(states)


def _by_chunk(known: Placed, length: int) -> tuple[Tensor, ...] | None:
    """The vectors of every 77 tokens of a long text's states.

    Nothing for mixtures, and where another text model alone was given some of the text.
    """
    number, rest = divmod(length, CHUNK)
    return None if rest or number < 2 else known.by_chunk(number)


def _final_tokens(states: Tensor, pooled: Tensor) -> Tensor:
    """The vectors of every row's tokens, (n, tokens, dim), as far as states (n, length, width) are CLIP-L's final ones.

    They are where the pooled vector, (n, dim), is one of them. Elsewhere, as after Clip Skip, that vector is all there is.
    """
    if len(states) != len(pooled) or states.shape[2] != pooled.shape[1]:
        return pooled
    plain = states.float().cpu()
    at_end = torch.isclose(plain, pooled[:, None], rtol=1e-4, atol=1e-4).all(-1)
    rows = [
        _until_end(row, int(places.int().argmax())) if places.any() else vector[None]
        for row, vector, places in zip(plain, pooled, at_end, strict=True)
    ]
    return pad_sequence(rows, batch_first=True)


def _until_end(states: Tensor, end: int) -> Tensor:
    """States (length, dim) behind the start of every 77 tokens; of those with the known ``end``, up to it.

    Where the others end does not show, so their padding is among them.
    """
    places = torch.arange(len(states))
    padding = (places > end) & (places // CHUNK == end // CHUNK)
    return states[(places % CHUNK != 0) & ~padding]


def require_embeddings(
    found: EntryEmbeddings | None, index: int, spec: EmbeddingSpec
) -> EntryEmbeddings:
    """The embeddings of entry ``index``; ``ValueError`` if there are none."""
    if found is None:
        raise ValueError(
            f"Entry {index + 1} of the conditioning carries no vector of {spec.encoder} ({spec.dim} numbers), and the LoRA "
            "is made from it. Encode the prompt with the CLIP that UnHype Guard gives out, or connect a CLIP and the text "
            "to CLIPToLoRA as well."
        )
    return found


def embed_text(clip: CLIP, text: str, spec: EmbeddingSpec, *, tokens: bool = False) -> Tensor:
    """The vectors of a text, as a tapped CLIP reads it, (n, dim); those of its 77-token chunks come first.

    Args:
        tokens: as for ``read_entry``.
    """
    tapped = tap(clip, remember=False, windows=not tokens)
    encode: Any = tapped.encode_from_tokens
    with torch.no_grad():
        told = encode(tapped.tokenize(text), return_dict=True)
    vectors: Tensor = told[TOKENS if tokens else VECTORS]
    if vectors.shape[1] != spec.dim:
        raise ValueError(
            f"The connected CLIP's vectors have {vectors.shape[1]} numbers, expected {spec.dim} of {spec.encoder}. "
            "Use the CLIP of a model of the kind that the pack was trained on."
        )
    return vectors


def _cut(pooled: Tensor, spec: EmbeddingSpec, what: str) -> Tensor:
    """The spec's part of the host's pooled output (n, width), in single precision."""
    if pooled.dim() != 2 or pooled.shape[1] != spec.pooled_width:
        raise ValueError(
            f"{what} has shape {tuple(pooled.shape)}, expected (n, {spec.pooled_width}) of {spec.encoder}. "
            "Use the CLIP of a model of the kind that the pack was trained on."
        )
    return pooled[:, : spec.dim].float().cpu()
