"""The pack file: what comes back, and a sentence for everything that is wrong with a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unhype import checkpoint
from unhype.checkpoint import (
    CONFIG_KEY,
    FORMAT_KEY,
    BaseFingerprint,
    Calibration,
    CheckpointError,
    ConceptInfo,
    PackInfo,
)
from unhype.families import FAMILIES
from unhype.gate import Gate, GateConfig
from unhype.hypernetwork import Architecture, HypernetworkConfig, make_hypernetwork
from unhype.lora import TargetModule

FAMILY = next(iter(FAMILIES))
DIM = FAMILIES[FAMILY].embedding.dim
TARGETS = (TargetModule("a.attn2.to_k", 6, 5), TargetModule("b.qkv", 6, 4, 4, 12))


def make_info(architecture: Architecture = Architecture.ATOMS) -> PackInfo:
    return PackInfo(
        family=FAMILY,
        base=BaseFingerprint("model.safetensors", "abc"),
        hypernetwork=HypernetworkConfig(architecture, DIM, rank=2, hidden_dim=8),
        targets=TARGETS,
        gate=GateConfig(DIM, 2, 4, threshold=0.25),
        concepts=(
            ConceptInfo("cat", ("cat", "kitty"), "a meadow"),
            ConceptInfo("dog", ("dog",), "a meadow"),
        ),
        calibration=Calibration(0.001, 0.02, 900, 300),
        training={"seed": 3, "train": {"lr": 1e-3}},
        training_digest="d",
        metrics={"final_loss": 0.5},
        version="0.1.0",
        license="Apache-2.0",
    )


def write(path: Path, info: PackInfo | None = None) -> PackInfo:
    info = info or make_info()
    torch.manual_seed(0)
    hypernetwork = make_hypernetwork(info.hypernetwork, info.targets)
    for parameter in hypernetwork.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoint.save(path, info, hypernetwork, Gate(info.gate))
    return info


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    """Write the file again with tensors or metadata changed."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "pack.safetensors")
    return tmp_path / "pack.safetensors"


@pytest.mark.parametrize("architecture", list(Architecture))
def test_a_pack_comes_back_as_it_was(architecture: Architecture, tmp_path: Path) -> None:
    path = tmp_path / "pack.safetensors"
    info = write(path, make_info(architecture))
    pack = checkpoint.load(path)
    assert pack.info == info == checkpoint.read_info(path)
    again = tmp_path / "again.safetensors"
    checkpoint.save(again, pack.info, pack.hypernetwork, pack.gate)
    embedding = torch.randn(2, DIM)
    first, second = (checkpoint.load(p).generate(embedding) for p in (path, again))
    assert torch.equal(first.factors.delta(0), second.factors.delta(0))
    assert torch.equal(first.reading.probability, second.reading.probability)


def test_loading_leaves_the_random_state_alone(path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    checkpoint.load(path)
    assert torch.equal(torch.rand(3), expected)


def test_a_silent_gate_means_no_lora(path: Path) -> None:
    pack = checkpoint.load(path)
    generated = pack.at(0.999).generate(torch.randn(3, DIM))
    assert not generated.factors.active.any()
    assert not generated.factors.delta(0).any()


def test_only_the_named_concepts_stay_active(path: Path) -> None:
    pack = checkpoint.load(path).only(["dog"])
    assert pack.active == (False, True)
    reading = pack.at(0.01).generate(torch.randn(4, DIM)).reading
    assert not reading.fired[:, 0].any()
    assert reading.fired[:, 1].any()


def test_a_concept_the_pack_lacks_is_named_with_those_it_has(path: Path) -> None:
    with pytest.raises(ValueError, match=r"no concept 'bird'.*cat, dog"):
        checkpoint.load(path).only(["bird"])


def test_an_embedding_that_is_not_finite_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.load(path).generate(torch.full((1, DIM), float("nan")))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no pack .*absent\.safetensors.*models/unhype"):
        checkpoint.load(tmp_path / "absent.safetensors")


def test_a_truncated_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.load(path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "picture.safetensors"
    path.write_bytes(b"\x89PNG not at all")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        checkpoint.load(path)


def test_an_ordinary_lora(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="not an UnHype pack"):
        checkpoint.load(tmp_path / "lora.safetensors")


def test_a_newer_format(path: Path) -> None:
    rewrite(path, lambda tensors, metadata: metadata.update({FORMAT_KEY: "5"}))
    with pytest.raises(
        CheckpointError, match=r"format 5; this pack of nodes reads up to 4\. Update"
    ):
        checkpoint.load(path)


def age(path: Path, version: str, section: str, *unknown: str) -> None:
    """Make a pack one of an older format, whose description lacks some keys of a section."""

    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        config = json.loads(metadata[CONFIG_KEY])
        for key in unknown:
            del config[section][key]
        metadata.update({FORMAT_KEY: version, CONFIG_KEY: json.dumps(config)})

    rewrite(path, change)


def test_a_pack_of_format_1_is_still_read(path: Path) -> None:
    before = checkpoint.load(path)
    age(path, "1", "hypernetwork", "num_concepts", "directions")
    assert checkpoint.load(path).info == before.info


def test_a_pack_of_format_3_is_still_read_and_writes_all_of_its_lora(path: Path) -> None:
    before = checkpoint.load(path)
    age(path, "3", "gate", "least_strength", "full_strength_at")
    pack = checkpoint.load(path)
    assert pack.info == before.info
    assert torch.equal(pack.gate.strength(torch.tensor([0.5, 0.6])), torch.ones(2))


def change_config(**changes: object) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata[CONFIG_KEY] = json.dumps({**json.loads(metadata[CONFIG_KEY]), **changes})

    return change


def test_a_family_from_the_future(path: Path) -> None:
    rewrite(path, change_config(family="holo"))
    with pytest.raises(CheckpointError, match="family 'holo'"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"colour": "red"},
        {"concepts": "cat"},
        {"gate": {"embedding_dim": "many", "num_concepts": 2}},
        {"base": {}},
    ],
)
def test_a_description_that_makes_no_sense(path: Path, changes: dict[str, object]) -> None:
    rewrite(path, change_config(**changes))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def test_a_description_that_contradicts_itself(path: Path) -> None:
    one = [{"name": "cat", "target": ["cat"], "anchor": "a meadow"}]
    rewrite(path, change_config(concepts=one))
    with pytest.raises(CheckpointError, match="2 concepts in its gate, expected 1"):
        checkpoint.load(path)


def test_a_missing_tensor(path: Path) -> None:
    rewrite(path, lambda tensors, metadata: tensors.pop("hypernetwork.up.1"))
    with pytest.raises(CheckpointError, match=r"lacks tensor 'up\.1'"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["hypernetwork.up.2", "something"])
def test_an_extra_tensor(path: Path, name: str) -> None:
    rewrite(path, lambda tensors, metadata: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="extra tensor|no UnHype pack has"):
        checkpoint.load(path)


def test_a_tensor_of_another_shape(path: Path) -> None:
    rewrite(
        path, lambda tensors, metadata: tensors.update({"hypernetwork.up.0": torch.zeros(7, 2)})
    )
    with pytest.raises(CheckpointError, match=r"up\.0 has shape \(7, 2\), expected \(5, 2\)"):
        checkpoint.load(path)


def test_a_tensor_that_is_not_finite(path: Path) -> None:
    rewrite(path, lambda tensors, metadata: tensors["hypernetwork.up.0"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="not finite"):
        checkpoint.load(path)


def test_diverged_weights_are_not_written(tmp_path: Path) -> None:
    info = make_info()
    hypernetwork = make_hypernetwork(info.hypernetwork, info.targets)
    with torch.no_grad():
        next(hypernetwork.parameters()).fill_(1e9)
    with pytest.raises(ValueError, match="too large for half precision"):
        checkpoint.save(tmp_path / "pack.safetensors", info, hypernetwork, Gate(info.gate))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fail(tensors: object, part: Path, metadata: object) -> None:
        part.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def reads_tokens(path: Path) -> checkpoint.Pack:
    """A pack whose gate sees the cat where the first number is large, the dog where the second is."""
    write(path, replace(make_info(), gate=GateConfig(DIM, 2, 4, tokens=True)))
    pack = checkpoint.load(path)
    first, last = pack.gate.layers[0], pack.gate.layers[2]
    for layer in (first, last):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    first.weight[0, 0] = first.weight[1, 1] = 1.0
    last.weight[0, 0] = last.weight[1, 1] = 1.0
    last.bias.fill_(-1.0)
    return pack


def token(cat: float = 0.0, dog: float = 0.0) -> Tensor:
    vector = torch.full((DIM,), 0.1)
    vector[:2] = torch.tensor([cat, dog])
    return vector


def test_a_gate_that_reads_tokens_says_so_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "pack.safetensors"
    reads_tokens(path)
    assert checkpoint.read_info(path).gate.tokens


def test_the_lora_is_written_from_the_token_that_asks_most(tmp_path: Path) -> None:
    pack = reads_tokens(tmp_path / "pack.safetensors")
    text = torch.stack([token(), token(cat=5), token(cat=3)])
    wanted = pack.hypernetwork.generate(text[1:2])
    generated = pack.generate(torch.stack([text, torch.stack([token()] * 3)]))
    assert generated.reading.open.tolist() == [True, False]
    torch.testing.assert_close(generated.factors.delta(0)[0], wanted.delta(0)[0])
    assert not generated.factors.active[1]


def test_two_concepts_act_if_both_stand_out(tmp_path: Path) -> None:
    pack = reads_tokens(tmp_path / "pack.safetensors")
    for dog, acting in ((5.0, 2), (1.6, 1)):
        text = torch.stack([token(cat=6), token(dog=dog)])
        written = pack.write(text)
        assert written.reading.fired.all()
        assert len(written.parts) == acting


def test_the_surer_concept_of_a_token_acts(tmp_path: Path) -> None:
    pack = reads_tokens(tmp_path / "pack.safetensors")
    text = torch.stack([token(cat=6, dog=4), token()])
    assert len(pack.write(text).parts) == 1
    only = pack.only(["dog"]).write(text)
    assert len(only.parts) == 1
    assert only.parts[0].active.all()


def grade(pack: checkpoint.Pack, *, least: float, full: float) -> checkpoint.Pack:
    """The same pack, which writes all of its LoRA only from a probability of ``full`` on."""
    pack.gate.config = replace(pack.gate.config, least_strength=least, full_strength_at=full)
    return pack


@pytest.mark.parametrize("tokens", [True, False])
def test_what_the_gate_is_hardly_sure_of_is_written_weaker(tmp_path: Path, tokens: bool) -> None:
    pack = reads_tokens(tmp_path / "pack.safetensors")
    pack.gate.config = replace(pack.gate.config, tokens=tokens)
    texts = torch.stack([token(cat=1.3), token(cat=9), token()])
    texts = texts[:, None] if tokens else texts
    whole = pack.generate(texts)
    weaker = grade(pack, least=0.25, full=0.9).generate(texts)
    share = (weaker.factors.squared_norm() / whole.factors.squared_norm()).sqrt()
    assert whole.reading.open.tolist() == weaker.reading.open.tolist() == [True, True, False]
    assert 0.25 <= share[0].item() < 0.5
    assert share[1].item() == 1
    torch.testing.assert_close(weaker.shares.amax(1)[:2], share[:2])
    assert not weaker.shares[2].any()
    assert not weaker.factors.active[2]
    again = replace(pack, graded=False).generate(texts).factors
    torch.testing.assert_close(again.delta(0), whole.factors.delta(0))


def test_beside_the_surest_only_what_is_written_whole_acts(tmp_path: Path) -> None:
    pack = reads_tokens(tmp_path / "pack.safetensors")
    text = torch.stack([token(cat=6), token(dog=5)])
    both = grade(pack, least=0.5, full=0.9).write(text)
    assert len(both.parts) == 2
    assert both.shares[:2].tolist() == [1, 1]
    written = grade(pack, least=0.5, full=0.999).write(text)
    [only] = written.parts
    assert written.reading.fired[:2].tolist() == [True, True]
    assert written.shares[:2].tolist() == [only.scale.item(), 0]
    assert torch.equal(pack.generate(text[None]).shares[0], written.shares)
    wanted = pack.hypernetwork.generate(text[:1])
    torch.testing.assert_close(only.down[0], wanted.down[0])
    assert 0.5 < only.scale.item() < 1


def test_a_low_threshold_still_lets_the_surest_act(tmp_path: Path) -> None:
    pack = reads_tokens(tmp_path / "pack.safetensors").at(0.05)
    written = pack.write(torch.stack([token(cat=0.5), token()]))
    assert written.reading.fired[0]
    assert len(written.parts) == 1


def test_a_gate_that_reads_ends_takes_the_last_token(path: Path) -> None:
    pack = checkpoint.load(path)
    text = torch.stack([token(cat=5), token(dog=1)])
    padded = torch.cat([text, torch.zeros(1, DIM)])[None]
    one, other = pack.generate(padded), pack.generate(text[1:])
    assert torch.equal(one.reading.probability, other.reading.probability)
    torch.testing.assert_close(one.factors.delta(0), other.factors.delta(0))
