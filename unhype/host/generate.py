"""From a pack and a conditioning to LoRA factors, entry by entry."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint import Generated, Pack
from ..gate import Reading
from .embed import Entry, embed_text, read_embedding, require_embedding

if TYPE_CHECKING:
    from comfy.sd import CLIP

log = logging.getLogger("unhype")


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
        return "\n".join(self._line(generated.reading) for generated in self.entries)

    def _line(self, reading: Reading) -> str:
        probability = reading.probability.amax(0).tolist()
        fired = reading.fired.any(0).tolist()
        names = self.pack.info.concept_names
        if any(fired):
            parts = [
                f"{name} ({p:.2f})"
                for name, p, fires in zip(names, probability, fired, strict=True)
                if fires
            ]
            return f"fired: {', '.join(parts)}"
        nearest, name = max(
            (p, name)
            for name, p, active in zip(names, probability, self.pack.active, strict=True)
            if active
        )
        return f"nothing fired (nearest: {name} {nearest:.2f})"


@torch.no_grad()
def generate(
    pack: Pack, conditioning: Sequence[Entry], *, clip: CLIP | None = None, text: str = ""
) -> DynamicLoRA:
    """Write the LoRA of every entry of a conditioning.

    Args:
        clip: with ``text``, each of its 77-token chunks is read too, and the one that fires most strongly decides.

    Raises:
        ValueError: an entry carries no embedding and there is no text to take it from, or there is text but no CLIP.
    """
    spec = pack.info.spec.embedding
    if text.strip() and clip is None:
        raise ValueError(
            "CLIPToLoRA got a text but no CLIP to read it with. Connect CLIP too, or clear the text."
        )
    chunks = embed_text(clip, text, spec) if clip is not None and text.strip() else None
    entries = []
    for index, entry in enumerate(conditioning):
        embedding = read_embedding(entry, spec)
        if embedding is None and chunks is not None:
            embedding = chunks[:1]
        entries.append(_generate(pack, require_embedding(embedding, index, spec), chunks))
    lora = DynamicLoRA(pack, tuple(entries))
    log.info("%s: %s", pack.name, lora.report().replace("\n", "; "))
    return lora


def _generate(pack: Pack, embedding: Tensor, chunks: Tensor | None) -> Generated:
    """Factors for the rows of one entry, (n, dim); a row of zeros, as Conditioning Zero Out leaves it, asks for nothing."""
    silent = (embedding == 0).all(1)
    if chunks is not None:
        embedding = torch.stack([_strongest(pack, torch.cat([e[None], chunks])) for e in embedding])
    generated = pack.generate(embedding)
    reading = Reading(
        generated.reading.probability.masked_fill(silent[:, None], 0),
        generated.reading.fired & ~silent[:, None],
    )
    return replace(generated, factors=generated.factors.scaled((~silent).float()), reading=reading)


def _strongest(pack: Pack, candidates: Tensor) -> Tensor:
    """The embedding that comes closest to firing, of (candidates, dim)."""
    reading = pack.gate.read(candidates, active=pack.active)
    active = torch.tensor(pack.active, device=reading.probability.device)
    return candidates[int((reading.probability * active).amax(1).argmax())]
