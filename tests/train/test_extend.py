"""Concepts added to a trained pack and taken out of it: what is new, and above all what must not move."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from train import extend as extending
from train import state
from train.cli import app
from train.config import ConfigError, TrainConfig, make_config
from train.evaluate.suite import Seen
from train.extend import Growth, MovedError, difference, extend, fitting, grow, join_gates, remove
from train.loop import STAGE
from train.run import Event, TrainingInterrupted, train
from unhype import checkpoint
from unhype.checkpoint import Pack
from unhype.families import FAMILIES
from unhype.gate import Gate, GateConfig
from unhype.host.denoise import ModelFiles
from unhype.hypernetwork import Architecture, HypernetworkConfig, make_hypernetwork

from .conftest import TinyDenoiser, small_data

runner = CliRunner()
Make = Callable[..., TrainConfig]
NEW = [{"name": "boat", "target": ["boat", "canoe"], "anchor": "an empty lake"}]

LONG = ("train.steps=120", "train.lr=5e-3", "gate.steps=200")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A pack that erases cats."""
    config = make_config(small_data(tmp_path_factory.mktemp("pack")), LONG)
    return train(config, denoiser=TinyDenoiser()).path.read_bytes()


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, trained: bytes) -> Path:
    """The same pack with boats."""
    folder = tmp_path_factory.mktemp("extended")
    old = folder / "cat.safetensors"
    old.write_bytes(trained)
    config = make_config({**small_data(folder), "concepts": NEW}, LONG)
    return extend(old, config, denoiser=TinyDenoiser()).path


@pytest.fixture
def old(tmp_path: Path, trained: bytes) -> Path:
    path = tmp_path / "cat.safetensors"
    path.write_bytes(trained)
    return path


@pytest.fixture
def pack(old: Path) -> Pack:
    return checkpoint.load(old)


@pytest.fixture
def make_new(data: dict[str, object], tmp_path: Path) -> Make:
    """Configs of boats."""
    new = {**data, "concepts": NEW, "output": str(tmp_path / "new.safetensors")}
    return lambda *overrides: make_config(new, overrides)


def embeddings(denoiser: TinyDenoiser, *texts: str) -> torch.Tensor:
    return denoiser.embed_pooled(texts)


def test_an_extended_pack_erases_the_old_and_the_new_in_that_order(
    extended: Path, pack: Pack, denoiser: TinyDenoiser
) -> None:
    new = checkpoint.load(extended)
    assert new.info.concept_names == ("cat", "boat")
    assert new.info.concepts[0] == pack.info.concepts[0]
    assert new.info.hypernetwork.rank == pack.info.hypernetwork.rank + Growth.atoms
    reading = new.read(
        embeddings(denoiser, "a photo of a kitty", "a photo of a canoe", "a photo of a dog")
    )
    assert reading.fired.tolist() == [[True, False], [False, True], [False, False]]
    metrics = new.info.metrics
    assert metrics["erase_loss"] < 0.9 * metrics["erase_loss_without"]
    assert new.info.calibration is not None
    assert new.info.calibration.miss_rate < 0.1


def test_the_old_concepts_stay(extended: Path, pack: Pack, denoiser: TinyDenoiser) -> None:
    new = checkpoint.load(extended)
    prompts = embeddings(denoiser, "i want a cat please", "low poly kitty", "a cat made of glass")
    before, after = (p.generate(prompts) for p in (pack, new))
    moved = difference(after.factors, before.factors).squared_norm() / before.factors.squared_norm()
    assert moved.sqrt().max() < 0.2
    torch.testing.assert_close(
        after.reading.probability[:, :1], before.reading.probability, rtol=0, atol=1e-6
    )


def test_what_the_pack_says_of_its_change_is_so(
    extended: Path, pack: Pack, denoiser: TinyDenoiser
) -> None:
    new = checkpoint.load(extended)
    told = new.info.metrics["extension"]
    assert told["added"] == ["boat"]
    assert told["gate_difference"] < 1e-5
    texts, _ = extending.target_prompts(pack.info)
    prompts = embeddings(denoiser, *dict.fromkeys(texts))
    before, after = (p.hypernetwork.generate(prompts) for p in (pack, new))
    dense = [
        sum((f.delta(i) - g.delta(i)).square().sum((1, 2)) for i in range(len(f.targets)))
        for f, g in ((after, before), (before, before.scaled(0)))
    ]
    relative = (torch.as_tensor(dense[0]) / torch.as_tensor(dense[1])).sqrt()
    change = told["changes"]["cat"]
    assert change["mean"] == pytest.approx(float(relative.mean()), rel=1e-3)
    assert change["worst"] == pytest.approx(float(relative.max()), rel=1e-3)
    assert 0 < change["mean"] <= extending.LIMIT


def test_the_difference_of_factors_is_the_difference_of_changes(pack: Pack) -> None:
    c = torch.randn(3, pack.info.gate.embedding_dim)
    wider = grow(pack.hypernetwork, 2, 0)
    with torch.no_grad():
        for up in wider.get_submodule("up").parameters():
            up.add_(torch.randn_like(up))
    new, old = wider.generate(c, 200), pack.hypernetwork.generate(c, 100)
    apart = difference(new, old)
    for index in range(len(new.targets)):
        torch.testing.assert_close(apart.delta(index), new.delta(index) - old.delta(index))


@pytest.mark.parametrize("architecture", list(Architecture))
def test_a_grown_network_writes_the_same_until_it_is_trained(
    architecture: Architecture, denoiser: TinyDenoiser
) -> None:
    config = HypernetworkConfig(architecture, embedding_dim=12, rank=3, hidden_dim=8)
    torch.manual_seed(1)
    old = make_hypernetwork(config, denoiser.targets)
    for parameter in old.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    new = grow(old, 2, 0)
    assert new.config.rank == (5 if architecture is Architecture.ATOMS else 3)
    c, s = torch.randn(4, 12), torch.tensor([0.0, 10, 100, 300])
    before, after = old.generate(c, s), new.generate(c, s)
    for index in range(len(old.targets)):
        torch.testing.assert_close(after.delta(index), before.delta(index), rtol=1e-5, atol=1e-6)
    after.squared_norm().sum().backward()
    assert all(p.grad is not None for name, p in new.named_parameters() if "up" in name)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.01])
def test_joined_gates_answer_as_each_does_alone_at_one_threshold(threshold: float) -> None:
    torch.manual_seed(0)
    old, new = Gate(GateConfig(12, 2, 8, threshold)), Gate(GateConfig(12, 3, 4))
    for gate in (old, new):
        gate.standardize.fit(3 * torch.randn(50, 12) + torch.randn(12))
    both, c = join_gates(old, new), 3 * torch.randn(200, 12)
    assert both.config == GateConfig(12, 5, 12, threshold)
    torch.testing.assert_close(both(c)[:, :2], old(c), rtol=0, atol=1e-5)
    clear = new(c).abs() > 1e-4
    fired = both.read(c).fired[:, 2:]
    assert (fired == new.read(c).fired)[clear].all()
    for name, value in old.state_dict().items():
        kept = both.state_dict()[name]
        assert torch.equal(kept[tuple(slice(size) for size in value.shape)], value), name


def test_an_interrupted_extension_goes_on_where_it_stopped(
    old: Path, make_new: Make, denoiser: TinyDenoiser, tmp_path: Path
) -> None:
    config = make_new()
    extend(old, config, denoiser=denoiser, growth=Growth(force=True))
    unbroken, _ = state.read(config.output)
    config.output.unlink()

    def stop(event: Event) -> None:
        if event.stage == STAGE and event.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match="step 7 of 12"):
        extend(old, config, denoiser=denoiser, growth=Growth(force=True), progress=stop)
    assert not config.output.exists()
    steps: list[int] = []
    extend(
        old,
        config,
        denoiser=denoiser,
        growth=Growth(force=True),
        progress=lambda e: steps.append(e.step) if e.stage == STAGE else None,
    )
    assert steps[0] == 8
    resumed, _ = state.read(config.output)
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cat.safetensors",
        "new.metrics.jsonl",
        "new.safetensors",
    ]


def test_the_state_of_another_pack_is_not_gone_on_from(
    old: Path, make_new: Make, denoiser: TinyDenoiser
) -> None:
    config = make_new()

    def stop(event: Event) -> None:
        if event.stage == STAGE:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        extend(old, config, denoiser=denoiser, progress=stop)
    found = checkpoint.load(old)
    checkpoint.save(old, replace(found.info, license="x"), found.hypernetwork, found.gate)
    with pytest.raises(ConfigError, match="other settings or another model"):
        extend(old, config, denoiser=denoiser)


def test_a_pack_that_moved_is_refused_unless_forced(
    old: Path, make_new: Make, denoiser: TinyDenoiser
) -> None:
    config = make_new("train.steps=30", "train.lr=0.05")
    loose = Growth(keep_weight=0)
    with pytest.raises(MovedError, match=r"'cat' by \d+\.\d% .*train.steps, now 30.*--force"):
        extend(old, config, denoiser=denoiser, growth=loose)
    assert not config.output.exists()
    assert not state.state_path(config.output).exists()
    stages: list[str] = []
    found = extend(
        old,
        config,
        denoiser=denoiser,
        growth=replace(loose, force=True),
        progress=lambda event: stages.append(event.stage),
    )
    assert found.changes["cat"].mean > extending.LIMIT
    assert "collecting trajectories" not in stages
    assert checkpoint.read_info(config.output).concept_names == ("cat", "boat")


@pytest.mark.parametrize(
    ("concept", "words"),
    [
        ({"name": "cat", "target": ["tiger"]}, "the name 'cat'"),
        ({"name": "pet", "target": ["hamster", "Kitties"]}, "the phrase 'Kitties'"),
    ],
)
def test_what_is_erased_already_is_refused(
    concept: dict[str, object], words: str, pack: Pack, data: dict[str, object]
) -> None:
    config = make_config({**data, "concepts": [{**concept, "anchor": "a lake"}]})
    with pytest.raises(ConfigError, match=f"already: {words}.*It erases: cat"):
        fitting(pack, config)


def test_a_new_phrase_within_every_old_one_is_refused(pack: Pack, data: dict[str, object]) -> None:
    concepts = tuple(replace(c, target=("black cat", "white cat")) for c in pack.info.concepts)
    within = replace(pack, info=replace(pack.info, concepts=concepts))
    config = make_config(
        {**data, "concepts": [{"name": "c", "target": ["cat"], "anchor": "a lake"}]}
    )
    with pytest.raises(ConfigError, match="stands in every phrase of 'cat'"):
        fitting(within, config)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.name=joint", "extended with direct"),
        ("network.rank=5", "network.rank is 5, .* where it is 4"),
    ],
)
def test_settings_that_an_extension_cannot_have_are_refused(
    override: str, words: str, pack: Pack, make_new: Make
) -> None:
    with pytest.raises(ConfigError, match=words):
        fitting(pack, make_new(override))


def test_how_strongly_to_write_is_the_packs(pack: Pack, make_new: Make) -> None:
    assert fitting(pack, make_new("gate.least_strength=0.3")).gate.least_strength == 1
    gate = replace(pack.info.gate, least_strength=0.4, full_strength_at=0.8)
    graded = replace(pack, info=replace(pack.info, gate=gate))
    got = fitting(graded, make_new()).gate
    assert (got.least_strength, got.full_strength_at) == (0.4, 0.8)


def test_what_the_pack_erases_is_not_retained(
    pack: Pack, make_new: Make, caplog: pytest.LogCaptureFixture
) -> None:
    retain = "retain=[dog, cats, a black kitty, bus]"
    config = fitting(pack, make_new(retain, "retain_captions=[a cat sleeps, a calm sea]"))
    assert config.retain == ("dog", "bus")
    assert config.retain_captions == ("a calm sea",)
    assert "Not retained" in caplog.text
    assert "cats, a black kitty" in caplog.text
    with pytest.raises(ConfigError, match="Nothing is left to retain"):
        fitting(pack, make_new("retain=[cats]"))


def test_an_extended_pack_can_be_extended_and_knows_all_it_was_trained_on(
    extended: Path, make_new: Make, denoiser: TinyDenoiser
) -> None:
    config = make_new("network={}", "templates=['a {} of dreams', 'a {} and a {} of dreams']")
    concept = config.concepts[0].model_copy(update={"name": "tram", "target": ("tram",)})
    config = config.model_copy(update={"concepts": (concept,)})
    extend(extended, config, denoiser=denoiser, growth=Growth(force=True))
    info = checkpoint.read_info(config.output)
    assert info.concept_names == ("cat", "boat", "tram")
    assert set(info.metrics["extension"]["changes"]) == {"cat", "boat"}
    before = checkpoint.read_info(extended).training
    assert info.training["templates"] == [*config.templates, *before["templates"]]
    assert info.training["extends"]["training"]["extends"]["pack"] == "cat.safetensors"


def test_removing_a_concept_leaves_the_others_bit_for_bit(
    extended: Path, tmp_path: Path, denoiser: TinyDenoiser
) -> None:
    output = tmp_path / "less.safetensors"
    remove(extended, ["cat"], output)
    before, after = checkpoint.load(extended), checkpoint.load(output)
    assert after.info.concept_names == ("boat",)
    assert after.info.metrics["removal"]["concepts"] == ["cat"]
    for name, value in state.read(output)[0].items():
        whole = state.read(extended)[0][name]
        assert torch.equal(value, whole[1:] if name.startswith("gate.layers.2.") else whole), name
    prompts = embeddings(denoiser, "a canoe", "a kitty", "a dog")
    torch.testing.assert_close(
        after.read(prompts).probability, before.read(prompts).probability[:, 1:]
    )
    assert after.read(prompts).open.tolist() == [True, False, False]


def test_a_pack_with_less_still_says_what_discovery_took_in(
    extended: Path, make_new: Make, tmp_path: Path, denoiser: TinyDenoiser
) -> None:
    pack, found = checkpoint.load(extended), {"boat": {"same": ["skiff"], "different": ["raft"]}}
    whole, less = tmp_path / "whole.safetensors", tmp_path / "less.safetensors"
    info = replace(pack.info, metrics={"discovered": found})
    checkpoint.save(whole, info, pack.hypernetwork, pack.gate)
    remove(whole, ["cat"], less)
    assert checkpoint.read_info(less).metrics["discovered"] == found
    config = make_new("network={}", "retain=[dog, bus]")
    concept = config.concepts[0].model_copy(update={"name": "tram", "target": ("tram",)})
    config = config.model_copy(update={"concepts": (concept,)})
    extend(less, config, denoiser=denoiser, growth=Growth(force=True))
    assert {"skiff", "raft"} <= set(Seen.by(checkpoint.read_info(config.output)).phrases)


def test_removing_nothing_known_or_everything_is_refused(extended: Path, tmp_path: Path) -> None:
    output = tmp_path / "less.safetensors"
    with pytest.raises(ConfigError, match="no concept 'dog'. It erases: cat, boat"):
        remove(extended, ["dog"], output)
    with pytest.raises(ConfigError, match="erases nothing but cat, boat"):
        remove(extended, ["boat", "cat"], output)
    with pytest.raises(ConfigError, match="is the pack itself"):
        remove(extended, ["boat"], extended)
    assert not output.exists()


@pytest.fixture
def model(tmp_path: Path, denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that loads as the tiny denoiser."""
    path = tmp_path / "tiny.safetensors"
    path.touch()
    monkeypatch.setattr("train.run.Denoiser.load", lambda path, comfyui, *, pictures: denoiser)
    return path


def few(data: dict[str, object]) -> list[str]:
    """Settings of a small run as options."""
    return [
        part
        for section in ("gate", "trajectories", "train")
        for name, value in dict(data[section]).items()  # pyright: ignore[reportArgumentType, reportCallIssue]
        for part in ("--set", f"{section}.{name}={value}")
    ]


def test_a_pack_grows_and_shrinks_on_the_command_line(
    old: Path, model: Path, data: dict[str, object], tmp_path: Path
) -> None:
    output = tmp_path / "both.safetensors"
    words = ["--checkpoint", str(model), "--erase", "boat, canoe", "--anchor", "a lake"]
    done = runner.invoke(
        app,
        [
            "extend",
            str(old),
            *words,
            "--output",
            str(output),
            "--force",
            "--atoms",
            "2",
            *few(data),
        ],
    )
    assert done.exit_code == 0, done.stderr
    assert f"pack\t{output} (" in done.stdout
    assert "cat has moved\t" in done.stdout
    info = checkpoint.read_info(output)
    assert (info.concept_names, info.hypernetwork.rank) == (("cat", "boat"), 6)
    less = tmp_path / "less.safetensors"
    done = runner.invoke(app, ["remove", str(output), "cat", "--output", str(less)])
    assert (done.exit_code, done.stdout) == (0, f"{less} erases boat\n")
    done = runner.invoke(app, ["inspect", str(less)])
    assert done.exit_code == 0, done.stderr


def test_a_config_file_takes_its_model_and_output_from_options(
    old: Path, model: Path, tmp_path: Path, denoiser: TinyDenoiser, make_new: Make
) -> None:
    config = tmp_path / "boat.yaml"
    settings = make_new("network={}").plain()
    del settings["checkpoint"], settings["output"]
    config.write_text(yaml.safe_dump(settings))
    output = tmp_path / "a, #b.safetensors"
    command = ["extend", str(old), str(config), "--checkpoint", str(model), "--output", str(output)]
    done = runner.invoke(app, [*command, "--force"])
    assert done.exit_code == 0, done.stderr
    assert output.is_file()


@pytest.mark.parametrize("in_file", [False, True])
def test_text_encoders_of_their_own_are_loaded(
    in_file: bool,
    old: Path,
    model: Path,
    tmp_path: Path,
    data: dict[str, object],
    denoiser: TinyDenoiser,
    make_new: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[ModelFiles] = []

    def load(files: ModelFiles, comfyui: object, *, pictures: bool) -> TinyDenoiser:
        loaded.append(files)
        return denoiser

    monkeypatch.setattr("train.run.Denoiser.load", load)
    encoders = [tmp_path / "clip l.safetensors", tmp_path / "t5.safetensors"]
    for path in encoders:
        path.touch()
    given = ["--erase", "boat, canoe", "--anchor", "a lake", *few(data)]
    if in_file:
        given = [str(tmp_path / "boat.yaml")]
        settings = make_new("network={}").plain()
        Path(given[0]).write_text(yaml.safe_dump(settings))
    command = ["extend", str(old), *given, "--checkpoint", str(model), "--force"]
    command += [part for path in encoders for part in ("--text-encoder", str(path))]
    done = runner.invoke(app, [*command, "--output", str(tmp_path / "both.safetensors")])
    assert done.exit_code == 0, done.stderr
    assert loaded == [ModelFiles(model, tuple(encoders))]


@pytest.mark.parametrize("change", ["family", "digest"])
def test_another_family_is_refused_and_another_base_warned_of(
    change: str,
    old: Path,
    model: Path,
    data: dict[str, object],
    denoiser: TinyDenoiser,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if change == "family":
        denoiser.family = list(FAMILIES.values())[1]
    else:
        denoiser.fingerprint = checkpoint.BaseFingerprint("other", "1")
    words = ["--checkpoint", str(model), "--erase", "boat", "--anchor", "a lake"]
    output = tmp_path / "both.safetensors"
    done = runner.invoke(
        app, ["extend", str(old), *words, "--output", str(output), "--force", *few(data)]
    )
    if change == "family":
        assert done.exit_code == 2
        assert "was trained for" in done.stderr
        assert not output.exists()
    else:
        assert done.exit_code == 0, done.stderr
        assert "was trained on tiny, not on other" in caplog.text
        assert checkpoint.read_info(output).base.name == "tiny"


def test_an_extension_needs_an_output_of_its_own(old: Path, model: Path) -> None:
    words = ["extend", str(old), "--checkpoint", str(model), "--erase", "boat", "--anchor", "lake"]
    done = runner.invoke(app, words)
    assert done.exit_code == 2
    assert "--output is missing" in done.stderr
    done = runner.invoke(app, [*words, "--output", str(old)])
    assert done.exit_code == 2
    assert "is the pack itself" in done.stderr
