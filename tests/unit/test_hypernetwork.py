"""Both architectures: shapes, no effect where there must be none, and gradients that arrive."""

from __future__ import annotations

import pytest
import torch

from unhype.hypernetwork import (
    Architecture,
    Hypernetwork,
    HypernetworkConfig,
    encode_position,
    make_hypernetwork,
)
from unhype.lora import TargetModule

TARGETS = (TargetModule("a.to_k", 6, 5), TargetModule("b.qkv", 6, 4, 4, 12))
both = pytest.mark.parametrize("architecture", list(Architecture))
RANKS = {Architecture.EDITS: 6}


def make(architecture: Architecture, *, trained: bool = True) -> Hypernetwork:
    torch.manual_seed(0)
    config = HypernetworkConfig(
        architecture, embedding_dim=8, rank=3, hidden_dim=16, num_concepts=3, directions=4
    )
    hypernetwork = make_hypernetwork(config, TARGETS)
    if trained:
        for parameter in hypernetwork.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return hypernetwork


@both
def test_factors_have_a_row_for_every_prompt(architecture: Architecture) -> None:
    factors = make(architecture).generate(torch.randn(4, 8))
    assert [tuple(t.shape) for t in factors.down] == [(4, RANKS.get(architecture, 3), 6)] * 2
    assert [tuple(t.shape) for t in factors.up] == [
        (4, rows, RANKS.get(architecture, 3)) for rows in (5, 4)
    ]
    assert factors.squared_norm().min() > 0


@both
def test_a_new_network_has_exactly_no_effect(architecture: Architecture) -> None:
    assert not make(architecture, trained=False).generate(torch.randn(4, 8)).squared_norm().any()


@both
def test_step_zero_has_exactly_no_effect(architecture: Architecture) -> None:
    factors = make(architecture).generate(torch.randn(4, 8), 0)
    assert not factors.active.any()
    assert not factors.delta(0).any()


@both
def test_generation_uses_the_last_step_by_default(architecture: Architecture) -> None:
    hypernetwork, embedding = make(architecture), torch.randn(2, 8)
    last = hypernetwork.generate(embedding, hypernetwork.config.num_steps)
    torch.testing.assert_close(hypernetwork.generate(embedding).delta(1), last.delta(1))


@both
def test_each_prompt_is_on_its_own(architecture: Architecture) -> None:
    hypernetwork, embedding = make(architecture), torch.randn(3, 8)
    s = torch.tensor([30.0, 150.0, 300.0])
    together = hypernetwork.generate(embedding, s).delta(0)
    for row in range(3):
        alone = hypernetwork.generate(embedding[row : row + 1], float(s[row])).delta(0)
        torch.testing.assert_close(together[row], alone[0])


@both
def test_a_new_network_learns(architecture: Architecture) -> None:
    hypernetwork = make(architecture, trained=False)
    optimizer = torch.optim.Adam(hypernetwork.parameters(), lr=1e-2)
    embedding, wanted = torch.randn(2, 8), torch.randn(2, 5, 6)

    def loss() -> torch.Tensor:
        return (hypernetwork.generate(embedding).delta(0) - wanted).square().mean()

    before = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.7 * before


@both
def test_everything_trainable_gets_a_gradient_once_it_has_an_effect(
    architecture: Architecture,
) -> None:
    hypernetwork = make(architecture)
    hypernetwork.generate(torch.randn(4, 8), 150.0).squared_norm().sum().backward()
    assert not [
        name for name, p in hypernetwork.named_parameters() if p.grad is None or not p.grad.any()
    ]


@both
def test_a_saved_network_writes_the_same_factors(architecture: Architecture) -> None:
    hypernetwork = make(architecture)
    torch.manual_seed(1)
    other = make_hypernetwork(hypernetwork.config, TARGETS)
    other.load_state_dict(hypernetwork.state_dict())
    embedding = torch.randn(2, 8)
    assert torch.equal(
        other.generate(embedding).delta(0), hypernetwork.generate(embedding).delta(0)
    )


def test_s_outside_the_trajectory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 300, got 301"):
        make(Architecture.ATOMS).generate(torch.randn(1, 8), 301)


def test_an_embedding_of_another_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(batch, tokens, 8\), got \(1, 9\)"):
        make(Architecture.ATOMS).generate(torch.randn(1, 9))


def test_positions_differ_along_the_trajectory() -> None:
    codes = encode_position(torch.arange(301.0), 300, 4)
    assert codes.shape == (301, 8)
    assert torch.pdist(codes).min() > 1e-3
