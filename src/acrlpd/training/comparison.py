"""Comparison of two policies on the same seeds: what only one of them solved, and how certain the difference is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from acrlpd.envs.rollout import Rollout


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A second policy against a first. Only seeds that both finished count; an episode lost by either does not."""

    episodes: int
    first_successes: int
    second_successes: int
    only_first: int  # episodes that the first policy alone solved
    only_second: int
    difference: float  # success rate of the second minus that of the first
    low: float  # paired bootstrap, 95 % interval of the difference
    high: float
    p_value: float  # exact McNemar: that only_first and only_second are this unequal by chance

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.first_successes} against {self.second_successes} of {self.episodes}: difference "
            f"{self.difference:+.0%} [{self.low:+.0%}, {self.high:+.0%}], solved by one alone {self.only_first} and "
            f"{self.only_second}, p = {self.p_value:.2g}"
        )


def compare(first: Sequence[Rollout], second: Sequence[Rollout], *, num_resamples: int = 10_000) -> Comparison:
    """Compare rollouts in pairs of one seed; the interval resamples pairs, which keeps the effect of the seed."""
    after = {each.seed: each.success for each in second}
    pairs = [(each.success, after[each.seed]) for each in first if each.seed in after]
    if not pairs:
        raise ValueError("the two evaluations share no seed, so nothing can be compared: give both the same first_seed")
    a, b = np.array(pairs, bool).T
    only_first, only_second = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    low, high = bootstrap_interval(a, b, num_resamples=num_resamples)
    return Comparison(
        episodes=len(pairs),
        first_successes=int(a.sum()),
        second_successes=int(b.sum()),
        only_first=only_first,
        only_second=only_second,
        difference=(only_second - only_first) / len(pairs),
        low=low,
        high=high,
        p_value=mcnemar(only_first, only_second),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value (McNemar 1947): where the policies differ, each should win half of the time.

    ``mcnemar(0, 5)`` is 2 / 2**5; without a difference it is 1.
    """
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap_interval(
    first: Bool[np.ndarray, " n"], second: Bool[np.ndarray, " n"], *, num_resamples: int, coverage: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of mean(second - first) over resampled pairs (Efron 1979), with fixed draws."""
    difference = second.astype(np.int64) - first.astype(np.int64)
    n = len(difference)
    shares = [np.mean(difference == value) for value in (-1, 0, 1)]
    # Resampled pairs take three values only, so their counts are multinomial: no n by num_resamples array is needed.
    counts = np.random.default_rng(0).multinomial(n, shares, size=num_resamples)
    low, high = np.quantile((counts[:, 2] - counts[:, 0]) / n, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)
