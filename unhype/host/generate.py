"""From a pack and a conditioning to LoRA factors, entry by entry."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint import Generated, Pack, gather, stack
from ..gate import Reading
from ..lora import LoRAFactors
from .embed import Entry, EntryEmbeddings, embed_text, read_entry, require_embeddings

if TYPE_CHECKING:
    from comfy.sd import CLIP

log = logging.getLogger("unhype")


ROUNDING = 1e-3
"""Between strengths that are the same, read in batches of other sizes."""


@dataclass(frozen=True)
class DynamicLoRA:
    """What a pack wrote for each entry of a conditioning."""

    pack: Pack
    entries: tuple[Generated, ...]

    def state_dict(self) -> dict[str, Tensor]:
        """The first entry's factors, as the host's LoRA nodes read them; without effect if nothing fired."""
        if not self.entries:
            raise ValueError("The conditioning has no entry. Connect an encoded prompt.")
        return self.entries[0].factors.to("cpu").state_dict()

    def report(self) -> str:
        """What fired, a line an entry."""
        return "\n".join(describe(self.pack, generated) for generated in self.entries)


def describe(pack: Pack, generated: Generated) -> str:
    """Which concepts fired in the rows of one conditioning entry, or which came closest."""
    probability = generated.reading.probability.amax(0).tolist()
    fired = generated.reading.fired.any(0).tolist()
    shares = generated.shares.amax(0).tolist()
    names = pack.info.concept_names
    if any(fired):
        parts = [
            f"{name} ({p:.2f}{'' if share == 1 else f', {share:.0%} of its LoRA'})"
            for name, p, share, fires in zip(names, probability, shares, fired, strict=True)
            if fires
        ]
        return f"fired: {', '.join(parts)}"
    nearest, name = max(
        (p, name) for name, p, active in zip(names, probability, pack.active, strict=True) if active
    )
    return f"nothing fired (nearest: {name} {nearest:.2f})"


@torch.no_grad()
def generate(
    pack: Pack, conditioning: Sequence[Entry], *, clip: CLIP | None = None, text: str = ""
) -> DynamicLoRA:
    """Write the LoRA of every entry of a conditioning.

    Args:
        clip: with ``text``, which is read too: all of its 77-token chunks, and windows of long ones or every token. What
            fires most strongly decides.

    Raises:
        ValueError: an entry carries no embedding and there is no text to take it from, or there is text but no CLIP.
    """
    spec, tokens = pack.info.spec.embedding, pack.gate.config.tokens
    if text.strip() and clip is None:
        raise ValueError(
            "CLIPToLoRA got a text but no CLIP to read it with. Connect CLIP too, or clear the text."
        )
    vectors = None
    if clip is not None and text.strip():
        vectors = embed_text(clip, text, spec, tokens=tokens)
    entries = []
    for index, entry in enumerate(conditioning):
        found = read_entry(entry, spec, tokens=tokens)
        if vectors is not None:
            found = (
                EntryEmbeddings(vectors[:1], vectors, complete=True)
                if found is None
                else found.and_also(vectors)
            )
        entries.append(write_entry(pack, require_embeddings(found, index, spec)))
    lora = DynamicLoRA(pack, tuple(entries))
    log.info("%s: %s", pack.name, lora.report().replace("\n", "; "))
    return lora


@torch.no_grad()
def write_entry(pack: Pack, embeddings: EntryEmbeddings) -> Generated:
    """Factors for the rows of one conditioning entry.

    Of everything that a row is made from, each concept that acts (:meth:`Pack.write`) takes the vector at which it fires most
    surely, and the factors written for those vectors add up. Where each 77 tokens can have their own LoRA, these are written too, in the same
    way from what belongs to them. Vectors of zeros, as Conditioning Zero Out leaves them, ask for nothing.
    """
    further = embeddings.further
    rows = [pack.write(torch.cat([torch.atleast_2d(row), further])) for row in embeddings.rows]
    reading, shares = gather(rows)
    chunks = _write_chunks(pack, embeddings, reading)
    return Generated(stack(rows), reading, shares, chunks)


def _write_chunks(pack: Pack, embeddings: EntryEmbeddings, reading: Reading) -> LoRAFactors | None:
    """Factors for every 77 tokens, if the family allows and they explain all that fired, as strongly as it did."""
    if embeddings.chunks is None or not pack.info.spec.per_chunk:
        return None
    chunks = [pack.write(candidates) for candidates in embeddings.chunks]
    own, _ = gather(chunks)
    strong = [pack.strength(r.probability.amax(0)) for r in (own, reading)]
    explained = own.fired.any(0) & (strong[0] >= strong[1] - ROUNDING)
    return stack(chunks) if (explained | ~reading.fired.any(0)).all() else None
