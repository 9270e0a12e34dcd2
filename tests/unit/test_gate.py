"""The gate: per-concept decisions, thresholds and switches."""

from __future__ import annotations

import pytest
import torch

from unhype.embedding import Standardize
from unhype.gate import Gate, GateConfig


def make_gate() -> Gate:
    """Fires concept 0 where the first number is positive, concept 1 where the second is."""
    gate = Gate(GateConfig(embedding_dim=3, num_concepts=2, hidden_dim=4))
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        first, last = gate.layers[0], gate.layers[2]
        first.weight[0, 0] = first.weight[1, 1] = 5.0
        last.weight[0, 0] = last.weight[1, 1] = 2.0
        last.bias.fill_(-3.0)
    return gate


CAT, DOG, NEITHER = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [-1, -1, 0]])


def test_each_concept_fires_for_itself() -> None:
    reading = make_gate().read(torch.stack([CAT, DOG, NEITHER]))
    assert reading.fired.tolist() == [[True, False], [False, True], [False, False]]
    assert reading.open.tolist() == [True, True, False]


def test_a_concept_that_is_switched_off_does_not_fire() -> None:
    reading = make_gate().read(torch.stack([CAT, DOG]), active=[False, True])
    assert reading.open.tolist() == [False, True]


def test_a_higher_threshold_closes_the_gate() -> None:
    gate = make_gate()
    probability = gate.read(CAT[None]).probability[0, 0].item()
    assert gate.read(CAT[None], threshold=probability - 1e-4).open.item()
    assert not gate.read(CAT[None], threshold=probability + 1e-6).open.item()


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, 2.0])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="probability between 0 and 1"):
        make_gate().read(CAT[None], threshold=threshold)


def graded(least: float, full: float) -> Gate:
    return Gate(GateConfig(3, 2, least_strength=least, full_strength_at=full))


def test_what_is_surer_is_written_more() -> None:
    odds = torch.tensor([-2.0, 0.0, 1.0, 2.0, 9.0, 50.0])
    strength = graded(0.4, torch.tensor(2.0).sigmoid().item()).strength(odds.sigmoid())
    torch.testing.assert_close(strength, torch.tensor([0.4, 0.4, 0.7, 1.0, 1.0, 1.0]))
    assert (strength[-2:] == 1).all()


def test_by_default_all_of_it_is_written() -> None:
    probability = torch.tensor([0.0, 0.01, 0.5, 0.9, 1.0])
    assert torch.equal(make_gate().strength(probability), torch.ones(5))


@pytest.mark.parametrize(("least", "full"), [(0.0, 0.9), (1.5, 0.9), (0.5, 0.5), (0.5, 1.0)])
def test_strengths_that_make_no_sense_are_refused(least: float, full: float) -> None:
    with pytest.raises(ValueError, match=f"got {least if full == 0.9 else full}"):
        graded(least, full)


def test_switches_must_name_every_concept() -> None:
    with pytest.raises(ValueError, match="each of 2 concepts, got 1"):
        make_gate().read(CAT[None], active=[True])


def test_standardizing_gives_zero_mean_and_unit_variance() -> None:
    embeddings = torch.randn(500, 3) * torch.tensor([2.0, 3.0, 4.0]) + 10
    standardize = Standardize(3)
    standardize.fit(embeddings)
    result = standardize(embeddings)
    torch.testing.assert_close(result.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(result.std(0), torch.ones(3), atol=1e-4, rtol=0)


def test_a_dimension_that_never_moved_does_not_explode_later() -> None:
    embeddings = torch.randn(50, 3) * torch.tensor([1.0, 1.0, 0.0])
    standardize = Standardize(3)
    standardize.fit(embeddings)
    assert standardize(torch.ones(1, 3)).abs().max() < 20


def test_a_concept_that_fires_at_any_token_fires() -> None:
    silence = torch.zeros(3)
    prompts = torch.stack(
        [torch.stack([NEITHER, CAT, NEITHER]), torch.stack([NEITHER, NEITHER, silence])]
    )
    gate = make_gate()
    assert gate.read(prompts).fired.tolist() == [[True, False], [False, False]]
    assert torch.equal(gate(prompts)[0, 0], gate(CAT[None])[0, 0])


def test_silence_never_fires() -> None:
    gate = make_gate()
    with torch.no_grad():
        gate.layers[2].bias.fill_(9.0)
    assert gate.read(NEITHER[None]).open.item()
    assert not gate.read(torch.zeros(1, 2, 3)).open.item()
