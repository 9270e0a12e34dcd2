"""A checkpoint's own text encoder, for many short prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from comfy.sd import CLIP

POOLED_BATCH = 64


@dataclass(frozen=True)
class TextBatch:
    """Encoded prompts.

    Attributes:
        cross: the states that the model attends to, (batch, tokens, dim)
        pooled: the vectors that the hypernetwork reads, (batch, embedding_dim)
    """

    cross: Tensor
    pooled: Tensor


class Chunk(NamedTuple):
    """The first 77 tokens of a prompt: their ids, and whether all of them count alike."""

    tokens: list[int]
    plain: bool
    weighted: list[tuple[int, float]]


class TextEncoder:
    """The host's CLIP with one text model, as Stable Diffusion 1.x has it."""

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip
        stage: Any = clip.cond_stage_model
        self.stage = stage
        self.key: str = stage.clip_name
        self.encoder: Any = getattr(stage, stage.clip)
        self.end: int = self.encoder.special_tokens["end"]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> TextBatch:
        """Encode prompts as the host's own node does; what lies past the first 77 tokens is cut off."""
        chunks = self._chunks(texts)
        self._ready()
        if all(chunk.plain for chunk in chunks):
            cross, pooled = self.encoder.encode([chunk.tokens for chunk in chunks])[:2]
            return TextBatch(cross, pooled)
        results = [
            self.stage.encode_token_weights({self.key: [chunk.weighted]})[:2] for chunk in chunks
        ]
        cross, pooled = (torch.cat(part) for part in zip(*results, strict=True))
        device = self.clip.patcher.load_device
        return TextBatch(cross.to(device), pooled.to(device))

    @torch.no_grad()
    def embed_pooled(self, texts: Sequence[str]) -> Tensor:
        """Only the pooled vectors of ``embed``, (texts, embedding_dim), much faster for short prompts.

        CLIP is causal, so what follows the end of the text never reaches its state: short prompts run at their own length.
        """
        chunks = self._chunks(texts)
        self._ready()
        if not self._has_known_form():
            parts = [
                self.embed(texts[start : start + POOLED_BATCH]).pooled
                for start in range(0, len(texts), POOLED_BATCH)
            ]
            return torch.cat(parts)
        lengths = [chunk.tokens.index(self.end) + 1 for chunk in chunks]
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        pooled = None
        for start in range(0, len(order), POOLED_BATCH):
            chosen = order[start : start + POOLED_BATCH]
            longest = lengths[chosen[-1]]
            tokens = torch.tensor([chunks[index].tokens[:longest] for index in chosen])
            ends = torch.tensor([lengths[index] - 1 for index in chosen])
            states = self._run(tokens, ends)
            if pooled is None:
                pooled = states.new_empty(len(texts), states.shape[1])
            pooled[chosen] = states
        if pooled is None:
            raise ValueError("There is no text to encode; give at least one.")
        return pooled

    def _run(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Final states at ``ends``, (batch, dim), of tokens (batch, length)."""
        model = self.encoder.transformer.text_model
        device = model.embeddings.token_embedding.weight.device
        tokens = tokens.to(device)
        length = tokens.shape[1]
        position = model.embeddings.position_embedding.weight[:length].float()
        states = model.embeddings.token_embedding(tokens, out_dtype=torch.float32) + position
        lowest = torch.finfo(states.dtype).min
        mask = torch.full((length, length), lowest, device=device).triu_(1)
        states, _ = model.encoder(states, mask=mask)
        states = model.final_layer_norm(states)
        return states[torch.arange(len(states), device=device), ends.to(device)]

    def _has_known_form(self) -> bool:
        """Whether the text model has the parts that ``_run`` calls, and pools what it returns."""
        model = getattr(self.encoder.transformer, "text_model", None)
        embeddings = getattr(model, "embeddings", None)
        parts = ("token_embedding", "position_embedding")
        return (
            all(hasattr(embeddings, part) for part in parts)
            and all(hasattr(model, part) for part in ("encoder", "final_layer_norm"))
            and not self.encoder.enable_attention_masks
            and not self.encoder.return_projected_pooled
        )

    def _chunks(self, texts: Sequence[str]) -> list[Chunk]:
        chunks = []
        for text in texts:
            weighted = self.clip.tokenize(text)[self.key][0]
            plain = all(weight == 1.0 for _, weight in weighted)
            chunks.append(Chunk([int(token) for token, _ in weighted], plain, weighted))
        return chunks

    def _ready(self) -> None:
        self.stage.reset_clip_options()
        self.clip.load_model()
