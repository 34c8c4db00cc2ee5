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

from acrlpd.data import normalize
from acrlpd.data.episodes import EpisodeSource
from acrlpd.data.normalize import NormStats
from acrlpd.data.robots import aloha
from acrlpd.data.robots.mapping import ToRobot
from acrlpd.data.sources import open_episodes
from acrlpd.data.transforms import Compose, DeltaActions, Transform, make_bool_mask

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class NormStatsArguments:
    """Mean, standard deviation, 1 % and 99 % quantile of state and actions; no picture is decoded."""

    data_path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA_PATH")]  # any data set we read
    out: str | None = None  # folder for openpi's norm_stats.json; None: print only
    json: bool = False  # print one JSON object instead of a table
    horizon: int = 1  # statistics are taken over all steps of the chunk at every row; give the policy's
    delta: tuple[int, ...] = ()  # actions relative to the state: 6 -1 6 -1 is six that are, one that is not, ...
    robot: Literal["none", "aloha"] = "none"  # aloha: pi0's joint signs and gripper angles; DROID, LIBERO need none
    state_keys: tuple[str, ...] = ()  # the format's names of what makes the state; empty: the usual ones
    num_episodes: int | None = None  # only so many, evenly spread
    min_std: float = normalize.MIN_STD  # floor for dimensions that hardly move, in raw units; 0: openpi's bare numbers
    on_bad_episode: Literal["error", "skip"] = "error"


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(NormStatsArguments, args=argv, prog="acrlpd norm-stats")
    options: dict[str, Any] = {"state_keys": arguments.state_keys} if arguments.state_keys else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = open_episodes(arguments.data_path, on_bad_episode=arguments.on_bad_episode, **options)
        stats = normalize.from_source(
            source,
            _before_normalization(arguments, source),
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
    if arguments.json:
        found = {"data_path": arguments.data_path, "format": source.format, "num_episodes": source.num_episodes}
        found |= {"num_steps": int(source.lengths.sum()), "file": file and str(file), "warnings": messages}
        print(json.dumps(found | normalize.to_dict(stats)))
    else:
        print(f"{source.format}: {source.num_episodes} episodes, {source.lengths.sum()} steps")
        _print_table(stats)
        print(f"written: {file}" if file is not None else "not written: name a folder with --out")
    return 0


def _before_normalization(arguments: NormStatsArguments, source: EpisodeSource) -> Transform:
    dims = {key: source.window(0, key, 0, 1).shape[1] for key in ("state", "actions")}
    if arguments.robot == "aloha" and set(dims.values()) != {aloha.ACTION_DIM}:
        raise ValueError(f"--robot aloha needs {aloha.ACTION_DIM} dimensions, but {arguments.data_path} has {dims}")
    mask = make_bool_mask(*arguments.delta)
    if len(mask) > min(dims.values()):
        raise ValueError(f"--delta names {len(mask)} dimensions, but {arguments.data_path} has {dims}")
    steps: list[Transform] = [ToRobot("aloha")] if arguments.robot == "aloha" else []
    return Compose([*steps, DeltaActions(mask)] if mask else steps)


def _print_table(stats: dict[str, NormStats]) -> None:
    print(f"{'':12}" + "".join(f"{name:>12}" for name in ("mean", "std", "q01", "q99")))
    for key, each in stats.items():
        columns = [column for column in (each.mean, each.std, each.q01, each.q99) if column is not None]
        for dim, values in enumerate(zip(*columns, strict=True)):
            print(f"{f'{key}[{dim}]':12}" + "".join(f"{value:12.5g}" for value in values))
