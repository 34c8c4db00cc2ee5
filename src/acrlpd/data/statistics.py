"""Normalization statistics of recorded data: exact in memory, else in as few passes as accurate quantiles take.

Dimensions that hardly or rarely move are widened (``with_floor``), which openpi does not do.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from acrlpd.data import chunks
from acrlpd.data.episodes import EpisodeSource, EpisodeStore
from acrlpd.data.normalize import EPSILON, NormStats, quantiles_of, ranges
from acrlpd.data.transforms import Transform
from acrlpd.types import Episode, typed

MIN_STD = 1e-3  # default floor, in raw units
MAX_NORMALIZED = 10.0  # a dimension is widened until no value seen normalizes beyond this
FAULTY = 100.0  # values farther out than this many half widths (q99 - q01) / 2 are probably recording faults
MAX_AWAY = 5.0  # max distance between the middles of statistics and data that fit each other, in half widths
MAX_WIDER, MAX_NARROWER = 10.0, 30.0  # max ratios of their half widths; degrees for radians would be a factor of 57
HARDLY = 1e-2  # raw units; a half width below this does not reveal units and may have been widened (``with_floor``)
FEW = 5  # up to this many values far out, or a thousandth of all, count as faults; more are rare motions
MAX_RECOUNTS = 8  # max number of passes that count values in increasingly fine bins


class RunningStats:
    """Statistics of more vectors than fit in memory, as in openpi: moments are exact, quantiles use a histogram.

    With ``bounds`` (min and max of each dimension, known beforehand) no count moves to another bin, and a quantile is
    off by less than a bin, which is a 5000th of the range. Moments are then taken about the middle of the range, so a
    small spread far from 0 does not cancel numerically. Without ``bounds`` the range grows as in openpi, and every
    growth may shift the counts by a bin.
    """

    def __init__(self, *, num_bins: int = 5000, bounds: tuple[np.ndarray, np.ndarray] | None = None):
        self._num_bins = num_bins
        self._bounds = bounds
        self._count = 0.0

    @typed
    def update(self, batch: Float[np.ndarray, "*batch d"], weight: float = 1.0) -> None:
        """Add vectors that count with ``weight`` each; every axis but the last is a batch axis."""
        batch = batch.reshape(-1, batch.shape[-1])
        if len(batch) == 0:
            return
        low, high = batch.min(axis=0).astype(np.float64), batch.max(axis=0).astype(np.float64)
        if self._count == 0:
            self._mean = np.zeros_like(batch[0])
            self._mean_of_squares = np.zeros_like(batch[0])
            self._origin = np.zeros_like(batch[0])
            if self._bounds is not None:
                low, high = self._bounds
                self._origin = (low + high) / 2
            self._low, self._high = low, high
            self._counts = np.zeros((batch.shape[-1], self._num_bins))
            self._edges = self._make_edges(low - 1e-10, high + 1e-10)
        elif batch.shape[-1] != len(self._mean):
            raise ValueError(f"vectors have {batch.shape[-1]} dimensions, expected {len(self._mean)} as before")
        elif (low < self._low).any() or (high > self._high).any():
            self._widen(np.minimum(low, self._low), np.maximum(high, self._high))
        self._count += len(batch) * weight
        share = len(batch) * weight / self._count
        centred = batch - self._origin
        self._mean += (centred.mean(axis=0) - self._mean) * share
        self._mean_of_squares += (np.square(centred).mean(axis=0) - self._mean_of_squares) * share
        for dim, edges in enumerate(self._edges):
            self._counts[dim] += np.histogram(batch[:, dim], bins=edges)[0] * weight

    def result(self) -> NormStats:
        """Return the statistics. As in openpi, std is the population's and quantiles are left edges of bins."""
        if self._count < 2:
            raise ValueError(f"statistics need at least 2 vectors, got {self._count:g}")
        variance = self._mean_of_squares - np.square(self._mean)
        return NormStats(
            mean=self._origin + self._mean,
            std=np.sqrt(np.maximum(0, variance)),
            q01=self._quantile(0.01),
            q99=self._quantile(0.99),
        )

    @property
    def bin_width(self) -> Float[np.ndarray, " d"]:
        return self._edges[:, 1] - self._edges[:, 0]

    def _make_edges(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.linspace(low, high, self._num_bins + 1, axis=-1)

    def _widen(self, low: np.ndarray, high: np.ndarray) -> None:
        """Move the counts into bins over the new range, each by the left edge of its old bin.

        As in openpi, the first bin's count is lost if only the upper end moves: its left edge was 1e-10 lower.
        """
        old_edges = self._edges
        self._low, self._high = low, high
        self._edges = self._make_edges(low, high)
        for dim, edges in enumerate(self._edges):
            self._counts[dim] = np.histogram(old_edges[dim, :-1], bins=edges, weights=self._counts[dim])[0]

    def _quantile(self, q: float) -> np.ndarray:
        below = np.cumsum(self._counts, axis=1) < q * self._count
        return self._edges[np.arange(len(self._edges)), below.sum(axis=1)]  # the last edge if it is never reached


@typed
def exact(values: Float[np.ndarray, "n d"]) -> NormStats:
    """Return the statistics of vectors that fit in memory, with float64 moments and exact quantiles."""
    if len(values) < 2:
        raise ValueError(f"statistics need at least 2 vectors, got {len(values)}")
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    return NormStats(
        mean=values.mean(axis=0, dtype=np.float64),
        std=values.std(axis=0, dtype=np.float64),
        q01=q01.astype(np.float64),
        q99=q99.astype(np.float64),
    )


def with_floor(
    stats: NormStats,
    key: str,
    *,
    min_std: float = MIN_STD,
    bounds: tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]] | None = None,
    rare: Bool[np.ndarray, " d"] | None = None,
) -> NormStats:
    """Widen the statistics of dimensions that hardly or rarely move, and warn of them by name.

    If std or (q99 - q01) / 2 is below ``min_std``, both become at least ``min_std``. Otherwise a joint that stood still
    in the data would turn sensor noise at run time into huge inputs. With ``bounds``, the min and max seen, both also
    become so large that no value seen normalizes to more than ``MAX_NORMALIZED``: a gripper that closes in 0.4 % of the
    rows has both quantiles at open, and its closed position would normalize to 1000. The same applies to the quantiles
    of ``rare`` dimensions: these move, but so many values lie farther out that they are no faults. A few such values
    are no motion: including them would squeeze all others, so they stay outside. ``min_std=0`` keeps openpi's bare
    numbers.
    """
    if min_std == 0:
        return stats
    low, high = (stats.mean, stats.mean) if bounds is None else bounds
    middle, half_width = _middle(stats)
    farthest = np.maximum(high - middle, middle - low)
    enough = np.maximum(min_std, farthest / MAX_NORMALIZED)
    still = (stats.std < min_std) | (half_width < min_std)
    narrow = still if rare is None else still | rare
    faulty = ~narrow & (farthest > FAULTY * half_width)
    std = np.where(still, np.maximum(stats.std, enough), stats.std)
    q01, q99 = stats.q01, stats.q99
    if q01 is not None and q99 is not None:
        half = np.maximum(half_width, enough)
        q01, q99 = np.where(narrow, middle - half, q01), np.where(narrow, middle + half, q99)
    if narrow.any():
        warnings.warn(
            f"{key}: {_named(narrow)} hardly or rarely move; their statistics were widened to min_std={min_std:g}, and "
            f"so that no value is normalized to more than {MAX_NORMALIZED:g}. Check that this is intended.",
            stacklevel=2,
        )
    if faulty.any():
        warnings.warn(
            f"{key}: {_named(faulty)} have a few values more than {FAULTY:g} times as far out as most. Check that "
            "these are not recording errors.",
            stacklevel=2,
        )
    return NormStats(mean=stats.mean, std=std, q01=q01, q99=q99)


def _middle(stats: NormStats) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Return the middle and half width of the range of most values: from q01 to q99, or the mean and std."""
    if stats.q01 is None or stats.q99 is None:
        return stats.mean, stats.std
    return (stats.q01 + stats.q99) / 2, (stats.q99 - stats.q01) / 2


class _FarOut:
    """A counter of the values that would normalize to more than ``MAX_NORMALIZED``."""

    def __init__(self, stats: NormStats):
        self._middle, half_width = _middle(stats)
        self._limit = MAX_NORMALIZED * half_width
        self._far, self._count = np.zeros(len(stats.mean)), 0.0

    def update(self, batch: Float[np.ndarray, "n d"], weight: float = 1.0) -> None:
        self._far += np.sum(np.abs(batch - self._middle) > self._limit, axis=0) * weight
        self._count += len(batch) * weight

    @property
    def are_rare_motions(self) -> Bool[np.ndarray, " d"]:
        """The dimensions that have too many such values for these to be faults."""
        return self._far > max(FEW, self._count / 1000)


def warn_of_misfits(
    stats: Mapping[str, NormStats], data: Mapping[str, NormStats], *, where: str, of: str, quantiles: bool
) -> None:
    """Warn of dimensions that ``stats`` would not normalize to numbers of order 1.

    Examples are angles in degrees with statistics in radians (or vice versa), or a dimension that moves although the
    statistics have no spread. ``data`` has the statistics, without floors, of the data to be normalized. ``of`` is the
    name of that data, ``where`` that of the origin of ``stats``.
    """
    for key, given in stats.items():
        middle, half = (_middle if quantiles else _moments)(given)
        own_middle, own_half = (_middle if quantiles else _moments)(data[key])
        scale = half + EPSILON
        away = np.abs(own_middle - middle) > MAX_AWAY * scale
        findings = {
            "lie far outside": away | (own_half > MAX_WIDER * scale),
            "cover almost nothing of the range": ~away & (own_half > HARDLY) & (own_half * MAX_NARROWER < half),
        }
        for told, dims in findings.items():
            if dims.any():
                warnings.warn(
                    f"{where}: {key}: under these statistics {_named(dims)} of {of} {told}. Are they of the same "
                    "robot, in the same units?",
                    stacklevel=2,
                )


def _moments(stats: NormStats) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    return stats.mean, stats.std


def _named(chosen: Bool[np.ndarray, " d"]) -> str:
    return f"{chosen.sum()} of {chosen.size} dimensions ({ranges(np.flatnonzero(chosen))})"


def from_store(
    store: EpisodeStore, transform: Transform | None = None, *, horizon: int = 1, min_std: float = MIN_STD
) -> dict[str, NormStats]:
    """Return exact statistics of ``state`` and ``actions`` over all episodes in memory.

    ``transform`` runs before normalization (robot, delta actions). With it, the statistics cover, as in openpi, all
    ``horizon`` steps of the chunk at every row, including repeated last actions. That keeps num_rows * horizon *
    action size numbers in memory at once: for large sets use ``from_source`` instead.
    """
    if transform is None:
        values = {"state": store.state, "actions": store.actions}
    else:
        parts = list(_transformed(store, transform, horizon))
        values = {
            key: np.concatenate([np.reshape(part[key], (-1, part[key].shape[-1])) for part in parts])
            for key in ("state", "actions")
        }
    return {key: _of_all(value, key, min_std) for key, value in values.items()}


def _of_all(values: Float[np.ndarray, "n d"], key: str, min_std: float) -> NormStats:
    stats, bounds = exact(values), (values.min(axis=0), values.max(axis=0))
    far = _FarOut(stats)
    far.update(values)
    return with_floor(stats, key, min_std=min_std, bounds=bounds, rare=far.are_rare_motions)


def _transformed(
    store: EpisodeStore, transform: Transform | None, horizon: int, *, block: int = 256
) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, store.num_rows, block):
        rows = np.arange(start, min(start + block, store.num_rows))
        batch = chunks.gather(store, rows, horizon)
        data = {key: batch[key] for key in ("state", "actions", "image", "prompt")}
        data = data if transform is None else transform(data)
        yield {"state": data["state"], "actions": data["actions"]}


def from_source(
    source: EpisodeSource,
    transform: Transform | None = None,
    *,
    horizon: int = 1,
    num_episodes: int | None = None,
    cameras: Sequence[str] = (),
    min_std: float = MIN_STD,
) -> dict[str, NormStats]:
    """Compute the statistics of ``from_store`` for sets larger than memory: several passes, one episode at a time.

    Quantiles are off by less than a 5000th of a dimension's range. If that is too coarse, because a few values lie far
    from all others, the others are counted again in finer bins. No picture is read: a ``transform`` that expects
    ``cameras`` gets black ones. ``num_episodes`` limits the number of episodes, which are evenly spread.
    """
    options: dict[str, Any] = {"horizon": horizon, "num_episodes": num_episodes, "cameras": cameras}
    return from_sources([source], [1.0], transform, **options, min_std=min_std)


def from_sources(
    sources: Sequence[EpisodeSource],
    shares: Sequence[float],
    transform: Transform | None = None,
    *,
    horizon: int = 1,
    num_episodes: int | None = None,
    cameras: Sequence[str] = (),
    min_std: float = MIN_STD,
) -> dict[str, NormStats]:
    """Compute the statistics of ``from_source`` over several sets, weighted by their shares of a batch."""
    chosen = [_spread(source, num_episodes) for source in sources]
    weights = _weights(sources, chosen, shares) if len(sources) > 1 else [1.0]

    def weighted() -> Iterator[tuple[dict[str, np.ndarray], float]]:
        for source, indices, weight in zip(sources, chosen, weights, strict=True):
            for index in indices.tolist():
                store = EpisodeStore.from_episodes([_without_pictures(source, index, cameras)])
                for data in _transformed(store, transform, horizon):
                    rows = {key: value.reshape(-1, value.shape[-1]) for key, value in data.items()}
                    yield {key: value.astype(np.float64) for key, value in rows.items()}, weight

    low: dict[str, np.ndarray] = {}
    high: dict[str, np.ndarray] = {}
    for block, _ in weighted():
        for key, value in block.items():
            low[key] = np.minimum(low.get(key, np.inf), value.min(axis=0))
            high[key] = np.maximum(high.get(key, -np.inf), value.max(axis=0))
    running = {key: RunningStats(bounds=(low[key], high[key])) for key in low}
    for block, weight in weighted():
        for key, value in block.items():
            running[key].update(value, weight)
    found = {key: stats.result() for key, stats in running.items()}
    bin_width = {key: stats.bin_width for key, stats in running.items()}
    for _ in range(MAX_RECOUNTS):
        closer = {key: _CloserQuantiles(found[key], width, min_std) for key, width in bin_width.items()}
        if not any(each.dims.any() for each in closer.values()):
            break
        for block, weight in weighted():
            for key, value in block.items():
                closer[key].update(value, weight)
        found = {key: closer[key].improved(stats) for key, stats in found.items()}
        bin_width = {key: each.bin_width for key, each in closer.items()}
    if min_std == 0:
        return found
    far = {key: _FarOut(stats) for key, stats in found.items()}
    for block, weight in weighted():
        for key, value in block.items():
            far[key].update(value, weight)
    return {
        key: with_floor(stats, key, min_std=min_std, bounds=(low[key], high[key]), rare=far[key].are_rare_motions)
        for key, stats in found.items()
    }


def _weights(
    sources: Sequence[EpisodeSource], chosen: Sequence[Int[np.ndarray, " n"]], shares: Sequence[float]
) -> list[float]:
    """Return the weight of a row of each source; the weights of all rows average to 1."""
    steps = [int(source.lengths[indices].sum()) for source, indices in zip(sources, chosen, strict=True)]
    return [share * sum(steps) / own for share, own in zip(shares, steps, strict=True)]


def _spread(source: EpisodeSource, count: int | None) -> Int[np.ndarray, " n"]:
    """Return the indices of ``count`` evenly spread episodes; None gives all."""
    spread = np.linspace(0, source.num_episodes - 1, min(count or source.num_episodes, source.num_episodes))
    return np.unique(spread.round().astype(int))


class _CloserQuantiles:
    """A second count for dimensions with too few bins between q01 and q99, in finer bins over just that range."""

    def __init__(self, stats: NormStats, bin_width: Float[np.ndarray, " d"], min_std: float, *, num_bins: int = 5000):
        self._q01, self._q99 = quantiles_of(stats)
        self.dims = bin_width > np.maximum(self._q99 - self._q01, max(min_std, 1e-6)) / 50
        self._edges = np.linspace(self._q01 - bin_width, self._q99 + 2 * bin_width, num_bins + 1, axis=-1)
        self.bin_width = np.where(self.dims, self._edges[:, 1] - self._edges[:, 0], bin_width)
        self._counts = np.zeros((len(self._edges), num_bins + 1))  # the first one counts all values below the range
        self._count = 0.0

    def update(self, batch: Float[np.ndarray, "n d"], weight: float = 1.0) -> None:
        self._count += len(batch) * weight
        for dim in np.flatnonzero(self.dims):
            self._counts[dim, 0] += np.sum(batch[:, dim] < self._edges[dim, 0]) * weight
            self._counts[dim, 1:] += np.histogram(batch[:, dim], bins=self._edges[dim])[0] * weight

    def improved(self, stats: NormStats) -> NormStats:
        q01, q99 = (np.where(self.dims, self._at(q), old) for q, old in ((0.01, self._q01), (0.99, self._q99)))
        return dataclasses.replace(stats, q01=q01, q99=q99)

    def _at(self, q: float) -> Float[np.ndarray, " d"]:
        below = np.cumsum(self._counts, axis=1) < q * self._count
        return self._edges[np.arange(len(self._edges)), np.maximum(below.sum(axis=1) - 1, 0)]


def _without_pictures(source: EpisodeSource, index: int, cameras: Sequence[str]) -> Episode:
    info = source.info(index)
    return Episode(
        state=source.window(index, "state", 0, info.length),
        actions=source.window(index, "actions", 0, info.length),
        rewards=np.zeros(info.length, np.float32),
        terminals=np.zeros(info.length, bool),
        task=info.task,
        images={camera: np.zeros((info.length, 1, 1, 3), np.uint8) for camera in cameras},
        success=info.success,
        source=info.source,
    )


@typed
def bounds_stats(low: Float[np.ndarray, " d"], high: Float[np.ndarray, " d"]) -> NormStats:
    """Return statistics that map [low, high] to [-1, 1] in both formulas, for simulators with bounded actions."""
    low, high = low.astype(np.float64), high.astype(np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (high - low > 2 * EPSILON).all()):
        raise ValueError(f"bounds must be finite with low < high, got low {low.tolist()}, high {high.tolist()}")
    # both formulas add EPSILON to the width; subtract it here, so that the bounds map to -1 and 1
    return NormStats(mean=(low + high) / 2, std=(high - low) / 2 - EPSILON, q01=low, q99=high - EPSILON)
