"""Normalization statistics of recorded data, in one pass over it: exact moments, and exact quantiles of their tails.

Dimensions that hardly or rarely move are widened (``with_floor``), which openpi does not do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from acrlpd.data import chunks
from acrlpd.data.store.episodes import EpisodeSource, EpisodeStore, whole_episode
from acrlpd.data.view.normalize import EPSILON, NormStats, ranges
from acrlpd.data.view.transforms import Transform
from acrlpd.types import typed

MIN_STD = 1e-3  # default floor, in raw units
MAX_NORMALIZED = 10.0  # a dimension is widened until no value seen normalizes beyond this
FAULTY = 100.0  # values farther out than this many half widths (q99 - q01) / 2 are probably recording faults
MAX_AWAY = 5.0  # max distance between the middles of statistics and data that fit each other, in half widths
MAX_WIDER, MAX_NARROWER = 10.0, 30.0  # max ratios of their half widths; degrees for radians would be a factor of 57
HARDLY = 1e-2  # raw units; a half width below this does not reveal units and may have been widened (``with_floor``)
FEW = 5  # up to this many values far out, or a thousandth of all, count as faults; more are rare motions
TAIL = 0.01  # the share of the values below q01, and above q99
SORTED_AT_ONCE = 1 << 16  # min number of vectors to look through for the outermost ones


class Moments:
    """Number, range, mean and standard deviation of vectors, by dimension.

    Blocks are merged by their means and variances, so a small spread far from 0 does not cancel numerically.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.low: np.ndarray = np.array(np.inf)
        self.high: np.ndarray = np.array(-np.inf)
        self.mean: np.ndarray = np.zeros(())
        self._variance: np.ndarray = np.zeros(())

    def add(self, values: Float[np.ndarray, "n d"], weight: float = 1.0) -> None:
        """Add vectors that count with ``weight`` each."""
        self.low = np.minimum(self.low, values.min(axis=0))
        self.high = np.maximum(self.high, values.max(axis=0))
        self.count += len(values) * weight
        share = len(values) * weight / self.count
        away = values.mean(axis=0, dtype=np.float64) - self.mean
        wider = values.var(axis=0, dtype=np.float64) - self._variance
        self._variance = self._variance + wider * share + np.square(away) * share * (1 - share)
        self.mean = self.mean + away * share

    @property
    def std(self) -> Float[np.ndarray, " d"]:
        """The standard deviation of the population."""
        return np.sqrt(self._variance)


class Summary:
    """The statistics of vectors after one pass over them.

    Besides moments it keeps the lowest and the highest values, about one in a hundred each: these give both quantiles
    exactly, and the number of values far outside of them. ``total`` is the sum of the weights of all vectors to come;
    the weights average to 1.
    """

    def __init__(self, total: float):
        self.moments = Moments()
        self._total = total
        self._outermost: dict[float, _Outermost] = {}  # by weight

    def add(self, values: Float[np.ndarray, "n d"], weight: float = 1.0) -> None:
        """Add vectors that count with ``weight`` each."""
        self.moments.add(values, weight)
        if weight not in self._outermost:
            self._outermost[weight] = _Outermost(math.ceil(TAIL * self._total / weight) + 1)
        self._outermost[weight].add(values)

    def stats(self) -> NormStats:
        """Return mean, standard deviation and quantiles."""
        if self.moments.count < 2:
            raise ValueError(f"statistics need at least 2 vectors, got {self.moments.count:g}")
        if len(self._outermost) == 1:
            (outermost,) = self._outermost.values()
            q01, q99 = outermost.quantile(TAIL), outermost.quantile(1 - TAIL)
        else:
            q01, q99 = self._weighted_quantiles()
        return NormStats(self.moments.mean, self.moments.std, q01.astype(np.float64), q99.astype(np.float64))

    def floored(self, key: str, min_std: float) -> NormStats:
        """Return the statistics with a floor, see ``with_floor``."""
        stats = self.stats()
        if min_std == 0:
            return stats
        bounds = self.moments.low, self.moments.high
        return with_floor(stats, key, min_std=min_std, bounds=bounds, rare=self._rare_motions(stats))

    def _rare_motions(self, stats: NormStats) -> Bool[np.ndarray, " d"]:
        """Return the dimensions in which too many values for faults would normalize to more than ``MAX_NORMALIZED``.

        All of these are beyond the quantiles, so they are among the outermost ones.
        """
        middle, half_width = _middle(stats)
        far = sum(
            weight * np.sum(np.abs(each.values - middle) > MAX_NORMALIZED * half_width, axis=0)
            for weight, each in self._outermost.items()
        )
        return far > max(FEW, self.moments.count / 1000)

    def _weighted_quantiles(self) -> np.ndarray:
        """Return the lowest values up to which the weights add up to each share of all."""
        kept = [(each.values, weight * each.counts) for weight, each in self._outermost.items()]
        values, weights = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        return np.quantile(values, [TAIL, 1 - TAIL], axis=0, weights=weights, method="inverted_cdf")


class _Outermost:
    """The ``num`` lowest and the ``num`` highest values of each dimension, of vectors of one weight."""

    def __init__(self, num: int):
        self._num = num
        self._blocks: list[np.ndarray] = []
        self._waiting = self._count = 0

    def add(self, values: Float[np.ndarray, "n d"]) -> None:
        self._blocks.append(values)
        self._count += len(values)
        self._waiting += len(values)
        if self._waiting > max(2 * self._num, SORTED_AT_ONCE):
            self._blocks, self._waiting = [self.values], 0

    @property
    def values(self) -> Float[np.ndarray, "n d"]:
        """The values kept, with the lower ones first."""
        values = np.concatenate(self._blocks)
        if len(values) > 2 * self._num:
            values = np.partition(values, (self._num - 1, len(values) - self._num), axis=0)
            values = np.concatenate([values[: self._num], values[-self._num :]])
        return values

    @property
    def counts(self) -> Float[np.ndarray, " n"]:
        """The number of values that each of ``values`` stands for; those in between count as the highest low one."""
        counts = np.ones(len(self.values))
        counts[min(self._num, len(counts)) - 1] += self._count - len(counts)
        return counts

    def quantile(self, share: float) -> Float[np.ndarray, " d"]:
        """Return what ``numpy.quantile`` returns for all values, for a share in one of the tails."""
        values = np.sort(self.values, axis=0)
        place = (self._count - 1) * share
        first = math.floor(place)
        shift = 0 if share < 0.5 else len(values) - self._count  # the upper tail counts from the end
        before, after = values[first + shift], values[min(first + 1, self._count - 1) + shift]
        step, past = after - before, np.float64(place - first)
        return before + step * past if past < 0.5 else after - step * (1 - past)


class RunningStats:
    """openpi's statistics of more vectors than fit in memory: quantiles use a histogram of the range so far.

    Every growth of the range may shift the counts by a bin. LeRobot's files have such numbers; for pictures, of which
    ``Summary`` would keep too many values, they are good enough.
    """

    def __init__(self, *, num_bins: int = 5000):
        self._num_bins = num_bins
        self._count = 0

    @typed
    def update(self, batch: Float[np.ndarray, "*batch d"]) -> None:
        """Add vectors; every axis but the last is a batch axis."""
        batch = batch.reshape(-1, batch.shape[-1])
        if len(batch) == 0:
            return
        low, high = batch.min(axis=0).astype(np.float64), batch.max(axis=0).astype(np.float64)
        if self._count == 0:
            self._mean = np.zeros_like(batch[0])
            self._mean_of_squares = np.zeros_like(batch[0])
            self.low, self.high = low, high
            self._counts = np.zeros((batch.shape[-1], self._num_bins))
            self._edges = self._make_edges(low - 1e-10, high + 1e-10)
        elif batch.shape[-1] != len(self._mean):
            raise ValueError(f"vectors have {batch.shape[-1]} dimensions, expected {len(self._mean)} as before")
        elif (low < self.low).any() or (high > self.high).any():
            self._widen(np.minimum(low, self.low), np.maximum(high, self.high))
        self._count += len(batch)
        share = len(batch) / self._count
        self._mean += (batch.mean(axis=0) - self._mean) * share
        self._mean_of_squares += (np.square(batch).mean(axis=0) - self._mean_of_squares) * share
        for dim, edges in enumerate(self._edges):
            self._counts[dim] += np.histogram(batch[:, dim], bins=edges)[0]

    def result(self) -> NormStats:
        """Return the statistics. As in openpi, std is the population's and quantiles are left edges of bins."""
        if self._count < 2:
            raise ValueError(f"statistics need at least 2 vectors, got {self._count}")
        variance = self._mean_of_squares - np.square(self._mean)
        std = np.sqrt(np.maximum(0, variance))
        return NormStats(mean=self._mean, std=std, q01=self._quantile(TAIL), q99=self._quantile(1 - TAIL))

    def _make_edges(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.linspace(low, high, self._num_bins + 1, axis=-1)

    def _widen(self, low: np.ndarray, high: np.ndarray) -> None:
        """Move the counts into bins over the new range, each by the left edge of its old bin.

        As in openpi, the first bin's count is lost if only the upper end moves: its left edge was 1e-10 lower.
        """
        old_edges = self._edges
        self.low, self.high = low, high
        self._edges = self._make_edges(low, high)
        for dim, edges in enumerate(self._edges):
            self._counts[dim] = np.histogram(old_edges[dim, :-1], bins=edges, weights=self._counts[dim])[0]

    def _quantile(self, q: float) -> np.ndarray:
        below = np.cumsum(self._counts, axis=1) < q * self._count
        return self._edges[np.arange(len(self._edges)), below.sum(axis=1)]  # the last edge if it is never reached


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


def warn_of_misfits(
    stats: Mapping[str, NormStats], data: Mapping[str, NormStats], *, where: str, of: str, quantiles: bool
) -> None:
    """Warn of dimensions that ``stats`` would not normalize to numbers of order 1.

    Examples are angles in degrees with statistics in radians (or vice versa), or a dimension that moves although the
    statistics have no spread. ``data`` has the statistics, without floors, of the data to be normalized. ``of`` is the
    name of that data, ``where`` that of the origin of ``stats``.
    """
    for key, found in misfits(stats, data, quantiles=quantiles).items():
        for told, dims in found.items():
            if dims.any():
                warnings.warn(
                    f"{where}: {key}: under these statistics {_named(dims)} of {of} {told}. Are they of the same "
                    "robot, in the same units?",
                    stacklevel=2,
                )


def misfits(
    stats: Mapping[str, NormStats], data: Mapping[str, NormStats], *, quantiles: bool
) -> dict[str, dict[str, Bool[np.ndarray, " d"]]]:
    """Return the dimensions that ``warn_of_misfits`` warns of: by key, then by what they do."""
    result = {}
    for key, given in stats.items():
        middle, half = (_middle if quantiles else _moments)(given)
        own_middle, own_half = (_middle if quantiles else _moments)(data[key])
        scale = half + EPSILON
        away = np.abs(own_middle - middle) > MAX_AWAY * scale
        result[key] = {
            "lie far outside": away | (own_half > MAX_WIDER * scale),
            "cover almost nothing of the range": ~away & (own_half > HARDLY) & (own_half * MAX_NARROWER < half),
        }
    return result


def _moments(stats: NormStats) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    return stats.mean, stats.std


def _named(chosen: Bool[np.ndarray, " d"]) -> str:
    return f"{chosen.sum()} of {chosen.size} dimensions ({ranges(np.flatnonzero(chosen))})"


def from_store(
    store: EpisodeStore, transform: Transform | None = None, *, horizon: int = 1, min_std: float = MIN_STD
) -> dict[str, NormStats]:
    """Return the statistics of ``state`` and ``actions`` over all episodes in memory.

    ``transform`` runs before normalization (robot, delta actions). With it, the statistics cover, as in openpi, all
    ``horizon`` steps of the chunk at every row, including repeated last actions.
    """
    whole = {"state": store.state, "actions": store.actions}
    blocks = [whole] if transform is None else _transformed(store, transform, horizon)
    return _of_blocks(((block, 1.0) for block in blocks), store.num_rows, min_std)


def _of_blocks(
    blocks: Iterable[tuple[Mapping[str, np.ndarray], float]], num_rows: int, min_std: float
) -> dict[str, NormStats]:
    """Return the statistics of blocks of rows, each with the weight of its rows."""
    found: dict[str, Summary] = {}
    for block, weight in blocks:
        for key, rows in block.items():
            vectors = rows.reshape(-1, rows.shape[-1])
            if key not in found:
                found[key] = Summary(num_rows * len(vectors) / len(rows))  # a row may be a chunk
            found[key].add(vectors, weight)
    return {key: summary.floored(key, min_std) for key, summary in found.items()}


def _transformed(
    store: EpisodeStore, transform: Transform | None, horizon: int, *, block: int = 256
) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, store.num_rows, block):
        rows = np.arange(start, min(start + block, store.num_rows))
        batch = chunks.gather(store, rows, horizon)
        data = {key: batch[key] for key in ("state", "actions", "image", "prompt")}
        data = data if transform is None else transform(data)
        yield {"state": data["state"], "actions": data["actions"]}


def from_sources(
    sources: Sequence[EpisodeSource],
    shares: Sequence[float] = (1.0,),
    transform: Transform | None = None,
    *,
    horizon: int = 1,
    num_episodes: int | None = None,
    min_std: float = MIN_STD,
) -> dict[str, NormStats]:
    """Return the statistics of ``from_store`` for sets larger than memory, weighted by their shares of a batch.

    They are read once, an episode at a time, and one value in fifty is kept in memory. No picture is read.
    ``num_episodes`` limits the number of episodes, which are evenly spread.
    """
    chosen = [_spread(source, num_episodes) for source in sources]
    steps = [int(source.lengths[indices].sum()) for source, indices in zip(sources, chosen, strict=True)]
    weights = [share * sum(steps) / own for share, own in zip(shares, steps, strict=True)]  # they average to 1 a row

    def blocks() -> Iterator[tuple[dict[str, np.ndarray], float]]:
        for source, indices, weight in zip(sources, chosen, weights, strict=True):
            for index in indices.tolist():
                store = EpisodeStore.from_episodes([whole_episode(source, index, cameras=())])
                yield from ((block, weight) for block in _transformed(store, transform, horizon))

    return _of_blocks(blocks(), sum(steps), min_std)


def _spread(source: EpisodeSource, count: int | None) -> Int[np.ndarray, " n"]:
    """Return the indices of ``count`` evenly spread episodes; None gives all."""
    spread = np.linspace(0, source.num_episodes - 1, min(count or source.num_episodes, source.num_episodes))
    return np.unique(spread.round().astype(int))


@typed
def bounds_stats(low: Float[np.ndarray, " d"], high: Float[np.ndarray, " d"]) -> NormStats:
    """Return statistics that map [low, high] to [-1, 1] in both formulas, for simulators with bounded actions."""
    low, high = low.astype(np.float64), high.astype(np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (high - low > 2 * EPSILON).all()):
        raise ValueError(f"bounds must be finite with low < high, got low {low.tolist()}, high {high.tolist()}")
    # both formulas add EPSILON to the width; subtract it here, so that the bounds map to -1 and 1
    return NormStats(mean=(low + high) / 2, std=(high - low) / 2 - EPSILON, q01=low, q99=high - EPSILON)
