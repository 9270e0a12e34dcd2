"""The state of an unfinished run, beside its output: safetensors with a JSON header, no pickle."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ConfigError

KEY, STEP, AT_ONCE = "unhype.run", "unhype.step", "unhype.at_once"


@dataclass(frozen=True)
class Position:
    """Where a run stands: the steps done, and how many samples it computes at once, if not all of a step."""

    step: int = 0
    at_once: int | None = None


def state_path(output: Path) -> Path:
    """Where the state of the run that writes ``output`` is kept."""
    return output.with_suffix(".state.safetensors")


def pool_path(output: Path, process: int = 0) -> Path:
    """Where a process of it keeps states z_t and predictions."""
    return output.with_suffix(f".pool{process or ''}.safetensors")


def eta_path(output: Path, process: int = 0) -> Path:
    """Where it keeps an eta that was measured."""
    return output.with_suffix(f".eta{process or ''}.safetensors")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let an error within say which file could not be written, and what to do."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path} cannot be written ({error}). Is the disk full? Make room, then run the same command again: it goes on "
            "from the last state that was saved."
        ) from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file within, so that it appears as ``path`` only when whole.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file that appears under its name only when whole.

    Raises:
        OSError: it cannot be written.
    """
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with written_whole(path) as part:
        save_file(copies, part, metadata)


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
    position: Position,
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
    at_once = {AT_ONCE: str(position.at_once)} if position.at_once else {}
    write(path, tensors, {KEY: key, STEP: str(position.step), **at_once})


def load_state(
    path: Path,
    *,
    key: str,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> Position:
    """Continue from ``path``; where to go on, at step 0 if there is no state.

    Raises:
        ConfigError: the state is damaged, or of another run.
    """
    if not path.exists():
        return Position()
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
    at_once = metadata.get(AT_ONCE)
    return Position(int(metadata[STEP]), int(at_once) if at_once else None)
