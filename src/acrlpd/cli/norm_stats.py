"""``acrlpd norm-stats DATA_PATH``."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from acrlpd import fields
from acrlpd.config import DataConfig
from acrlpd.data import statistics
from acrlpd.data.formats.options import ReaderOptions
from acrlpd.data.mixture import Facts, check_alike
from acrlpd.data.sources import Dataset, identify, open_episodes
from acrlpd.data.store.episodes import EpisodeSource
from acrlpd.data.view import normalize
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.robots import mapping
from acrlpd.data.view.robots.mapping import Robot
from acrlpd.data.view.transforms import Compose, Transform
from acrlpd.fields import NonNegativeFloat, PositiveFloat, PositiveInt

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class NormStatsArguments:
    """Compute mean, standard deviation, 1 % and 99 % quantile of state and actions; no picture is decoded."""

    data_path: tyro.conf.Positional[tuple[str, ...]]  # any data set we read, or several that are trained on together
    out: str | None = None  # folder for openpi's norm_stats.json; None: print only
    json: bool = False  # print one JSON object instead of a table
    # for several data sets: how often each is drawn from; empty: by their steps
    weights: tuple[PositiveFloat, ...] = ()
    horizon: PositiveInt = 1  # steps of the chunk at every row that statistics cover; give the policy's horizon
    robot: Robot | None = None  # as data.robot of a run: its numbers in openpi's conventions
    delta_mask: Annotated[tuple[int, ...] | None, tyro.conf.arg(aliases=("--delta",))] = None
    """6 -1: six actions relative to the state, one not; None: the robot's"""
    pi05: bool = False  # the robot's relative actions as for pi0.5: none in LIBERO
    num_episodes: PositiveInt | None = None  # use only this many, evenly spread
    # floor for dimensions that hardly move, raw units; 0: none, as in openpi
    min_std: NonNegativeFloat = statistics.MIN_STD
    on_bad_episode: Literal["error", "skip"] = "error"
    read: ReaderOptions = dataclasses.field(default_factory=ReaderOptions)


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(NormStatsArguments, args=argv, prog="acrlpd norm-stats", config=(tyro.conf.OmitArgPrefixes,))
    fields.check(arguments)
    sets = DataConfig(path=arguments.data_path, weights=arguments.weights).sets
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sources = [_opened(arguments, each.path) for each in sets]
        check_alike([Facts.of(source, each.path) for source, each in zip(sources, sets, strict=True)])
        steps = [int(source.lengths.sum()) for source in sources]
        weights = arguments.weights or steps
        stats = statistics.from_sources(
            sources,
            [weight / sum(weights) for weight in weights],
            _before_normalization(arguments, sources[0], sets[0].path),
            horizon=arguments.horizon,
            num_episodes=arguments.num_episodes,
            min_std=arguments.min_std,
        )
    messages = [str(warning.message) for warning in caught]
    for message in messages:
        logger.warning("%s", message)
    file = None if arguments.out is None else Path(arguments.out) / normalize.FILE_NAME
    if file is not None:
        normalize.save(file, stats)
    form, episodes = ", ".join(source.format for source in sources), sum(source.num_episodes for source in sources)
    if arguments.json:
        paths = arguments.data_path if len(sets) > 1 else sets[0].path
        found: dict[str, Any] = {"data_path": paths, "format": form, "num_episodes": episodes, "num_steps": sum(steps)}
        found |= {"file": file and str(file), "warnings": messages}
        print(json.dumps(found | normalize.to_dict(stats)))
    else:
        print(f"{form}: {episodes} episodes, {sum(steps)} steps")
        _print_table(stats)
        print(f"written: {file}" if file is not None else "not written: name a folder with --out")
    return 0


def _opened(arguments: NormStatsArguments, path: str) -> Dataset:
    options = arguments.read.for_reader()
    if identify(path) in ("hdf5", "lerobot"):
        options.setdefault("cameras", ())  # no picture is opened, so none can be found damaged
    return open_episodes(path, on_bad_episode=arguments.on_bad_episode, **options)


def _before_normalization(arguments: NormStatsArguments, source: EpisodeSource, path: str) -> Transform:
    """Return the transform that a run with these options applies before normalization."""
    robot, deltas, pi05 = arguments.robot, arguments.delta_mask, arguments.pi05
    state_dim, action_dim = (source.window(0, key, 0, 1).shape[1] for key in ("state", "actions"))
    mask = mapping.delta_mask(robot, deltas, pi05=pi05)
    mapping.check(robot, mask, where=path, dims=(state_dim, action_dim), cameras=None, prefix="")
    return Compose(mapping.before_normalization(robot, deltas, pi05=pi05))


def _print_table(stats: dict[str, NormStats]) -> None:
    print(f"{'':12}" + "".join(f"{name:>12}" for name in ("mean", "std", "q01", "q99")))
    for key, each in stats.items():
        columns = [column for column in (each.mean, each.std, each.q01, each.q99) if column is not None]
        for dim, values in enumerate(zip(*columns, strict=True)):
            print(f"{f'{key}[{dim}]':12}" + "".join(f"{value:12.5g}" for value in values))
