"""A checkpoint beside recorded episodes, for ``acrlpd eval --data`` and ``acrlpd diagnose``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from acrlpd.config import DataConfig, TrainConfig
from acrlpd.data import held_out
from acrlpd.data.formats.options import DataSource, ReaderOptions
from acrlpd.data.sources import Dataset, open_episodes
from acrlpd.data.store import windows
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.robots import mapping
from acrlpd.data.view.robots.mapping import ROBOTS
from acrlpd.data.view.transforms import Compose, Normalize
from acrlpd.deploy.openpi import load_openpi, openpi_subject
from acrlpd.deploy.options import ActingOptions, OpenPIOptions, refuse_unused
from acrlpd.deploy.trained import is_ours, load_trained
from acrlpd.training import prior_data
from acrlpd.training.fingerprint import Fingerprint
from acrlpd.training.loading import Trained
from acrlpd.training.measuring import Subject, subject_of_agent
from acrlpd.training.offline_evaluation import OfflineEvaluation, evaluate_offline, spread_of


@dataclasses.dataclass(frozen=True)
class RecordedOptions:
    """Which recorded episodes to use, and how to read them."""

    # share of the episodes of DATA that is held out of them; None: what the run held out of its own data, and of other
    # data all
    fraction: float | None
    read: ReaderOptions
    execute_horizon: int | None = None  # steps of a chunk that are executed; None: as trained, or all


@dataclasses.dataclass(frozen=True)
class Beside:
    """A checkpoint and recorded episodes for it."""

    subject: Subject
    source: Dataset  # the episodes to use
    store: EpisodeStore  # the same, with pictures read on demand
    told: tuple[str, ...]  # what a user must know about the choice of the episodes
    robot: str | None
    cameras: tuple[str, ...] | None  # the data's names of those the policy needs; None: by the robot's table
    fps: float | None = None  # of the data it was trained on; None: unknown
    config: TrainConfig | None = None  # of a run of ours
    step: int | None = None

    def evaluate(self, *, num_chunks: int, seed: int) -> OfflineEvaluation:
        """Compare the checkpoint's actions with the recorded ones."""
        rng = jax.random.key(seed)
        return evaluate_offline(self.subject, [self.store], spread=self.spread, num_chunks=num_chunks, rng=rng)

    @property
    def whole(self) -> Dataset:
        """The whole data set, of which the episodes may be a part."""
        return self.source.whole if isinstance(self.source, held_out.Part) else self.source

    @property
    def spread(self) -> Float[np.ndarray, " a"]:
        """The spread of the actions of the whole data set."""
        return spread_of([self.whole])

    @property
    def normalize(self) -> Normalize:
        """The step of the transform that normalizes, with the checkpoint's statistics."""
        return next(each for each in self.subject.transform.transforms if isinstance(each, Normalize))

    @property
    def before_normalization(self) -> Compose:
        return self.subject.transform.before(Normalize)

    @property
    def stats(self) -> dict[str, NormStats]:
        return dict(self.normalize.stats)


def put_beside(
    checkpoint: str,
    data: str,
    options: RecordedOptions,
    openpi: OpenPIOptions,
    *,
    extraction: str | None = None,
    guidance_weights: tuple[float, ...] | None = None,
) -> Beside:
    """Load a checkpoint, ours or openpi's, and open the episodes of ``data`` for it.

    Raises:
        ValueError: the checkpoint or the data cannot be read, or these are episodes of a robot of other dimensions.
    """
    if is_ours(checkpoint):
        refuse_unused(checkpoint, openpi)
        return _beside_ours(load_trained(checkpoint, extraction, guidance_weights), data, options)
    acting = ActingOptions(extraction=extraction, guidance_weights=guidance_weights)
    model = load_openpi(checkpoint, openpi, acting)
    source = open_episodes(data, **options.read.for_reader())
    assert openpi.robot is not None  # else it would not have been loaded
    platform = ROBOTS[openpi.robot]
    _check_dims(source, data, (platform.state_dim, platform.action_dim), f"--robot {openpi.robot}")
    if options.fraction is not None:
        source = held_out.divide(source, data, options.fraction, DataConfig.validation_seed).rest
    subject = openpi_subject(model, openpi, executed=options.execute_horizon)
    return Beside(subject, source, _store(source), (), openpi.robot, None)


def _beside_ours(trained: Trained, data: str, options: RecordedOptions) -> Beside:
    config = trained.config
    own = next((each for each in prior_data.prior_sets(config) if _same_place(each.path, data)), None)
    source = _opened(config, own, data, options.read)
    _check_dims(source, data, (trained.dims.state, trained.dims.action), "the checkpoint")
    fraction = options.fraction
    told = []
    if own is not None:
        trained_on = config.data.validation_fraction
        if not trained_on:
            told.append(f"the run was trained on all of {data}: errors on other episodes are larger than these")
        elif fraction not in (None, trained_on):
            told.append(
                f"the run held out {trained_on:g} of {data}, not {fraction:g}: it was trained on some of these episodes"
            )
        fraction = fraction or trained_on
    if fraction:
        part = held_out.divide(source, data, fraction, config.data.validation_seed)
        told += _changes(trained, part) if own is not None and fraction == config.data.validation_fraction else []
        source = part.rest
    subject = subject_of_agent(trained.agent, _compose(trained), config, executed=options.execute_horizon)
    needed = trained.cameras if config.policy.traits.has_backbone and config.data.robot is None else None
    cameras = () if not config.policy.traits.has_backbone else needed
    record = trained.manager.read_run(trained.step)
    return Beside(
        subject,
        source,
        _store(source),
        tuple(told),
        config.data.robot,
        cameras,
        record.get("fps"),
        config,
        trained.step,
    )


def _compose(trained: Trained) -> Compose:
    assert isinstance(trained.transform, Compose), "make_transform returns all steps"
    return trained.transform


def _opened(config: TrainConfig, own: DataSource | None, data: str, read: ReaderOptions) -> Dataset:
    """Open the episodes as the run read its own; what ``read`` says otherwise wins."""
    given = own or DataSource(path=data).over(dataclasses.replace(config.data, frame_cache=None))
    given = dataclasses.replace(given, path=data, **read.said())
    rewards = None if own is None else given.rewards  # errors need none, and other data may not say how it ended
    return open_episodes(data, rewards=rewards, on_bad_episode=config.data.on_bad_episode, **given.for_reader())


def _changes(trained: Trained, part: held_out.Part) -> list[str]:
    """Return a warning if the data has changed since the run, so the split is another one."""
    known = trained.manager.read_run(trained.step).get("prior")
    if known is None or len(prior_data.prior_sets(trained.config)) > 1:
        return []
    before, now = Fingerprint(**known), (part.num_episodes, int(part.lengths.sum()))
    if (before.episodes, before.steps) == now:
        return []
    return [
        f"the data has changed since the run: it was trained on {before}, and without the held-out ones there are now "
        f"{now[0]} episodes with {now[1]} steps: it may have been trained on some of the episodes used here"
    ]


def _check_dims(source: Dataset, data: str, expected: tuple[int, int], of: str) -> None:
    found = tuple(source.window(0, key, 0, 1).shape[1] for key in ("state", "actions"))
    if found != expected:
        raise ValueError(
            f"{data}: state and actions have {found[0]} and {found[1]} dimensions, those of {of} {expected[0]} and "
            f"{expected[1]}: this is data of another robot, or another choice of its keys (--read.state_keys, "
            "--read.action_keys)"
        )


def _store(source: Dataset) -> EpisodeStore:
    return windows.open_store(source, memory_bytes=0)


def _same_place(one: str, other: str) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def check_cameras(beside: Beside, data: str) -> None:
    """Refuse data without the cameras that the policy reads."""
    if missing := missing_cameras(beside):
        raise ValueError(f"{data}: {missing}. Rename the data's cameras, or choose other ones with --read.cameras")


def missing_cameras(beside: Beside) -> str | None:
    """Return in words which cameras the policy reads and the data does not have; None if all are there."""
    there = beside.source.cameras
    if beside.robot is not None and beside.cameras is None:
        try:
            mapping.ROBOTS[beside.robot].names(there)
        except ValueError as error:
            return str(error)
        return None
    missing = [name for name in beside.cameras or () if name not in there]
    if not missing:
        return None
    return f"the policy reads the cameras {_listed(beside.cameras or ())}, and the data has {_listed(there)}"


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(names) or "none"
