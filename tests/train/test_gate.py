"""The gate: that it learns, tells concepts apart, and that its threshold is what the config asks for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.config import ConfigError, ObjectiveConfig, TrainConfig
from train.gate import GateMaterial, Vectors, fit_gate, gather, move_against, surest, train_gate
from unhype.checkpoint import Calibration
from unhype.embedding import heard
from unhype.gate import Gate, GateConfig

from .conftest import FAMILY, TinyDenoiser, word_vector

Make = Callable[..., TrainConfig]
STEPS = "gate.steps=200"
TWO_CONCEPTS = 'concepts=[{"name": "cat", "target": ["cat", "kitty"], "anchor": "an empty meadow"}, {"name": "car", "target": ["car"], "anchor": "a road"}]'


def trained(config: TrainConfig, denoiser: TinyDenoiser) -> tuple[Gate, Calibration, GateMaterial]:
    material = gather(config, denoiser.embed_pooled)
    gate, calibration = train_gate(config, material, lambda *_: None)
    return gate, calibration, material


def test_it_opens_for_targets_and_stays_shut_for_words_it_never_saw(
    make: Make, denoiser: TinyDenoiser
) -> None:
    gate, _, _ = trained(make(STEPS), denoiser)
    texts = ["a photo of a cat", "the kitty", "a cat on the beach"]
    assert gate.read(denoiser.embed_pooled(texts)).open.all()
    others = ["a photo of a zebra", "the violin", "a lamp on the beach", "an empty meadow", ""]
    assert not gate.read(denoiser.embed_pooled(others)).open.any()


def test_a_synonym_near_its_targets_opens_it(make: Make, denoiser: TinyDenoiser) -> None:
    gate, _, _ = trained(make(STEPS), denoiser)
    # A word that no prompt held, as close to the targets' as synonyms are in a text encoder.
    dim = FAMILY.embedding.dim
    synonym = 0.45 * (word_vector("cat", dim) + word_vector("kitty", dim))
    synonym = synonym + 0.55 * word_vector("feline", dim)
    a, photo = word_vector("a", dim), word_vector("photo", dim)
    assert gate.read(torch.stack([synonym, a, photo]).mean(0)[None]).open.item()


def test_concepts_fire_for_their_own_prompts_only(make: Make, denoiser: TinyDenoiser) -> None:
    gate, _, _ = trained(make(STEPS, TWO_CONCEPTS), denoiser)
    fired = gate.read(denoiser.embed_pooled(["a photo of a cat", "a photo of a car"])).fired
    assert fired.tolist() == [[True, False], [False, True]]


def test_the_calibration_is_measured_on_prompts_kept_back(
    make: Make, denoiser: TinyDenoiser
) -> None:
    gate, calibration, material = trained(make(STEPS), denoiser)
    assert calibration.num_negatives == len(material.held_negatives)
    assert calibration.num_positives == len(material.held_positives)
    assert calibration.false_fire_rate == share(gate, material.held_negatives)
    assert calibration.false_fire_rate <= 0.02
    assert calibration.miss_rate == pytest.approx(1 - share(gate, material.held_positives))
    assert calibration.miss_rate <= 0.1


def test_a_lower_threshold_position_fires_more_often(make: Make, denoiser: TinyDenoiser) -> None:
    texts = [f"a {word} photo of a cat and a bus on the beach in rain" for word in "abcdefghij"]
    probability = [
        trained(make(STEPS, f"gate.threshold_position={position}"), denoiser)[0]
        .read(denoiser.embed_pooled(texts))
        .probability.mean()
        for position in (0.1, 0.9)
    ]
    assert probability[0] > probability[1]


def test_where_groups_overlap_the_gate_stays_silent_and_says_so(
    make: Make, denoiser: TinyDenoiser, caplog: pytest.LogCaptureFixture
) -> None:
    # The words of the target are those of what must stay: nothing can tell them apart.
    concept = '[{"name": "cat", "target": ["bus tree", "apple dog"], "anchor": "a meadow"}]'
    keep = (
        '["tree bus", "dog apple", "the tree bus", "the dog apple", "a tree bus", "one dog apple"]'
    )
    overrides = (f"concepts={concept}", f"retain={keep}", "trajectories.scene_share=0")
    with caplog.at_level("WARNING", logger="unhype"):
        _, calibration, _ = trained(make(STEPS, *overrides), denoiser)
    assert calibration.false_fire_rate <= 0.1
    assert calibration.miss_rate > 0.15
    assert "misses" in caplog.text


def test_training_draws_nothing_from_the_global_generator(
    make: Make, denoiser: TinyDenoiser
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, _, _ = trained(make("gate.steps=5"), denoiser)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    again, _, _ = trained(make("gate.steps=5"), denoiser)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())


def share(gate: Gate, embeddings: Tensor) -> float:
    """How many of them open the gate."""
    return gate.read(embeddings).open.float().mean().item()


def test_a_gate_that_reads_tokens_hears_one_word_of_many(
    make: Make, denoiser: TinyDenoiser
) -> None:
    config = make(STEPS).model_copy(update={"objective": ObjectiveConfig(name="closed-form")})
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"tokens": True})})
    material = gather(config, lambda texts: denoiser.embed_tokens(texts).half())
    gate, calibration = train_gate(config, material, lambda *_: None)
    assert gate.config.tokens
    assert calibration.false_fire_rate <= 0.02
    others = "a zebra beside the violin under seven lamps on the wide beach with twenty pink chairs"
    for text, fires in ((f"cat {others}", True), (others, False)):
        assert gate.read(denoiser.embed_tokens([text])).open.item() is fires


def test_the_surest_vector_is_one_of_the_prompts_own(make: Make, denoiser: TinyDenoiser) -> None:
    gate, _, _ = trained(make(STEPS), denoiser)
    read = denoiser.embed_tokens(["a cat", "the violin on a table"])
    vectors = surest(gate, read)
    for prompt, vector in zip(read, vectors, strict=True):
        own = prompt[heard(prompt)]
        assert (own == vector).all(1).any()
        torch.testing.assert_close(gate(vector[None])[0], gate(own).amax(0))
    assert torch.equal(surest(gate, vectors), vectors)


def test_virtual_negatives_are_of_whole_prompts(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"gate\.virtual_negatives moves whole prompts"):
        make("gate.tokens=true", "gate.virtual_negatives=0.5")


@pytest.fixture
def batch() -> tuple[Gate, Vectors, Tensor]:
    """A gate of two concepts, five prompts of up to seven vectors, and the concepts of the first three."""
    torch.manual_seed(0)
    prompts = torch.randn(5, 7, 12)
    for prompt, length in zip(prompts, (7, 3, 5, 1, 6), strict=True):
        prompt[length:] = 0
    vectors = Vectors.of((prompts[:3], heard(prompts[:3])), (prompts[3:], heard(prompts[3:])))
    return Gate(GateConfig(12, 2, 8, tokens=True)), vectors, torch.tensor([0, 1, 0])


def test_the_loudest_vectors_are_all_that_a_step_depends_on(
    batch: tuple[Gate, Vectors, Tensor],
) -> None:
    gate, vectors, _ = batch
    few = vectors.only(vectors.loudest(gate))
    assert len(few.vectors) < len(vectors.vectors)
    both = [part.logits(gate) for part in (vectors, few)]
    torch.testing.assert_close(*both)
    slopes = [torch.autograd.grad(logits.square().sum(), gate.layers[0].weight) for logits in both]
    torch.testing.assert_close(*slopes)


def test_the_loudest_vectors_alone_are_moved_against_the_gate(
    batch: tuple[Gate, Vectors, Tensor],
) -> None:
    gate, vectors, concepts = batch
    moved = move_against(gate, vectors, concepts, 0.5)
    leaf = vectors.vectors.clone().requires_grad_()
    own = Vectors(leaf, vectors.owners, vectors.prompts).logits(gate)[[0, 1, 2], concepts]
    (slope,) = torch.autograd.grad(own.sum(), leaf)
    torch.testing.assert_close(moved.vectors, leaf.detach() - 0.5 * F.normalize(slope, dim=1))
    assert (moved.vectors != vectors.vectors).any(1).sum() == len(concepts)
    assert (moved.logits(gate)[[0, 1, 2], concepts] < own).all()


def test_what_is_hard_to_tell_from_a_target_is_learned_more_of(make: Make) -> None:
    torch.manual_seed(0)
    direction = F.normalize(torch.randn(24), dim=0)
    positives = 4 * direction + torch.randn(200, 24)
    few_near = 3 * direction + 2 * F.normalize(torch.randn(24), dim=0) + torch.randn(8, 24)
    negatives = torch.cat([torch.randn(1500, 24), few_near])
    none = torch.zeros(len(positives), dtype=torch.long)
    material = GateMaterial(positives, none, negatives, positives, none, negatives)

    def margin(share: float) -> float:
        """How much surer it is of the faintest targets than of the nearest others."""
        config = make("gate.steps=150", f"gate.hard_share={share}", "gate.adversarial=1")
        gate = fit_gate(config, material, lambda *_: None)
        asked, near = gate(positives).flatten(), gate(few_near).flatten()
        return (asked.quantile(0.05) - near.max()).item()

    assert margin(0.5) > margin(0.0) + 0.2
