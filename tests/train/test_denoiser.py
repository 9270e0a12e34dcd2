"""The probe of a model's gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from train.denoiser import WrongGradientError, check_gradient, gradient_error
from unhype.host.denoise import TextBatch
from unhype.lora import LoRAFactors

from .conftest import TinyDenoiser


def states(denoiser: TinyDenoiser) -> tuple[Tensor, Tensor, TextBatch]:
    x_t = 5 * torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([2.0, 5.0]), denoiser.embed(["a cat", "a dog"])


def test_a_right_gradient_passes(denoiser: TinyDenoiser) -> None:
    assert gradient_error(denoiser, *states(denoiser), step=0.02) <= 1e-3
    check_gradient(denoiser, *states(denoiser))


def test_a_gradient_that_misses_factors_is_refused(
    denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = denoiser.predict

    def forgetful(x: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None) -> Tensor:
        if factors is not None:
            factors = replace(factors, down=tuple(down.detach() for down in factors.down))
        return predict(x, sigma, text, factors)

    monkeypatch.setattr(denoiser, "predict", forgetful)
    with pytest.raises(WrongGradientError, match=r"of tiny is off by 100%, so it cannot be"):
        check_gradient(denoiser, *states(denoiser))


def test_a_state_about_which_the_model_is_far_from_linear_passes(
    denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = denoiser.predict

    def bent(x: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None) -> Tensor:
        change = predict(x, sigma, text, factors) - predict(x, sigma, text, None)
        return predict(x, sigma, text, None) + torch.sin(10 * change) / 10

    monkeypatch.setattr(denoiser, "predict", bent)
    coarse, fine = (gradient_error(denoiser, *states(denoiser), step=s) for s in (0.25, 0.0625))
    assert fine < 0.25 < coarse
    check_gradient(denoiser, *states(denoiser))
