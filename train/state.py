"""The state of an unfinished run, beside its output: safetensors with a JSON header, no pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ConfigError

KEY, STEP = "unhype.run", "unhype.step"


def state_path(output: Path) -> Path:
    """Where the state of the run that writes ``output`` is kept."""
    return output.with_suffix(".state.safetensors")


def pool_path(output: Path, process: int = 0) -> Path:
    """Where a process of it keeps states z_t and predictions."""
    return output.with_suffix(f".pool{process or ''}.safetensors")


def eta_path(output: Path, process: int = 0) -> Path:
    """Where it keeps an eta that was measured."""
    return output.with_suffix(f".eta{process or ''}.safetensors")


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file that appears under its name only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
            part,
            metadata,
        )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that ``write`` wrote.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}). Delete it to start the run from the beginning."
        ) from error


def save_state(
    path: Path,
    *,
    key: str,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> None:
    """Write all that the loop needs to go on as if it had never stopped."""
    tensors = {
        f"{part}/{name}": value
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }
    for part, optimizer in optimizers.items():
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                tensors[f"{part}/{index}/{name}"] = torch.as_tensor(value)
    write(path, tensors, {KEY: key, STEP: str(step)})


def load_state(
    path: Path,
    *,
    key: str,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> int:
    """Continue from ``path``; the step to go on with, 0 if there is no state.

    Raises:
        ConfigError: the state is damaged, or of another run.
    """
    if not path.exists():
        return 0
    tensors, metadata = read(path)
    if metadata.get(KEY) != key:
        raise ConfigError(
            f"{path} belongs to an unfinished run with other settings or another model. Delete it to start afresh, "
            "give another output, or go back to those settings to finish it."
        )
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*modules, *optimizers)}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    for part, module in modules.items():
        module.load_state_dict(parts[part])
    for part, optimizer in optimizers.items():
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts[part].items():
            index, _, entry = name.partition("/")
            moments.setdefault(int(index), {})[entry] = value
        # Its settings are those of the run, which the key stands for.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(metadata[STEP])
