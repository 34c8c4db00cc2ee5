"""Normalization with openpi's formulas and file format; ``statistics.py`` computes the numbers.

z-score (pi0): ``(x - mean) / (std + 1e-6)``; quantiles (pi0.5, pi0-FAST): 1 % and 99 % to -1 and 1. Nothing is clipped.
The formulas are openpi's, so that its statistics work here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from acrlpd import files
from acrlpd.types import typed

EPSILON = 1e-6  # in both formulas, as in openpi
FILE_NAME = "norm_stats.json"


@dataclasses.dataclass(frozen=True)
class NormStats:
    """Statistics of one key, one number per dimension. ``q01`` and ``q99`` are missing in some pi0 files."""

    mean: Float[np.ndarray, " d"]
    std: Float[np.ndarray, " d"]
    q01: Float[np.ndarray, " d"] | None = None
    q99: Float[np.ndarray, " d"] | None = None


@typed
def normalize(x: Shaped[np.ndarray, "*batch d"], stats: NormStats, *, quantiles: bool) -> Float[np.ndarray, "*batch d"]:
    """Normalize ``x``; statistics with more dimensions than ``x`` are cut to its number."""
    dim = x.shape[-1]
    if not quantiles:
        return (x - stats.mean[:dim]) / (stats.std[:dim] + EPSILON)
    q01, q99 = quantiles_of(stats)
    return (x - q01[:dim]) / (q99[:dim] - q01[:dim] + EPSILON) * 2.0 - 1.0


@typed
def unnormalize(
    x: Shaped[np.ndarray, "*batch d"], stats: NormStats, *, quantiles: bool
) -> Float[np.ndarray, "*batch d"]:
    """Invert ``normalize``. Dimensions beyond the statistics are padding.

    As in openpi, z-scores pad with mean 0 and std 1, which scales the padding by 1 + 1e-6; quantiles do not change it.
    """
    known = min(x.shape[-1], len(stats.mean))
    if not quantiles:
        raw = x[..., :known] * (stats.std[:known] + EPSILON) + stats.mean[:known]
        padding = x[..., known:] * (np.ones(1, stats.std.dtype) + EPSILON)
    else:
        q01, q99 = quantiles_of(stats)
        raw = (x[..., :known] + 1.0) / 2.0 * (q99[:known] - q01[:known] + EPSILON) + q01[:known]
        padding = x[..., known:]
    return np.concatenate([raw, padding], axis=-1)


def quantiles_of(stats: NormStats) -> tuple[np.ndarray, np.ndarray]:
    if stats.q01 is None or stats.q99 is None:
        raise ValueError(
            "these normalization statistics have no q01 and q99, which quantile normalization (pi0.5, pi0-FAST) needs. "
            "Compute them again, or normalize with mean and std."
        )
    return stats.q01, stats.q99


def save(path: Path | str, stats: Mapping[str, NormStats]) -> None:
    """Write openpi's ``norm_stats.json`` to the file ``path``; create its folder and replace an old file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.written_whole(path) as partial:
        partial.write_text(json.dumps(to_dict(stats), indent=2), encoding="utf-8")


def to_dict(stats: Mapping[str, NormStats]) -> dict[str, Any]:
    """Return the content of ``norm_stats.json``."""
    lists = {key: {name: _as_list(value) for name, value in vars(value).items()} for key, value in stats.items()}
    return {"norm_stats": lists}


def load(path: Path | str) -> dict[str, NormStats]:
    """Read openpi's ``norm_stats.json``; ``path`` is the file or the folder that holds it. Arrays are float64."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"no normalization statistics at {path}. Make them from the dataset or point to a checkpoint's assets."
        )
    content = files.read_json(path, allow_nan=True)  # ``_check_numbers`` refuses NaN
    try:
        stats = {key: _from_lists(entry) for key, entry in content["norm_stats"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected openpi's layout "
            '{"norm_stats": {"state": {"mean": [...], "std": [...], "q01": [...], "q99": [...]}, "actions": ...}}, '
            f"got {error!r}"
        ) from error
    for key, each in stats.items():
        _check_numbers(path, key, each)
    return stats


def _check_numbers(file: Path, key: str, stats: NormStats) -> None:
    """Raise ValueError for numbers that no data can have, such as those of an edited or truncated file."""
    for name, value in vars(stats).items():
        if value is not None and not np.isfinite(value).all():
            wrong = ranges(np.flatnonzero(~np.isfinite(value)))
            raise ValueError(f"{file}: {key}: {name} must be finite, and is not in dimension {wrong}. Make it again.")
    if (stats.std < 0).any():
        wrong = ranges(np.flatnonzero(stats.std < 0))
        raise ValueError(f"{file}: {key}: std must not be negative, and is in dimension {wrong}. Make it again.")
    if stats.q01 is not None and stats.q99 is not None and (stats.q01 > stats.q99).any():
        wrong = ranges(np.flatnonzero(stats.q01 > stats.q99))
        raise ValueError(f"{file}: {key}: q01 exceeds q99 in dimension {wrong}. Make it again.")


def load_for(path: Path | str, dims: Mapping[str, int], *, quantiles: bool) -> dict[str, NormStats]:
    """Load existing statistics of ``state`` and ``actions`` and cut them to the dimensions of the data.

    ``path`` is a file, its folder, an ``assets`` folder with one file somewhere below, or a checkpoint that has such a
    folder. Statistics with more dimensions than the data are accepted if the rest describes padding: zeros.

    Raises:
        FileNotFoundError: there are no statistics.
        ValueError: there are several files, or the statistics do not fit; the error names the key and what was found.
    """
    file = _find(Path(path))
    stats = load(file)
    missing = dims.keys() - stats.keys()
    if missing:
        raise ValueError(f"{file}: expected statistics of {' and '.join(dims)}, found {', '.join(stats) or 'none'}")
    return {key: _cut(file, key, stats[key], dim, quantiles=quantiles) for key, dim in dims.items()}


def _find(path: Path) -> Path:
    if path.is_file() or (path / FILE_NAME).is_file():
        return path
    beside = path.parent if path.name == "params" else path  # openpi's checkpoints have both in one folder
    assets = beside / "assets" if (beside / "assets").is_dir() else path
    found = sorted(assets.rglob(FILE_NAME))
    if len(found) > 1:
        raise ValueError(
            f"{path}: expected one {FILE_NAME}, found {len(found)}. Name one of {', '.join(map(str, found[:8]))}"
        )
    return found[0] if found else path


def _cut(file: Path, key: str, stats: NormStats, dim: int, *, quantiles: bool) -> NormStats:
    known = len(stats.mean)
    if known < dim or stats.mean[dim:].any() or (stats.q99 is not None and stats.q99[dim:].any()):
        raise ValueError(
            f"{file}: {key}: expected {dim} dimensions, as the data has, found {known}. These are statistics of "
            "another robot, or of another choice of its keys"
        )
    if quantiles and (stats.q01 is None or stats.q99 is None):
        raise ValueError(
            f"{file}: {key}: expected q01 and q99, which quantile normalization (pi0.5) needs, found mean and std alone"
        )
    q01, q99 = (None if each is None else each[:dim] for each in (stats.q01, stats.q99))
    return NormStats(stats.mean[:dim], stats.std[:dim], q01, q99)


def _as_list(value: np.ndarray | None) -> list[float] | None:
    return None if value is None else value.tolist()


def _from_lists(entry: Mapping[str, Any]) -> NormStats:
    given = {name: entry[name] for name in ("q01", "q99") if entry.get(name) is not None}
    fields = {name: np.asarray(value, np.float64) for name, value in given.items()}
    fields |= {name: np.asarray(entry[name], np.float64) for name in ("mean", "std")}
    shapes = {name: value.shape for name, value in fields.items()}
    if len(set(shapes.values())) > 1 or fields["mean"].ndim != 1:
        raise ValueError(f"mean, std, q01 and q99 must be lists of the same length, got {shapes}")
    return NormStats(**fields)


def ranges(indices: Int[np.ndarray, " n"]) -> str:
    """Return indices as text: ``0-2, 5`` for 0, 1, 2, 5."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
