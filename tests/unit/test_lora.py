"""LoRA factors: the algebra, the spellings of files, and what is refused."""

from __future__ import annotations

import pytest
import torch

from unhype.lora import LoRAFactors, Spelling, TargetModule, read_state_dict

WHOLE = TargetModule("block.attn2.to_k", 6, 5)
PART = TargetModule("block.qkv", 6, 4, start=4, full_out_features=12)


def make_factors(batch: int = 3, rank: int = 2) -> LoRAFactors:
    generator = torch.Generator().manual_seed(0)
    targets = (WHOLE, PART)
    return LoRAFactors(
        targets,
        tuple(torch.randn(batch, rank, t.in_features, generator=generator) for t in targets),
        tuple(torch.randn(batch, t.out_features, rank, generator=generator) for t in targets),
        torch.linspace(0, 1, batch),
    )


def test_delta_is_scale_times_up_times_down() -> None:
    factors = make_factors()
    for row in range(3):
        expected = factors.scale[row] * factors.up[0][row] @ factors.down[0][row]
        torch.testing.assert_close(factors.delta(0)[row], expected)


def test_norms_equal_those_of_the_dense_changes() -> None:
    factors = make_factors()
    dense = torch.stack([factors.delta(index).square().sum((1, 2)) for index in range(2)], dim=1)
    torch.testing.assert_close(factors.squared_norms(), dense)
    torch.testing.assert_close(factors.squared_norm(), dense.sum(1))


def test_only_rows_with_a_scale_are_active() -> None:
    assert make_factors().active.tolist() == [False, True, True]


def test_rows_pick_and_reorder_prompts() -> None:
    factors = make_factors()
    picked = factors.rows([2, 0])
    torch.testing.assert_close(picked.delta(1), factors.delta(1)[[2, 0]])


def test_scaling_multiplies_the_change() -> None:
    factors = make_factors()
    torch.testing.assert_close(factors.scaled(0.5).delta(0), 0.5 * factors.delta(0))


@pytest.mark.parametrize("spelling", list(Spelling))
def test_every_spelling_round_trips(spelling: Spelling) -> None:
    factors = make_factors()
    read = read_state_dict(factors.state_dict(2, spelling), factors.targets, spelling)
    for index in range(2):
        torch.testing.assert_close(read.delta(index)[0], factors.delta(index)[2])


def test_alpha_is_scale_times_rank() -> None:
    state = make_factors().state_dict(1)
    assert float(state["diffusion_model.block.attn2.to_k.alpha"]) == pytest.approx(0.5 * 2)


def test_a_part_of_a_fused_layer_is_written_at_full_height() -> None:
    factors = make_factors()
    up = factors.state_dict(2)["diffusion_model.block.qkv.lora_up.weight"]
    assert up.shape == (12, 2)
    assert not up[:4].any()
    assert not up[8:].any()
    torch.testing.assert_close(up[4:8], factors.up[1][2])


def test_two_parts_of_one_layer_are_written_as_one_lora() -> None:
    query = TargetModule("qkv", 6, 4, start=0, full_out_features=12)
    value = TargetModule("qkv", 6, 4, start=8, full_out_features=12)
    factors = LoRAFactors(
        (query, value),
        tuple(torch.randn(1, 2, 6) for _ in range(2)),
        tuple(torch.randn(1, 4, 2) for _ in range(2)),
        torch.ones(1),
    )
    state = factors.state_dict()
    up = state["diffusion_model.qkv.lora_up.weight"]
    down = state["diffusion_model.qkv.lora_down.weight"]
    scale = float(state["diffusion_model.qkv.alpha"]) / down.shape[0]
    dense = torch.zeros(12, 6)
    dense[:4], dense[8:] = factors.delta(0)[0], factors.delta(1)[0]
    torch.testing.assert_close(scale * up @ down, dense)


def test_a_lora_that_misses_a_target_is_refused_by_name() -> None:
    state = make_factors().state_dict()
    del state["diffusion_model.block.qkv.lora_up.weight"]
    with pytest.raises(ValueError, match=r"no diffusion_model\.block\.qkv\.lora_up\.weight"):
        read_state_dict(state, (WHOLE, PART))


def test_shapes_that_do_not_fit_are_named_with_those_expected() -> None:
    with pytest.raises(ValueError, match=r"attn2\.to_k .*\(1, 2, 7\).*expected \(1, 2, 6\)"):
        LoRAFactors((WHOLE,), (torch.zeros(1, 2, 7),), (torch.zeros(1, 5, 2),), torch.ones(1))


def test_rows_outside_the_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="rows 8 to 16, but the layer has 12"):
        TargetModule("x", 4, 8, start=8, full_out_features=12)
