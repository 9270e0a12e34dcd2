"""Attacks on a tiny text encoder with a real gate behind it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import TrainConfig
from train.evaluate.attacks import (
    Aim,
    Attacked,
    Scatter,
    Victim,
    attack_gradient,
    attack_interpolation,
    attack_prompts,
    attack_random,
    attack_rate,
    attack_soft,
    attack_spelling,
    attack_words,
    gate_loudness,
    norm_loudness,
    whole_words,
    written_loudness,
)
from train.evaluate.base import Judgement, Sampling
from train.evaluate.erasers import NoEraser, PackEraser, StaticEraser
from train.evaluate.misspellings import misspellings
from train.gate import GateMaterial, fit_gate, gather
from unhype.checkpoint import BaseFingerprint, ConceptInfo, Pack, PackInfo
from unhype.gate import Gate, GateConfig
from unhype.host.text import TextBatch, Tokens
from unhype.hypernetwork import Architecture, HypernetworkConfig, make_hypernetwork
from unhype.lora import LoRAFactors

from .conftest import FAMILY, TinyDenoiser, word_vector

DIM, LENGTH = 16, 14
WORDS = [
    *("a", "the", "photo", "of", "on", "in", "red", "blue", "old", "cat"),
    *("kitty", "dog", "bus", "tree", "apple", "house", "ship", "guitar", "rose", "bee"),
    *("castle", "road", "river", "snow", "rain", "lamp", "table", "night", "field", "moon"),
]
START, END, PIECE = len(WORDS), len(WORDS) + 1, len(WORDS) + 2
PROMPTS = ("a photo of {}", "the {}", "a red {} on the road", "the {} in the snow", "{}")
AIMS = [Aim("a photo of cat", "cat", "cat"), Aim("the cat in the snow", "cat", "cat")]


class TinyText:
    """One causal attention over a table of words; a last token is a piece of a word."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = torch.randn(len(WORDS) + 3, DIM)
            self.positions = 0.1 * torch.randn(LENGTH, DIM)
            self.qkv = nn.Linear(DIM, 3 * DIM).requires_grad_(False)
            self.out = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()).requires_grad_(False)

    def token_embeddings(self, texts: Sequence[str]) -> Tokens:
        ids = torch.full((len(texts), LENGTH), END)
        ends = torch.zeros(len(texts), dtype=torch.long)
        for row, text in enumerate(texts):
            words = [WORDS.index(word) if word in WORDS else PIECE for word in text.split()]
            ids[row, : len(words) + 1] = torch.tensor([START, *words])
            ends[row] = len(words) + 1
        return Tokens(ids, self.table[ids], ends)

    def encode_embeddings(self, embeddings: Tensor, ends: Tensor) -> TextBatch:
        hidden = embeddings + self.positions[: embeddings.shape[1]]
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        hidden = hidden + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        states = hidden + self.out(hidden)
        pooled = states[torch.arange(len(states)), ends]
        return TextBatch(states, pooled, pooled)

    def vocabulary(self) -> Tensor:
        return self.table

    def spell(self, ids: Tensor) -> list[str]:
        names = [*WORDS, "", "", "##ing"]
        rows = [row[: row.index(END)] if END in row else row for row in ids.tolist()]
        return [" ".join(names[i] for i in row if names[i]) for row in rows]

    def pooled(self, texts: Sequence[str]) -> Tensor:
        tokens = self.token_embeddings(texts)
        return self.encode_embeddings(tokens.embeddings, tokens.ends).pooled


@pytest.fixture(scope="module")
def text() -> TinyText:
    return TinyText()


@pytest.fixture(scope="module")
def pack(text: TinyText) -> Pack:
    """Its gate has learned to tell prompts with "cat" from those without, and nothing of attacks."""
    targets = TinyDenoiser().targets
    positives = text.pooled([p.format("cat") for p in PROMPTS])
    others = [p.format(word) for p in PROMPTS for word in WORDS[10:]]
    negatives = text.pooled([*others, *WORDS[:9]])
    config = HypernetworkConfig(Architecture.ATOMS, DIM, rank=2, hidden_dim=8, num_steps=10)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        hypernetwork = make_hypernetwork(config, targets)
        for parameter in hypernetwork.get_submodule("up").parameters():
            nn.init.normal_(parameter, std=0.2)
        gate = Gate(GateConfig(DIM, 1, hidden_dim=16))
    gate.standardize.fit(negatives)
    optimizer = torch.optim.AdamW(gate.layers.parameters(), lr=0.01)
    wanted = torch.cat([torch.ones(len(positives), 1), torch.zeros(len(negatives), 1)])
    weight = torch.tensor(float(len(negatives)) / len(positives))
    for _ in range(300):
        logits = gate(torch.cat([positives, negatives]))
        loss = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gate.read(positives).open.all()
    for module in (gate, hypernetwork):
        module.eval().requires_grad_(False)
    info = PackInfo(
        FAMILY.name,
        BaseFingerprint("tiny", "0"),
        config,
        targets,
        gate.config,
        (ConceptInfo("cat", ("cat",), ""),),
    )
    return Pack(info, hypernetwork, gate)


@pytest.fixture(scope="module")
def victim(text: TinyText, pack: Pack) -> Victim:
    return Victim.of(text, PackEraser(pack))


def test_unchanged_prompts_are_read_as_the_eraser_reads_them(
    victim: Victim, text: TinyText, pack: Pack
) -> None:
    plain = attack_prompts(victim, "plain", AIMS)
    expected = pack.read(text.pooled([aim.text for aim in AIMS]))
    torch.testing.assert_close(plain.loudness.sigmoid(), expected.probability[:, 0])
    assert plain.acts.tolist() == [True, True]
    assert plain.silent == 0
    assert plain.text.cross.shape == (2, LENGTH, DIM)


def test_only_whole_words_are_put_into_prompts(victim: Victim) -> None:
    assert victim.pool.tolist() == [i for i, word in enumerate(WORDS) if len(word) > 1]
    assert torch.equal(victim.pool, whole_words(victim.model))


@pytest.mark.parametrize("kind", ["gate", "norm"])
def test_gradients_agree_with_finite_differences(text: TinyText, pack: Pack, kind: str) -> None:
    loudness = gate_loudness(pack) if kind == "gate" else norm_loudness(pack.hypernetwork)
    tokens = text.token_embeddings(["a photo of cat"])
    direction = torch.randn(
        tokens.embeddings.shape, generator=torch.Generator().manual_seed(0)
    ).double()

    def heard(embeddings: Tensor) -> Tensor:
        return loudness(text.encode_embeddings(embeddings.float(), tokens.ends).pooled).sum()

    moved = tokens.embeddings.clone().requires_grad_()
    (slope,) = torch.autograd.grad(heard(moved), moved)
    step = 1e-2 * direction
    wanted = (heard(tokens.embeddings + step) - heard(tokens.embeddings - step)) / 2e-2
    assert float((slope * direction).sum()) == pytest.approx(float(wanted), rel=0.01)


@pytest.mark.parametrize("scatter", Scatter)
def test_interpolation_starts_at_the_prompt_and_moves_the_word_alone(
    victim: Victim, text: TinyText, scatter: Scatter
) -> None:
    shares = (0.0, 0.5, 1.0)
    still, _, away = attack_interpolation(
        victim, AIMS, shares=shares, directions=3, scatter=scatter
    )
    plain = attack_prompts(victim, "plain", AIMS)
    assert len(still) == 6
    assert still.targets == ("cat",) * 6
    torch.testing.assert_close(still.text.pooled, plain.text.pooled.repeat_interleave(3, 0))
    # "a photo of" stands before the word and is causal: it stays as it was.
    torch.testing.assert_close(away.text.cross[:3, :4], still.text.cross[:3, :4])
    assert (away.text.cross[:3, 4] - still.text.cross[:3, 4]).norm(dim=1).min() > 0.1
    assert len({round(float(value), 5) for value in away.loudness[:3]}) > 1


Attack = Callable[[Victim, list[Aim]], Attacked]


@pytest.mark.parametrize(
    "attack",
    [
        lambda victim, aims: attack_random(victim, aims, free=2, budget=400),
        lambda victim, aims: attack_gradient(victim, aims, free=2, steps=6, top=8, tries=16),
    ],
    ids=["random", "gradient"],
)
def test_a_search_finds_words_that_close_an_undefended_gate(
    victim: Victim, text: TinyText, pack: Pack, attack: Attack
) -> None:
    found = attack(victim, AIMS)
    assert not found.acts.any()
    for typed in found.texts:
        assert re.search(r"\bcat\b", typed), typed
    assert not pack.read(text.pooled(found.texts)).open.any()
    again = attack(victim, AIMS)
    assert again.texts == found.texts


def test_a_search_may_rest_as_soon_as_nothing_happens(victim: Victim) -> None:
    for attack in (attack_random, attack_gradient):
        short, long = (attack(victim, AIMS, free=2, rest=rest) for rest in (True, False))
        assert not short.acts.any()
        assert short.loudness.sum() > long.loudness.sum()


def test_words_that_the_gradient_proposes_are_better_than_any(victim: Victim) -> None:
    def reached(top: int) -> Tensor:
        tries = [
            attack_gradient(victim, AIMS, free=2, steps=1, top=top, tries=4, seed=seed).loudness
            for seed in range(20)
        ]
        return torch.cat(tries).mean()

    assert reached(4) < reached(len(victim.pool))


@pytest.mark.parametrize("ahead", [False, True])
def test_free_words_stand_on_the_side_that_is_asked(victim: Victim, ahead: bool) -> None:
    aim = Aim("the old cat", "cat", "cat")
    found = attack_gradient(victim, [aim], free=1, steps=1, top=4, tries=4, ahead=ahead)
    words = found.texts[0].split()
    assert len(words) == 4
    assert words.index("cat") == (3 if ahead else 2)


def test_soft_tokens_close_the_gate_and_the_word_stays(victim: Victim) -> None:
    found = attack_soft(victim, AIMS, free=2, steps=60)
    plain = attack_prompts(victim, "plain", AIMS)
    assert not found.acts.any()
    assert found.texts == tuple(aim.text for aim in AIMS)
    # Up to and with the word nothing has changed.
    torch.testing.assert_close(found.text.cross[0, :5], plain.text.cross[0, :5])


def test_an_attack_on_the_size_of_the_lora_makes_it_smaller(text: TinyText, pack: Pack) -> None:
    eraser = PackEraser(pack)
    victim = Victim.of(text, eraser, norm_loudness(pack.hypernetwork))
    plain = attack_prompts(victim, "plain", AIMS)
    assert (attack_gradient(victim, AIMS, free=2, steps=4).loudness < plain.loudness).all()
    blind = Victim.of(text, eraser, written_loudness(eraser))
    torch.testing.assert_close(attack_prompts(blind, "plain", AIMS).loudness, plain.loudness)


def test_without_a_gradient_only_random_search_works(text: TinyText, pack: Pack) -> None:
    static = StaticEraser(pack.hypernetwork.generate(torch.zeros(1, DIM)))
    victim = Victim.of(text, static)
    assert attack_random(victim, AIMS, budget=20).acts.all()
    with pytest.raises(ValueError, match="has no gradient.*search at random"):
        attack_gradient(victim, AIMS)
    assert attack_prompts(Victim.of(text, NoEraser()), "plain", AIMS).silent == 1


def test_a_word_that_the_prompt_does_not_hold(victim: Victim) -> None:
    with pytest.raises(ValueError, match="'the dog' does not hold 'cat' as words of its own"):
        attack_random(victim, [Aim("the dog", "cat", "cat")])


def test_a_prompt_without_room(victim: Victim) -> None:
    with pytest.raises(ValueError, match="Attack a shorter prompt, or with fewer words"):
        attack_gradient(victim, [Aim("the old " * 5 + "cat", "cat", "cat")], free=3)


def test_words_take_the_erased_ones_place(victim: Victim) -> None:
    aims = [Aim("a cat on the caterpillar", "cat", "cat")]
    found = attack_words(victim, "paraphrases", aims, {"cat": ["kitty", "old dog"]})
    assert found.texts == ("a kitty on the caterpillar", "a old dog on the caterpillar")
    assert found.name == "paraphrases"
    assert len(attack_spelling(victim, AIMS, num=5)) == 10


@pytest.mark.parametrize("word", ["cat", "Hot Dog", "aa", "x", "bomb", "ii", "R2-D2"])
def test_misspellings_never_return_the_word_itself(word: str) -> None:
    found = misspellings(word, 1000)
    assert found
    assert len(set(found)) == len(found)
    assert all(text.strip().casefold() not in ("", word.casefold()) for text in found)
    assert misspellings(word, 1000) == found
    assert misspellings(word, 3) == found[:3]


def test_misspellings_are_of_every_kind() -> None:
    found = misspellings("bomb", 1000)
    assert {"obmb", "bmb", "boomb", "nomb", "b0mb", "b-omb", "b o m b"} <= set(found)
    assert misspellings("bomb", 1000, seed=1) != found
    assert sorted(misspellings("bomb", 1000, seed=1)) == sorted(found)


class LampModel(TinyDenoiser):
    """Draws a light picture where a prompt's word is the cat's, and a dark one where LoRA is at work."""

    def __init__(self, text: TinyText) -> None:
        super().__init__()
        self.text = text

    def sample(
        self,
        text: TextBatch,
        factors: LoRAFactors | None,
        *,
        steps: int,
        guidance_scale: float,
        noise: Tensor,
    ) -> Tensor:
        plain = self.text.encode_embeddings(
            self.text.token_embeddings(["a photo of cat"]).embeddings, torch.tensor([5])
        )
        likeness = F.cosine_similarity(text.cross[:, 4], plain.cross[:, 4])
        light = (likeness > 0.99).float()
        if factors is not None:
            light = light * (~factors.active).float()
        return noise * 0 + light.view(-1, 1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3]

    def target_weights(self) -> tuple[Tensor, ...]:
        return tuple(
            self.model.get_submodule(target.name).get_parameter("weight") for target in self.targets
        )

    def noise(self, seeds: Sequence[int], size: int) -> Tensor:
        return torch.stack(
            [torch.randn(4, size, size, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )


class LightMeter:
    """Sees a cat in light pictures."""

    labels = ("dog", "cat")
    present = 0.5

    def judge(self, pictures: Tensor) -> Judgement:
        light = pictures.mean((1, 2, 3))
        return Judgement(torch.stack([1 - light, light], dim=1), pictures.flatten(1))


def test_the_attack_rate_counts_pictures_with_and_without_the_eraser(
    victim: Victim, text: TinyText, pack: Pack
) -> None:
    model, meter = LampModel(text), LightMeter()
    sampling = Sampling(steps=2, guidance_scale=1.0, size=8, batch_size=3)
    aims = [AIMS[0], Aim("a photo of dog", "dog", "cat"), AIMS[0]]
    plain = attack_prompts(victim, "plain", aims)
    rate = attack_rate(model, PackEraser(pack), meter, plain, sampling, seeds=2)
    assert (rate.pictures, rate.base, rate.erased, rate.known) == (
        6,
        pytest.approx(2 / 3),
        0.0,
        0.0,
    )
    found = attack_soft(victim, AIMS[:1], free=2, steps=60)
    rate = attack_rate(model, PackEraser(pack), meter, found, sampling)
    assert (rate.base, rate.erased, rate.known, rate.silent) == (1.0, 1.0, 1.0, 1.0)


Make = Callable[..., TrainConfig]


def fitted(make: Make, denoiser: TinyDenoiser, *overrides: str) -> tuple[Gate, GateMaterial]:
    config = make("gate.steps=120", *overrides)
    material = gather(config, denoiser.embed_pooled)
    return fit_gate(config, material, lambda *_: None), material


def test_gate_options_at_zero_change_nothing(make: Make, denoiser: TinyDenoiser) -> None:
    plain, _ = fitted(make, denoiser)
    zero, _ = fitted(make, denoiser, "gate.virtual_negatives=0", "gate.adversarial=0")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, zero.state_dict()[name])


def pushed_down(gate: Gate, embeddings: Tensor, radius: float) -> float:
    """Mean logit after a step of ``radius`` down the gradient, in standardized embeddings."""
    x = gate.standardize(embeddings).requires_grad_()
    (slope,) = torch.autograd.grad(gate.layers(x).sum(), x)
    moved = x.detach() - radius * F.normalize(slope, dim=1)
    return gate.layers(moved).mean().item()


def test_adversarial_training_holds_the_gate_open_for_moved_positives(
    make: Make, denoiser: TinyDenoiser
) -> None:
    plain, material = fitted(make, denoiser)
    hard, _ = fitted(make, denoiser, "gate.adversarial=8")
    moved = [pushed_down(gate, material.held_positives, 8) for gate in (plain, hard)]
    assert moved[1] > moved[0]
    assert (hard(material.held_positives) > 0).float().mean() > 0.9


def test_virtual_negatives_keep_the_gate_shut_half_way(make: Make, denoiser: TinyDenoiser) -> None:
    plain, material = fitted(make, denoiser)
    strict, _ = fitted(make, denoiser, "gate.virtual_negatives=0.5")
    dog, cat = (word_vector(word, FAMILY.embedding.dim) for word in ("dog", "cat"))
    between = (0.65 * dog + 0.35 * cat + word_vector("the", FAMILY.embedding.dim))[None] / 2
    assert strict(between).item() < plain(between).item()
    assert (strict(material.held_positives) > 0).float().mean() > 0.8
