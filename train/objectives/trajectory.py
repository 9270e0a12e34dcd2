"""Objectives that learn a trajectory of simulated gradient descent on the LoRA, step by step.

Of arXiv:2602.03410, ``matching`` as its text has it, ``joint`` as the authors' code does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unhype.hypernetwork import Hypernetwork
from unhype.lora import LoRAFactors, TargetModule

from ..config import ObjectiveConfig, ObjectiveName
from ..denoiser import DenoiserLike
from ..trajectories import Batch, draw
from .base import Material, Phase, accumulate, cut, end, measure_erasing

ALIVE = 0.9
"""Share of the erase loss that a network must get below, or it is inert."""


class InertError(ValueError):
    """The trained hypernetwork changes nothing."""


@dataclass(frozen=True)
class Trajectory:
    """Match the steps of the trajectory theta_s = H(c, s) to steps of gradient descent, and keep those of retain prompts at its start.

    L_task(theta) = mean |e_theta(z, t, p) - (e_m - gamma (e_p - e_m))|^2,    g_s = dL_task / dtheta_s, constant
    L_remove = |H(c, s+1) - H(c, s) + eta g_s|^2,    L_retain = |H(c_r, t_r) - H(c_r, 0)|^2

    with s and t_r drawn uniformly from {0..S-1} and {0..S}.

    MATCHING: one optimizer, L = lambda_remove L_remove + lambda_retain L_retain, both sums over theta. Nothing else of the
    task reaches the hypernetwork.
    JOINT: both are means over theta. L_task(H(c, s)) is added to the first, with its whole gradient, and L_retain has an
    optimizer and steps of its own, unless ``separate_retention`` is off.
    """

    config: ObjectiveConfig
    hypernetwork: Hypernetwork
    denoiser: DenoiserLike
    material: Material
    eta: float

    @property
    def phases(self) -> tuple[Phase, ...]:
        if self._is_joint and self.config.separate_retention:
            retention = Phase(self.retain, self.config.retain_steps, self.config.retain_lr)
            return Phase(self.remove), retention
        return (Phase(self.remove_and_retain),)

    def remove_and_retain(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        """Both in one step."""
        removed = self.remove(batch_size, generator, parts)
        retained = self.retain(batch_size, generator, parts)
        return {**removed, **retained, "loss": removed["loss"] + retained["loss"]}

    def remove(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        """Add the gradient for target prompts."""
        batch = draw(self.material.forget, batch_size, generator)
        s = torch.randint(self.num_steps, (batch_size,), generator=generator)
        erase = matching = 0.0
        for part, share in cut(batch_size, parts):
            rows, at = batch.part(part), s[part]
            # Made apart: the gradient of what is the same at both then cancels to the last bit. Adam would enlarge a rest.
            now, after = (self._theta(rows.text.pooled, step) for step in (at, at + 1))
            task, g = self.task_gradient(rows, now)
            squared = self._squared(after - now + self.eta * g)
            loss = self.config.remove_weight * squared
            erase += share * task
            matching += share * float(squared.detach())
            if self._is_joint:
                loss = loss + (now * g).sum(dim=1).mean()  # has the gradient of L_task(H(c, s))
            (share * loss).backward()
        value = self.config.remove_weight * matching + (erase if self._is_joint else 0.0)
        return {"loss": value, "erase": erase, "matching": matching}

    def retain(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        """Add the gradient for retain prompts, ``retain_batch_size`` of them."""
        embeddings = self.material.draw_retained(self.config.retain_batch_size, generator)
        t = torch.randint(self.num_steps + 1, (len(embeddings),), generator=generator)

        def distance(part: slice) -> Tensor:
            at = t[part]
            moved, start = (self._theta(embeddings[part], s) for s in (at, torch.zeros_like(at)))
            return self._squared(moved - start)

        retain = accumulate(len(embeddings), parts, distance, self.config.retain_weight)
        return {"loss": self.config.retain_weight * retain, "retain": retain}

    def measure(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        return measure_erasing(
            lambda batch: self.task_loss(batch, self._theta(batch.text.pooled, self.num_steps)),
            self.material.forget,
            self.config.negative_guidance,
            batch_size,
            generator,
            parts,
        )

    @property
    def num_steps(self) -> int:
        """S."""
        return self.hypernetwork.config.num_steps

    def start(self) -> Tensor:
        """theta_0, (1, size); the same for every prompt."""
        with torch.no_grad():
            return self._theta(self.material.forget.pooled[:1], 0)

    def task_loss(self, batch: Batch, theta: Tensor) -> Tensor:
        """L_task of a theta for every sample, (batch, size)."""
        factors = to_factors(theta, self.hypernetwork.targets, self.hypernetwork.config.rank)
        prediction = self.denoiser.predict(batch.latents, batch.sigmas, batch.text, factors)
        wanted = end(batch, self.config.negative_guidance)
        return torch.nn.functional.mse_loss(prediction.float(), wanted)

    def task_gradient(self, batch: Batch, theta: Tensor) -> tuple[float, Tensor]:
        """L_task, and the gradient of each sample's own, (batch, size)."""
        leaf = theta.detach().requires_grad_()
        loss = self.task_loss(batch, leaf)
        loss.backward()
        if leaf.grad is None:
            raise RuntimeError("The denoiser's prediction does not depend on the LoRA.")
        return float(loss.detach()), leaf.grad * len(leaf)

    @property
    def _is_joint(self) -> bool:
        return self.config.name is ObjectiveName.JOINT

    def _squared(self, difference: Tensor) -> Tensor:
        """Squared length, mean over the batch; over theta a sum in the paper, a mean in the authors' code."""
        squared = difference.square()
        return squared.mean() if self._is_joint else squared.sum(dim=1).mean()

    def _theta(self, embeddings: Tensor, s: Tensor | int) -> Tensor:
        """H(c, s) as a vector, (batch, size)."""
        if isinstance(s, Tensor):
            s = s.to(embeddings.device)
        return to_vector(self.hypernetwork.generate(embeddings, s))


def to_vector(factors: LoRAFactors) -> Tensor:
    """theta, (batch, size): down and scale * up of every layer in a row.

    Of HEADS these are the authors' A (alpha in it, as in theirs) and B; their vector repeats alpha(s) by itself, one number
    a layer beside in_features * rank of A. Of ATOMS they are the atoms and s/S a(c, s) up: only the latter moves with s.
    """
    scale = factors.scale.view(-1, 1, 1)
    parts = [*factors.down, *(scale * up for up in factors.up)]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def to_factors(theta: Tensor, targets: Sequence[TargetModule], rank: int) -> LoRAFactors:
    """The factors that a vector stands for, with scale 1: at s = 0, too, they have a gradient."""
    shapes = [(rank, target.in_features) for target in targets]
    shapes += [(target.out_features, rank) for target in targets]
    parts = theta.split([rows * columns for rows, columns in shapes], dim=1)
    tensors = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
    down, up = tensors[: len(targets)], tensors[len(targets) :]
    return LoRAFactors(tuple(targets), tuple(down), tuple(up), theta.new_ones(len(theta)))


def check_alive(config: ObjectiveConfig, metrics: Mapping[str, float]) -> None:
    """Make sure that a network trained by matching alone does something.

    Args:
        metrics: ``erase_loss``, ``erase_loss_without`` and ``lora_norm_target`` of the finished network.

    Raises:
        InertError: it does not.
    """
    loss, without = metrics["erase_loss"], metrics["erase_loss_without"]
    if config.name is not ObjectiveName.MATCHING or loss <= ALIVE * without:
        return
    if config.eta == "auto":
        remedy = "Train longer (train.steps, train.lr), or lower objective.retain_weight"
    else:
        remedy = f"The steps to match are eta times the gradient, and eta is {config.eta:g}. Set objective.eta to auto"
    raise InertError(
        f"The hypernetwork does not erase: with its LoRA (mean norm {metrics['lora_norm_target']:.2g} for target prompts) "
        f"the erase loss is {loss:.4g}, without {without:.4g}. No pack was written. {remedy}, "
        "or use objective.name direct or joint."
    )
