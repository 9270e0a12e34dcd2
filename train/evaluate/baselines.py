"""What others do to erase, on the same trajectories: static LoRA, LoRA gated by similarity, closed-form editing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unhype.lora import LoRAFactors, TargetModule

from ..config import TrainConfig
from ..objectives.base import end
from ..prompts import PLAIN_TEMPLATE, fill, split_templates, target_phrases
from ..trajectories import Batch, Pool, Tick, draw
from .base import PictureModel
from .erasers import SimilarityEraser, StaticEraser

RANK = 16
ERASE_SCALE, PRESERVE_SCALE, IDENTITY_SCALE = 1.0, 1.0, 0.5
"""UCE's weights of erased and preserved states, and of staying where no text reaches."""
PADDING_READ = 6
"""States of padding read of every prompt: meaning leaks into them."""
PROMPTS_PER_PHRASE = 3


class LoRABank(nn.Module):
    """Learned LoRA, a row a concept; ``up`` starts at zero."""

    def __init__(self, targets: Sequence[TargetModule], rows: int, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.targets = tuple(targets)
        self.down = nn.ParameterList(
            nn.Parameter(
                torch.randn(rows, rank, t.in_features, generator=generator) / t.in_features**0.5
            )
            for t in targets
        )
        self.up = nn.ParameterList(
            nn.Parameter(torch.zeros(rows, t.out_features, rank)) for t in targets
        )

    def factors(self) -> LoRAFactors:
        """All rows."""
        rows = len(self.down[0])
        return LoRAFactors(self.targets, tuple(self.down), tuple(self.up), torch.ones(rows))


@dataclass(frozen=True)
class Ground:
    """What baselines learn from: the states a hypernetwork would see, and the model."""

    config: TrainConfig
    model: PictureModel
    forget: Pool
    retain: Pool | None


def train_static(ground: Ground, *, tick: Tick) -> StaticEraser:
    """One LoRA for everything (ESD's objective, arXiv:2303.07345); with a retain pool, predictions there are held."""
    bank = _train_bank(ground, 1, lambda batch: torch.zeros(len(batch), dtype=torch.long), tick)
    return StaticEraser(bank)


def train_similarity(ground: Ground, *, tick: Tick) -> SimilarityEraser:
    """A LoRA a concept, applied as far as a prompt is similar to the concept (SPM, arXiv:2312.16145)."""
    config, model = ground.config, ground.model
    num = len(config.concepts)
    loras = _train_bank(ground, num, lambda prompt: prompt % num, tick)
    phrases = target_phrases(config.concepts)
    owners = [index for index, c in enumerate(config.concepts) for _ in c.target]
    ordinary = [*config.retain, *config.retain_captions]
    return SimilarityEraser(
        loras,
        model.embed_pooled([PLAIN_TEMPLATE.format(phrase) for phrase in phrases]),
        torch.tensor(owners),
        model.embed_pooled(ordinary).mean(0),
    )


def _train_bank(
    ground: Ground, rows: int, row_of: Callable[[Tensor], Tensor], tick: Tick
) -> LoRAFactors:
    """Regress predictions onto y, the anchor's and beyond; ``row_of`` says whose LoRA each prompt number takes."""
    config, settings = ground.config, ground.config.train
    bank = LoRABank(ground.model.targets, rows, RANK, config.seed)
    optimizer = torch.optim.AdamW(bank.parameters(), lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    generator = torch.Generator().manual_seed(config.seed)

    def change(batch: Batch, chosen: Tensor, wanted: Tensor) -> Tensor:
        factors = bank.factors().rows(chosen)
        prediction = ground.model.predict(batch.latents, batch.sigmas, batch.text, factors)
        return F.mse_loss(prediction.float(), wanted)

    for step in range(settings.steps):
        optimizer.zero_grad()
        batch = draw(ground.forget, settings.batch_size, generator)
        change(
            batch, row_of(batch.prompt), end(batch, config.objective.negative_guidance)
        ).backward()
        if ground.retain is not None:
            kept = draw(ground.retain, settings.batch_size, generator)
            any_row = torch.randint(rows, (settings.batch_size,), generator=generator)
            change(kept, any_row, kept.prediction).backward()
        nn.utils.clip_grad_norm_(bank.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        tick(step + 1, settings.steps)
    factors = bank.factors()
    return LoRAFactors(
        factors.targets,
        tuple(down.detach() for down in factors.down),
        tuple(up.detach() for up in factors.up),
        factors.scale,
    )


@torch.no_grad()
def edit_closed_form(config: TrainConfig, model: PictureModel) -> StaticEraser:
    """Unified concept editing of the layers that read the text (UCE, arXiv:2308.14761), as LoRA that equals the edit.

    With erased states c_i, their anchors' states m_i and preserved states r_j, every W becomes the minimum of
    sum_i |W' c_i - W m_i|^2 + sum_j |W' r_j - W r_j|^2 + lambda |W' - W|^2.
    """
    singles = split_templates(config.templates).single
    forms = [PLAIN_TEMPLATE, *singles[: PROMPTS_PER_PHRASE - 1]]
    erased, wanted = [], []
    for concept in config.concepts:
        for phrase in concept.target:
            for form in forms:
                erased.append(fill(form, phrase))
                wanted.append(fill(form, concept.anchor))
    c, m = (_text_states(model, texts) for texts in (erased, wanted))
    preserved = [fill(form, phrase) for phrase in config.retain for form in forms[:2]]
    r = _text_states(model, [*preserved, ""])
    gram = ERASE_SCALE * c.mT @ c + PRESERVE_SCALE * r.mT @ r
    gram += IDENTITY_SCALE * torch.eye(len(gram))
    downs, ups = [], []
    projected = torch.linalg.solve(gram.double(), (ERASE_SCALE * c.mT).double())  # (dim, states)
    for weight in model.target_weights():
        delta = ((m - c) @ weight.mT).double().mT @ projected.mT
        u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
        downs.append(v[None])
        ups.append((u * s)[None])
    return StaticEraser(LoRAFactors(model.targets, tuple(downs), tuple(ups), torch.ones(1)))


def _text_states(model: PictureModel, texts: Sequence[str]) -> Tensor:
    """States that carry a prompt's meaning, (states, dim): its last words', the end's, and some of the padding's."""
    text = model.embed(texts)
    length = text.cross.shape[1]
    states = []
    for cross, pooled in zip(text.cross, text.pooled, strict=True):
        distance = (cross - pooled).square().sum(-1)
        first_end = int(distance.argmin())
        places = [max(first_end - 1, 0), first_end]
        places += torch.linspace(first_end + 1, length - 1, PADDING_READ).long().tolist()
        states.append(cross[[min(place, length - 1) for place in places]])
    return torch.cat(states)
