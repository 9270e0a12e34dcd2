"""The world at its own width: the same pictures as the checkpoint that ComfyUI loads, several times faster.

The checkpoint is this model padded with zeros, so what is measured here holds there; ``tests/host/test_narrow_world.py`` compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from unhype.checkpoint import BaseFingerprint
from unhype.embedding import last_heard, until_end
from unhype.families import FAMILIES, FamilySpec
from unhype.host import vision
from unhype.host.bypass import adapted, find_sites, find_targets
from unhype.host.euler import draw_noise, euler, guide, keep, on_first
from unhype.host.text import TextBatch, Tokens
from unhype.lora import LoRAFactors, TargetModule

from .expand import COMPACT, read_compact
from .text_encoder import EOS
from .unet import LATENT_CHANNELS, WorldUNet, noise_schedule
from .vae import WorldVAE
from .words import Tokenizer, known_words, tokenizer_folder

DOWNSCALE = 8
TEXTS_AT_ONCE = 64


class NarrowWorld:
    """The demo world as training and evaluation use a model (``PictureModel``)."""

    def __init__(self, compact: Path = COMPACT) -> None:
        unet, widths, vae, self._text = read_compact(compact)
        self._unet = WorldUNet(widths)
        self._unet.load_state_dict(unet)
        self._vae = WorldVAE()
        self._vae.load_state_dict(vae)
        for module in (self._unet, self._vae, self._text):
            module.eval().requires_grad_(False)
        vision.declare_when_imported()  # transformers imports it
        self._tokenize = Tokenizer(tokenizer_folder())
        self._words = list(known_words(tokenizer_folder()))
        self.device = torch.device("cpu")
        self.family: FamilySpec = next(iter(FAMILIES.values()))
        self.targets: tuple[TargetModule, ...] = find_targets(self._unet, self.family.targets)
        self._sites = find_sites(self._unet, self.targets)
        digest = hashlib.sha256(compact.read_bytes()).hexdigest()[:16]
        self.fingerprint = BaseFingerprint("demo world", digest)
        share = noise_schedule()
        self._sigmas = ((1 - share) / share).sqrt()
        self._empty = self.embed([""])

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> TextBatch:
        """Encode prompts; what is beyond 77 tokens is cut."""
        ids = self._tokenize(texts)
        states, pooled = self._text(ids)
        return TextBatch(states, pooled, pooled, until_end(states, (ids == EOS).int().argmax(-1)))

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts, each up to the one that ends the text."""
        return [row[: row.index(EOS) + 1] for row in self._tokenize(texts).tolist()]

    @torch.no_grad()
    def embed_pooled(self, texts: Sequence[str]) -> Tensor:
        """Only the pooled vectors, (texts, 768)."""
        return last_heard(self.embed_tokens(texts))

    @torch.no_grad()
    def embed_tokens(self, texts: Sequence[str]) -> Tensor:
        """The states of every token, (texts, tokens, 768), zeros behind each end."""
        ids = self._tokenize(texts)
        ends = (ids == EOS).int().argmax(-1)
        said = torch.zeros(len(ids), int(ends.max()), self.family.embedding.dim)
        for chosen in ends.argsort().split(TEXTS_AT_ONCE):
            states, _ = self._text(ids[chosen][:, : int(ends[chosen].max()) + 1])
            said[chosen, : states.shape[1] - 1] = until_end(states, ends[chosen])
        return said

    @torch.no_grad()
    def token_embeddings(self, texts: Sequence[str]) -> Tokens:
        """Tokens of prompts; what is beyond 77 is cut."""
        ids = self._tokenize(texts)
        return Tokens(ids, self.vocabulary()[ids], (ids == EOS).int().argmax(-1))

    def encode_embeddings(self, embeddings: Tensor, ends: Tensor) -> TextBatch:
        """``embed`` from token embeddings (batch, tokens, 768) that end at ``ends`` (batch,), differentiable in them."""
        states, pooled = self._text.encode(embeddings, ends)
        return TextBatch(states, pooled, pooled, until_end(states, ends))

    def vocabulary(self) -> Tensor:
        """The embedding of every token, (49408, 768)."""
        return self._table

    def spell(self, ids: Tensor) -> list[str]:
        """The text of each row of token ids (batch, tokens), up to its end."""
        return self._tokenize.spell(ids)

    def words(self) -> list[str]:
        """Whole words that the text encoder knows, the most frequent ones first."""
        return [word for word in self._words if len(word) > 2]

    def predict(
        self, x_t: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None
    ) -> Tensor:
        """Predicted noise, differentiable in ``factors`` and ``text``."""
        inputs = x_t / (sigma.square() + 1).sqrt().view(-1, 1, 1, 1)
        distance = (sigma.log()[:, None] - self._sigmas.log()).abs()
        timestep = distance.argmin(-1)
        if factors is None:
            return self._unet(inputs, timestep, text.cross)
        with adapted(self._sites, factors):
            return self._unet(inputs, timestep, text.cross)

    @torch.no_grad()
    def rollout(
        self,
        text: TextBatch,
        *,
        steps: int,
        guidance_scale: float,
        seed: int,
        size: int,
        stop_indices: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """States (kept, batch, 4, height, width) before the steps named, and their sigmas (kept,)."""
        kept = sorted(set(stop_indices))
        shape = (len(text), LATENT_CHANNELS, size // DOWNSCALE, size // DOWNSCALE)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        sigmas = self._levels(steps)
        states = self._euler(text, None, noise, sigmas, guidance_scale)
        return keep(states, kept), sigmas[kept]

    @torch.no_grad()
    def sample(
        self,
        text: TextBatch,
        factors: LoRAFactors | None,
        *,
        steps: int,
        guidance_scale: float,
        noise: Tensor,
    ) -> Tensor:
        """Latents (batch, 4, height, width), LoRA on the conditional branch."""
        *_, latents = self._euler(text, factors, noise, self._levels(steps), guidance_scale)
        return latents

    def noise(self, seeds: Sequence[int], size: int) -> Tensor:
        """Noise for pictures of ``size`` pixels, (seeds, 4, height, width)."""
        return draw_noise(seeds, (LATENT_CHANNELS, size // DOWNSCALE, size // DOWNSCALE))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, height, width) in [0, 1]."""
        return self._vae.decode(latents)

    def target_weights(self) -> tuple[Tensor, ...]:
        """Weights (out_features, in_features) of the target modules."""
        return tuple(
            self._unet.get_submodule(target.name).get_parameter("weight") for target in self.targets
        )

    @cached_property
    def _table(self) -> Tensor:
        return self._text.token_table()

    def _levels(self, steps: int) -> Tensor:
        """Noise levels of the host's scheduler ``normal``, (steps + 1,)."""
        last = len(self._sigmas) - 1
        places = torch.linspace(last, 0, steps)
        low = places.floor().long()
        high = (low + 1).clamp(max=last)
        share = places - low
        logs = self._sigmas.log()
        sigmas = ((1 - share) * logs[low] + share * logs[high]).exp()
        return torch.cat([sigmas, sigmas.new_zeros(1)])

    def _euler(
        self,
        text: TextBatch,
        factors: LoRAFactors | None,
        noise: Tensor,
        sigmas: Tensor,
        guidance_scale: float,
    ) -> Iterator[Tensor]:
        """States before each step and after the last."""
        both = TextBatch.cat([text, self._empty.rows([0] * len(text))])
        applied = None if factors is None else on_first(factors)

        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            inputs = torch.cat([x_t, x_t])
            noise = self.predict(inputs, sigma.expand(len(both)), both, applied)
            return guide(inputs - sigma * noise, guidance_scale)

        return euler(denoise, noise * (1 + sigmas[0].square()).sqrt(), sigmas)
