"""Find evaluators by name: those of this package and of any other that registers some."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from types import ModuleType

import numpy as np
from torch import Tensor

from .base import Evaluator

GROUP = "unhype.evaluators"
"""The entry points by which packages offer evaluators; each is a ``Factory``."""

Factory = Callable[[str, Sequence[str]], Evaluator]
"""From what follows the colon in a spec, and the labels to tell apart, to an evaluator."""


class EvaluatorError(ValueError):
    """There is no such evaluator, its package is not installed, or it does not see what was asked."""


def find_evaluator(spec: str, labels: Sequence[str]) -> Evaluator:
    """The evaluator that a spec names.

    Args:
        spec: ``name`` or ``name:argument``, for example ``nudenet`` or ``clip:/path/to/folder``.
        labels: what pictures may show; detectors have their own labels, and these must be among them.

    Raises:
        EvaluatorError: there is none of that name, its package is not installed, or it does not know a label.
        FileNotFoundError: files that it needs are missing.
    """
    name, _, argument = spec.partition(":")
    found = {point.name: point for point in entry_points(group=GROUP)}
    if not found:
        raise EvaluatorError(
            f"No evaluator is registered, so {name!r} cannot be found. Install this package: pip install -e '.[train]' in "
            "the folder that holds pyproject.toml."
        )
    if name not in found:
        raise EvaluatorError(
            f"Unknown evaluator {name!r}. Known: {', '.join(sorted(found))}. Another package's must be installed."
        )
    try:
        factory: Factory = found[name].load()
    except (ImportError, AttributeError) as error:
        raise EvaluatorError(
            f"Evaluator {name!r} ({found[name].value}) cannot be loaded: {error}. Install its package again."
        ) from error
    return factory(argument, labels)


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a package that only one evaluator needs; ``EvaluatorError`` naming this package's extra if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EvaluatorError(
            f"The package {module} cannot be imported: {error}. Install it: pip install -e '.[{extra}]' in the folder that "
            "holds pyproject.toml."
        ) from error


def check_labels(name: str, own: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse labels that an evaluator with labels of its own does not have."""
    unknown = [label for label in wanted if label not in own]
    if unknown:
        raise EvaluatorError(
            f"{name} cannot see {unknown[0]!r}. It sees: {', '.join(own)}. For other labels use clip:FOLDER."
        )


def check_argument(name: str, argument: str) -> None:
    """Refuse an argument to an evaluator that takes none."""
    if argument:
        raise EvaluatorError(f"{name} takes no argument, got {argument!r}. Write just {name}.")


def to_bytes(pictures: Tensor) -> np.ndarray:
    """(n, 3, height, width) in [0, 1] as an image file would hold them: (n, height, width, 3) of bytes, RGB."""
    return (pictures * 255).round().clamp(0, 255).byte().movedim(1, -1).contiguous().cpu().numpy()
