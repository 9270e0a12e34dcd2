"""Edits added to a pack of edits and taken out of it, while the others stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unhype.hypernetwork import EditsHypernetwork

from .closed_form import BATCH_SIZE, LEARNING_RATE, STEPS, WEIGHT_DECAY
from .config import EDITS_DEFAULTS, NetworkConfig, TrainConfig
from .gate import GateMaterial

DEFAULTS = NetworkConfig.model_validate(EDITS_DEFAULTS)


def new_edits(old: EditsHypernetwork, config: TrainConfig) -> EditsHypernetwork:
    """A hypernetwork for the concepts of the config alone, which reads prompts as the old one does; its edits are yet to be found."""
    num = len(config.concepts)
    sizes = replace(
        old.config, num_concepts=num, directions=min(DEFAULTS.directions, old.config.rank * num)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        added = EditsHypernetwork(sizes, old.targets)
    added.standardize.load_state_dict(old.standardize.state_dict())
    return added


@torch.no_grad()
def grow_edits(old: EditsHypernetwork, added: EditsHypernetwork) -> EditsHypernetwork:
    """The old edits as they are, and new ones in directions of their own; which of them a prompt asks for is yet to be taught. On the CPU."""
    sizes = old.config
    old, added = old.cpu(), added.cpu()
    hidden = DEFAULTS.hidden_dim + (sizes.hidden_dim if sizes.num_concepts > 1 else 0)
    wider = replace(
        sizes,
        num_concepts=sizes.num_concepts + added.config.num_concepts,
        directions=sizes.directions + added.config.directions,
        hidden_dim=hidden,
    )
    with torch.random.fork_rng(devices=[]):
        grown = EditsHypernetwork(wider, old.targets)
    grown.standardize.load_state_dict(old.standardize.state_dict())
    grown.down.copy_(torch.cat([old.down, added.down]))
    grown.mix.zero_()
    grown.mix[: sizes.num_concepts, : sizes.directions] = old.mix
    grown.mix[sizes.num_concepts :, sizes.directions :] = added.mix
    for up, before, new in zip(grown.up, old.up, added.up, strict=True):
        up.copy_(torch.cat([before, new], dim=1))
    return grown


def tell_new_apart(
    grown: EditsHypernetwork,
    old: EditsHypernetwork,
    material: GateMaterial,
    kept: Tensor,
    seed: int,
) -> None:
    """Teach the shares of new concepts on their prompts and on ``kept`` ones of the old (prompts, dim); the old shares stay. On the CPU.

    For an old concept's prompt the shares among the old are to be what they were, and those of the new nothing.
    """
    num_old, num_new = old.config.num_concepts, grown.config.num_concepts - old.config.num_concepts
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = nn.Sequential(
            nn.Linear(old.config.embedding_dim, DEFAULTS.hidden_dim),
            nn.SiLU(),
            nn.Linear(DEFAULTS.hidden_dim, num_new),
        )
    generator = torch.Generator().manual_seed(seed)
    standardize, shares = old.standardize.cpu(), old.cpu().shares
    asking, others = standardize(material.positives), standardize(kept.cpu())
    optimizer = torch.optim.AdamW(trunk.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    half = BATCH_SIZE // 2
    for _ in range(STEPS):
        chosen = torch.randint(len(asking), (half,), generator=generator)
        other = torch.randint(len(others), (half,), generator=generator)
        x = torch.cat([asking[chosen], others[other]])
        x = x + torch.randn(x.shape, generator=generator)
        with torch.no_grad():
            before = shares(x)
            wanted = torch.zeros(len(x), num_old + num_new)
            wanted[torch.arange(half), num_old + material.concepts[chosen]] = 1
            wanted[half:, :num_old] = before[half:].softmax(1)
        loss = F.cross_entropy(torch.cat([before, trunk(x)], dim=1), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        _join(grown, old, trunk)


def _join(grown: EditsHypernetwork, old: EditsHypernetwork, trunk: nn.Sequential) -> None:
    """One trunk with the outputs of both, each read from hidden units of its own; a single old concept has a share of 1, logit 0."""
    first, last = first_and_last(grown.trunk)
    new_first, new_last = first_and_last(trunk)
    if old.config.num_concepts == 1:
        first.load_state_dict(new_first.state_dict())
        last.weight.copy_(F.pad(new_last.weight, (0, 0, 1, 0)))
        last.bias.copy_(F.pad(new_last.bias, (1, 0)))
        return
    old_first, old_last = first_and_last(old.trunk)
    first.weight.copy_(torch.cat([old_first.weight, new_first.weight]))
    first.bias.copy_(torch.cat([old_first.bias, new_first.bias]))
    last.weight.copy_(torch.block_diag(old_last.weight, new_last.weight))
    last.bias.copy_(torch.cat([old_last.bias, new_last.bias]))


@torch.no_grad()
def without_edits(old: EditsHypernetwork, stay: Sequence[int]) -> EditsHypernetwork:
    """Only the edits named, and of the directions only what these move into."""
    sizes, chosen = old.config, list(stay)
    mix = old.mix[chosen]
    needed = min(sizes.directions, sizes.rank * len(chosen))
    basis = torch.eye(sizes.directions)
    if needed < sizes.directions:
        basis, _ = torch.linalg.qr(torch.cat(list(mix.double()), dim=1))
        basis = basis.to(mix)
    left = EditsHypernetwork(
        replace(sizes, num_concepts=len(chosen), directions=basis.shape[1]), old.targets
    )
    left.standardize.load_state_dict(old.standardize.state_dict())
    left.down.copy_(old.down[chosen])
    left.mix.copy_(basis.mT @ mix)
    for up, before in zip(left.up, old.up, strict=True):
        up.copy_(before @ basis)
    if len(chosen) > 1:
        first, last = first_and_last(left.trunk)
        old_first, old_last = first_and_last(old.trunk)
        first.load_state_dict(old_first.state_dict())
        last.weight.copy_(old_last.weight[chosen])
        last.bias.copy_(old_last.bias[chosen])
    return left


def first_and_last(layers: nn.Sequential) -> tuple[nn.Linear, nn.Linear]:
    """The outer layers of a small network.

    Raises:
        TypeError: they are not linear.
    """
    first, last = layers[0], layers[-1]
    if not isinstance(first, nn.Linear) or not isinstance(last, nn.Linear):
        raise TypeError(
            f"The first and last layers must be Linear, got {type(first).__name__} and {type(last).__name__}."
        )
    return first, last
