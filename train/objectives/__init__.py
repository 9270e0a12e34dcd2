"""What the hypernetwork is trained towards."""

from __future__ import annotations

from unhype.hypernetwork import Hypernetwork

from ..config import ObjectiveConfig, ObjectiveName
from ..denoiser import DenoiserLike
from .base import MEASURED_BATCHES, Material, Objective, Phase, dial
from .direct import Direct
from .oracle import Descent, find_eta
from .refinement import Refinement
from .trajectory import InertError, Trajectory, check_alive

__all__ = [
    "MEASURED_BATCHES",
    "Descent",
    "Direct",
    "InertError",
    "Material",
    "Objective",
    "Phase",
    "Refinement",
    "Trajectory",
    "check_alive",
    "dial",
    "find_eta",
    "make_objective",
]


def make_objective(
    config: ObjectiveConfig,
    *,
    hypernetwork: Hypernetwork,
    denoiser: DenoiserLike,
    material: Material,
) -> Objective:
    """The objective that the config names; with eta ``auto`` it has eta 1 until that of :func:`find_eta` replaces it."""
    match config.name:
        case ObjectiveName.DIRECT:
            return Direct(config, hypernetwork, denoiser, material)
        case ObjectiveName.JOINT | ObjectiveName.MATCHING:
            eta = 1.0 if config.eta == "auto" else config.eta
            return Trajectory(config, hypernetwork, denoiser, material, eta)
        case ObjectiveName.CLOSED_FORM:
            raise ValueError("Edits are solved for before they are trained: see train.closed_form.")
