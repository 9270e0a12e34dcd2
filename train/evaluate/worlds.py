"""Worlds to compare methods in, found by name among the installed plug-ins."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from .base import World

GROUP = "unhype.worlds"


class WorldError(ValueError):
    """There is no such world, or it cannot be used."""


def find_world(name: str) -> World:
    """The world that a package registered under ``name`` in the entry-point group ``unhype.worlds``.

    Raises:
        WorldError: none has that name.
    """
    known: dict[str, EntryPoint] = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        raise WorldError(
            f"There is no world {name!r}. Known: {', '.join(sorted(known)) or 'none; run `make env` to install them'}."
        )
    make = known[name].load()
    return make()
