"""A model that erases by itself: whatever conditioning reaches its sampler is read and gets the LoRA that it asks for.

The guard travels in the model's ``transformer_options``. When sampling starts, ``apply`` asks it about every conditioning of the run,
so that none can be left out by wiring.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..checkpoint import Pack
from ..families import Branch
from .embed import read_entry
from .generate import describe, write_entry
from .payload import KEY, NEGATIVE_ROLES, Payload

log = logging.getLogger("unhype")

GUARDS = "unhype_guards"
"""Of the guards in ``transformer_options``."""

Conds = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Guard:
    """One pack over a whole model.

    Attributes:
        strict: refuse conditionings whose text is not known in full, rather than warn.
        everywhere: read negative conditionings too.
    """

    pack: Pack
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    strict: bool = False
    everywhere: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be a finite number, got {self.strength}.")
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"start_percent must not be larger than end_percent, got {self.start_percent} and {self.end_percent}."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        """Itself: it never changes, and the host copies a model's options in depth at every clone."""
        return self

    def cover(self, conds: Conds, *, guidance_scale: float = math.inf) -> Conds:
        """The conditionings of a sampling run, by role, each with the LoRA that its text asks for.

        Args:
            guidance_scale: the smallest of the run; below 1 the negative prompt is drawn, so it is covered too.

        Raises:
            ValueError: ``strict``, and the text of one is not known in full.
        """
        branch = Branch.ALL if self.everywhere or guidance_scale < 1 else self.pack.info.spec.branch
        covered, lines = {}, []
        for role, entries in conds.items():
            if role in NEGATIVE_ROLES and branch is not Branch.ALL:
                covered[role] = entries
                continue
            covered[role] = []
            for index, entry in enumerate(entries):
                payload, line = self._read(entry, f"{role} {index + 1}", branch)
                if payload is not None:
                    # In place of what was wired by hand with this pack, however weakly.
                    own = tuple(p for p in entry.get(KEY, ()) if p.owner != self.pack.name)
                    entry = {**entry, KEY: (*own, payload)}
                covered[role].append(entry)
                lines.append(line)
        log.info("UnHype Guard, %s: %s", self.pack.name, "; ".join(lines))
        return covered

    def _read(
        self, entry: Mapping[str, Any], where: str, branch: Branch
    ) -> tuple[Payload | None, str]:
        """The LoRA of one conditioning, if any, and a line that says what was found."""
        found = read_entry(
            (entry.get("cross_attn"), entry),
            self.pack.info.spec.embedding,
            tokens=self.pack.gate.config.tokens,
        )
        if found is None or not found.complete:
            problem = (
                f"UnHype Guard, {self.pack.name}: conditioning {where} "
                + ("can't be read" if found is None else "can be read only in part")
                + ": it was not encoded by the CLIP that the guard gives out, that CLIP was changed behind the guard, or nodes "
                "changed the conditioning in ways that can't be followed. Encode prompts with the guard's own CLIP."
            )
            if self.strict:
                raise ValueError(f"{problem} Nothing was sampled, because the guard is strict.")
            warn_once(problem)
        if found is None:
            return None, f"{where} unread"
        generated = write_entry(self.pack, found)
        line = f"{where} {describe(self.pack, generated)}"
        if not generated.factors.active.any():
            return None, line
        payload = Payload.of(
            self.pack.name,
            branch,
            generated,
            self.strength,
            self.start_percent,
            self.end_percent,
        )
        return payload, line


@cache
def warn_once(problem: str) -> None:
    """Say it in the log, the first time."""
    log.warning(problem)
