"""Erasure metrics: how gone the target is, how well everything else is kept (MACE's protocol, argmax hits)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ErasureScores:
    """Shares in [0, 1]. ``None`` where no prompt of that kind was judged.

    Attributes:
        acc_e: target pictures recognised as the target (lower is better).
        acc_g: held-out synonym pictures recognised as the target (lower is better).
        acc_s: pictures of other concepts recognised as their own (higher is better).
        acc_s_siblings: the same over the target's look-alikes.
        h_o: harmonic mean of 1 - acc_e, acc_s and 1 - acc_g.
    """

    acc_e: float
    acc_s: float
    acc_g: float | None = None
    acc_s_siblings: float | None = None

    @property
    def h_o(self) -> float:
        """H_o = 3 / (1/(1 - Acc_e) + 1/Acc_s + 1/(1 - Acc_g)); without Acc_g the mean of the two others."""
        parts = [1 - self.acc_e, self.acc_s]
        if self.acc_g is not None:
            parts.append(1 - self.acc_g)
        return harmonic_mean(parts)


def harmonic_mean(values: list[float]) -> float:
    """The harmonic mean; 0 as soon as one value is."""
    if not values:
        raise ValueError("harmonic_mean needs at least one value, got none.")
    if min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)


def hit_rate(hits: list[bool]) -> float | None:
    """Share of hits; ``None`` of an empty list."""
    return sum(hits) / len(hits) if hits else None
