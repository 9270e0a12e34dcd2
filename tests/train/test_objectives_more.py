"""Joint and matching: their gradients, when they erase and when they don't, and what a run with them leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

import train.run as running
from train import cli, state
from train.config import ConfigError, TrainConfig, make_config
from train.loop import STAGE, Event
from train.objectives import Material, Trajectory, find_eta, make_objective
from train.record import metrics_path
from train.run import InertError, TrainingInterrupted, train
from train.trajectories import Pool, collect, draw
from unhype import checkpoint
from unhype.hypernetwork import (
    Architecture,
    Hypernetwork,
    HypernetworkConfig,
    make_hypernetwork,
)
from unhype.lora import LoRAFactors

from .conftest import FAMILY, TinyDenoiser

Make = Callable[..., TrainConfig]
PROMPTS = [("a photo of a cat", "a photo of an empty meadow"), ("a kitty", "an empty meadow")]
S = 20
PUBLISHED = (
    "objective.eta=1e-4",
    "objective.remove_weight=10",
    "objective.retain_weight=1",
    "objective.negative_guidance=2",
)
BRIEF = (f"network.num_steps={S}", "train.lr=1e-2", "train.steps=150", "gate.steps=5")
"""A run that is long enough here."""


@pytest.fixture
def pool(make: Make, denoiser: TinyDenoiser) -> Pool:
    return collect(denoiser, PROMPTS, make().trajectories, seed=0, tick=lambda *_: None)


def make_trajectory(
    config: TrainConfig, denoiser: TinyDenoiser, pool: Pool, architecture: Architecture
) -> Trajectory:
    """An objective whose hypernetwork has left its start."""
    torch.manual_seed(0)
    sizes = HypernetworkConfig(
        architecture, FAMILY.embedding.dim, rank=2, hidden_dim=8, num_steps=S
    )
    hypernetwork = make_hypernetwork(sizes, denoiser.targets)
    with torch.no_grad():
        for parameter in hypernetwork.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    kept = denoiser.embed_pooled(["a dog", "a bus", "a tree"])
    objective = make_objective(
        config.objective,
        hypernetwork=hypernetwork,
        denoiser=denoiser,
        material=Material(pool, None, kept),
    )
    assert isinstance(objective, Trajectory)
    return objective


def theta(hypernetwork: Hypernetwork, embedding: Tensor, s: float) -> tuple[Tensor, ...]:
    """The tensors of one prompt's trajectory at s, the scale in up."""
    factors = hypernetwork.generate(embedding, s)
    return (*factors.down, *(factors.scale.item() * up for up in factors.up))


def gradients(hypernetwork: Hypernetwork) -> list[Tensor]:
    return [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in hypernetwork.parameters()
    ]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Up to rounding, parameter by parameter; steps are differences of nearly equal numbers."""
    assert any(one.norm() > 0 for one in wanted)
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("name", ["joint", "matching"])
@pytest.mark.parametrize("architecture", list(Architecture))
def test_the_gradient_is_that_of_the_formula(
    make: Make, denoiser: TinyDenoiser, pool: Pool, architecture: Architecture, name: str
) -> None:
    config = make(f"objective.name={name}", "objective.eta=0.3", "objective.negative_guidance=0.5")
    objective = make_trajectory(config, denoiser, pool, architecture)
    network = objective.hypernetwork
    objective.remove(3, torch.Generator().manual_seed(4))
    got = gradients(network)

    network.zero_grad()
    generator = torch.Generator().manual_seed(4)
    batch = draw(pool, 3, generator)
    positions = torch.randint(S, (3,), generator=generator).tolist()
    total = torch.zeros(())
    for row, s in enumerate(positions):
        text = batch.text.rows([row])
        x, sigma = batch.latents[row : row + 1], batch.sigmas[row : row + 1]
        e_p, e_m = batch.prediction[row], batch.anchor_prediction[row]
        now, after = (theta(network, text.pooled, float(at)) for at in (s, s + 1))
        half = len(now) // 2
        factors = LoRAFactors(denoiser.targets, now[:half], now[half:], torch.ones(1))
        adapted = denoiser.predict(x, sigma, text, factors)[0]
        task = (adapted - (e_m - 0.5 * (e_p - e_m))).square().mean()
        slopes = torch.autograd.grad(task, now, retain_graph=True)
        squares = [
            (b - a + 0.3 * g).square().sum() for a, b, g in zip(now, after, slopes, strict=True)
        ]
        matching = torch.stack(squares).sum()
        if name == "joint":
            total = total + task + 10 * matching / sum(part.numel() for part in now)
        else:
            total = total + 10 * matching
    (total / 3).backward()
    assert_same(got, gradients(network))


def test_retention_pulls_towards_the_start_of_the_trajectory(
    make: Make, denoiser: TinyDenoiser, pool: Pool
) -> None:
    config = make("objective.name=matching", "objective.retain_weight=0.5")
    objective = make_trajectory(config, denoiser, pool, Architecture.HEADS)
    network, kept = objective.hypernetwork, objective.material.retain_embeddings
    objective.retain(4, torch.Generator().manual_seed(4))
    got = gradients(network)

    network.zero_grad()
    generator = torch.Generator().manual_seed(4)
    order = torch.randperm(len(kept), generator=generator)
    times = torch.randint(S + 1, (len(kept),), generator=generator).tolist()
    for row, t in zip(order.tolist(), times, strict=True):
        moved, start = (theta(network, kept[row : row + 1], float(at)) for at in (t, 0))
        squares = [(a - b).square().sum() for a, b in zip(moved, start, strict=True)]
        (0.5 * torch.stack(squares).sum() / len(kept)).backward()
    assert_same(got, gradients(network))


def test_the_measured_eta_is_where_real_descent_does_well(
    make: Make, denoiser: TinyDenoiser, pool: Pool
) -> None:
    objective = make_trajectory(make("objective.name=matching"), denoiser, pool, Architecture.ATOMS)
    found = find_eta(objective, 4, seed=0, average=lambda t: t, tick=lambda *_: None)

    def descend(eta: float) -> float:
        generator, place, losses = torch.Generator().manual_seed(7), objective.start(), []
        for _ in range(S + 20):
            batch = draw(pool, 4, generator)
            loss, g = objective.task_gradient(batch, place.expand(4, -1))
            losses.append(loss)
            if len(losses) <= S:
                place = place - eta * g.mean(dim=0)
        return sum(losses[-20:]) / 20

    before, small, right, large = (descend(eta) for eta in (0, 1e-4, found.eta, 30 * found.eta))
    assert small > 0.98 * before
    assert right < 0.7 * before
    assert not large < right


def test_matching_at_the_published_eta_is_inert_and_says_so(
    make: Make, denoiser: TinyDenoiser
) -> None:
    config = make("objective.name=matching", *PUBLISHED, *BRIEF)
    with pytest.raises(InertError, match=r"eta is 0\.0001\. Set objective\.eta to auto") as caught:
        train(config, denoiser=denoiser)
    told = re.search(r"the erase loss is ([\d.]+), without ([\d.]+)\.", str(caught.value))
    assert told is not None
    loss, without = map(float, told.groups())
    assert loss == pytest.approx(without, rel=0.01)
    # Only what other settings can use again is left.
    left = {path.name for path in config.output.parent.iterdir()}
    assert left == {"pack.pool.safetensors", "pack.metrics.jsonl"}


@pytest.mark.parametrize("architecture", ["atoms", "heads"])
def test_matching_with_a_measured_eta_erases(
    make: Make, denoiser: TinyDenoiser, architecture: str
) -> None:
    config = make(
        "objective.name=matching", f"network.architecture={architecture}", *BRIEF, "train.steps=300"
    )
    stages: list[str] = []
    result = train(config, denoiser=denoiser, progress=lambda event: stages.append(event.stage))
    metrics = checkpoint.read_info(result.path).metrics
    assert metrics["erase_loss"] < 0.75 * metrics["erase_loss_without"]
    assert metrics["oracle_loss"] < metrics["erase_loss_without"]
    assert metrics["eta"] > 1e-3
    assert "measuring eta" in stages
    left = {path.name for path in config.output.parent.iterdir()}
    assert left == {config.output.name, metrics_path(config.output).name}


@pytest.mark.parametrize(
    "network",
    [(), ("network.architecture=heads", "network.rank=1", "train.lr=3e-3")],
    ids=["atoms", "heads"],
)
def test_joint_erases_at_the_published_values(
    make: Make, denoiser: TinyDenoiser, network: tuple[str, ...]
) -> None:
    config = make("objective.name=joint", *PUBLISHED, *BRIEF, *network)
    metrics = train(config, denoiser=denoiser).metrics
    assert metrics["erase_loss"] < 0.75 * metrics["erase_loss_without"]
    assert "eta" not in metrics


def stop_at(step: int) -> Callable[[Event], None]:
    def report(event: Event) -> None:
        if event.stage == STAGE and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return report


@pytest.mark.parametrize(
    "settings",
    [
        ("objective.name=joint", "objective.retain_steps=2", "objective.retain_lr=1e-2"),
        ("objective.name=joint", "objective.separate_retention=false"),
        ("objective.name=matching",),
    ],
    ids=["joint", "joint-in-one", "matching"],
)
def test_a_resumed_run_equals_an_unbroken_one(
    make: Make, denoiser: TinyDenoiser, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    few = (*settings, *BRIEF[:1], "train.lr=3e-2", "train.steps=40", "objective.retain_weight=0.1")
    unbroken = train(make(*few), denoiser=denoiser)
    whole = state.read(unbroken.path)[0]
    config = make(f"output={tmp_path / 'broken.safetensors'}", *few)
    with pytest.raises(TrainingInterrupted, match="step 7 of 40"):
        train(config, denoiser=denoiser, progress=stop_at(7))
    kept = state.read(state.state_path(config.output))[0]
    separate = "objective.retain_steps=2" in settings
    assert any(name.startswith("optimizer1/") for name in kept) is separate

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("eta was measured again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "find_eta", refuse)
        resumed = train(config, denoiser=denoiser)
    assert resumed.metrics == unbroken.metrics
    tensors = state.read(config.output)[0]
    assert all(torch.equal(whole[name], tensors[name]) for name in whole)


def test_the_second_optimizer_is_kept(make: Make, denoiser: TinyDenoiser, tmp_path: Path) -> None:
    """Its moments matter: without them a resumed run is another one."""
    few = ("objective.name=joint", "train.steps=12")
    whole = state.read(train(make(*few), denoiser=denoiser).path)[0]
    config = make(f"output={tmp_path / 'broken.safetensors'}", *few)
    with pytest.raises(TrainingInterrupted):
        train(config, denoiser=denoiser, progress=stop_at(7))
    path = state.state_path(config.output)
    tensors, metadata = state.read(path)
    forgotten = {n: torch.zeros_like(t) if "optimizer1/" in n else t for n, t in tensors.items()}
    state.write(path, forgotten, metadata)
    train(config, denoiser=denoiser)
    other = state.read(config.output)[0]
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


def test_two_processes_find_one_eta_and_resume_exactly(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_processes.py")
    launch = ["-P", "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    settings = ["objective.name=joint", "objective.eta=auto", "network.num_steps=5"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path), *settings],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name for path in tmp_path.iterdir()}
    kept = {
        f"{run}.{kind}" for run in ("whole", "broken") for kind in ("safetensors", "metrics.jsonl")
    }
    assert names == {*kept, "stopped0", "stopped1"}
    eta, loss = (
        [
            checkpoint.read_info(tmp_path / f"{run}.safetensors").metrics[key]
            for run in ("whole", "broken")
        ]
        for key in ("eta", "oracle_loss")
    )
    assert eta[0] == eta[1] > 0
    assert loss[0] == loss[1] > 0


def test_the_program_says_that_a_network_is_inert(
    tmp_path: Path, data: dict[str, object], denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "run", partial(train, denoiser=denoiser))
    model, path = tmp_path / "tiny.safetensors", tmp_path / "run.yaml"
    model.touch()
    path.write_text(yaml.safe_dump({**data, "checkpoint": str(model)}))
    settings = ("--set=objective.name=matching", "--set=objective.eta=1e-4")
    done = CliRunner().invoke(cli.app, ["train", str(path), *settings])
    assert done.exit_code == 1
    assert "The hypernetwork does not erase" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_of_another_objective_are_refused(data: dict[str, object]) -> None:
    for settings, text in (
        (["objective.eta=0.1"], "eta belongs to joint and matching, not to direct"),
        (
            ["objective.name=joint", "objective.full_strength=0.5"],
            "full_strength belongs to direct, not to joint",
        ),
        (
            ["objective.name=matching", "objective.retain_lr=1e-3"],
            "retain_lr belongs to joint, not to matching",
        ),
        (
            ["objective.name=joint", "objective.separate_retention=false", "objective.retain_lr=1"],
            "retain_lr is of the optimizer that separate_retention: false takes away",
        ),
        (
            ["objective.name=matching", "objective.eta=fast"],
            "objective.eta given with --set: got 'fast', expected auto or a number above 0",
        ),
        (
            ["objective.name=cosine"],
            "'cosine', expected one of 'direct', 'joint', 'matching' or 'closed-form'",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            make_config(data, settings)
        assert text in str(caught.value)


@pytest.mark.parametrize("name", ["direct", "joint", "matching"])
def test_a_config_holds_the_settings_of_its_objective_alone(make: Make, name: str) -> None:
    config = make(f"objective.name={name}")
    plain = config.plain()["objective"]
    assert isinstance(plain, dict)
    assert ("full_strength" in plain) is (name == "direct")
    assert plain.get("eta") == {"direct": None, "joint": 1e-4, "matching": "auto"}[name]
    assert make_config(config.plain()) == config
