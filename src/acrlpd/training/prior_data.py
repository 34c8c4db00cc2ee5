"""The prior data of a run: found or collected, opened, checked, and summed up in statistics."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from acrlpd.config import TrainConfig
from acrlpd.data import chunks, held_out, statistics
from acrlpd.data.formats.frame_cache import FrameCache
from acrlpd.data.formats.options import DataSource
from acrlpd.data.held_out import Part
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.mixture import Facts, Mixture, check_alike
from acrlpd.data.sources import Dataset, open_episodes
from acrlpd.data.store import windows
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.tools import instructions
from acrlpd.data.view import normalize
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.robots import mapping
from acrlpd.data.view.transforms import Compose, Transform
from acrlpd.envs.env import EnvSpec
from acrlpd.training.build import Dims, before_normalization, delta_mask, has_quantiles
from acrlpd.training.collection import collect_prior
from acrlpd.training.run import run_files

logger = logging.getLogger(__name__)


def prior_sets(config: TrainConfig) -> tuple[DataSource, ...]:
    """Return the data sets of the prior episodes: those given, or the one collected in the run's own folder."""
    own = DataSource(path=str(run_files(config).directory / "prior"))
    return config.data.sets or (own.over(config.data),)


def open_sets(config: TrainConfig) -> list[Dataset]:
    """Open every data set of the prior episodes, without the episodes that are held out; see ``held_out_of``."""
    opened = [open_prior(config, number) for number in range(len(prior_sets(config)))]
    fraction, seed = config.data.validation_fraction, config.data.validation_seed
    if not fraction:
        return opened
    return [held_out.divide(*each, fraction, seed) for each in zip(opened, _paths(config), strict=True)]


def held_out_of(sources: Sequence[Dataset]) -> list[Dataset]:
    """Return the held-out part of each of the data sets of ``open_sets``; an empty list if nothing is held out."""
    return [each.rest for each in sources if isinstance(each, Part)]


def _paths(config: TrainConfig) -> list[str]:
    return [each.path for each in prior_sets(config)]


def make_chunk_loader(config: TrainConfig, prior: Mixture, transform: Transform, **others: Any) -> ChunkLoader:
    """Return a loader that draws chunks as ``config`` says; ``others`` are the arguments that it does not decide."""
    return ChunkLoader(
        prior,
        transform,
        batch_size=config.data.batch_size,
        horizon=config.policy.action_horizon,
        backup_horizon=config.backup_horizon,
        sequence_ratio=config.data.sequence_ratio,
        seed=config.seed,
        online_ratio=config.data.online_ratio,
        online_ratio_episodes=config.data.online_ratio_episodes,
        ends_in_chunks=config.data.ends_in_chunks,
        **others,
    )


def open_prior(config: TrainConfig, number: int = 0) -> Dataset:
    """Open one data set of the prior episodes; collect it first if there is an environment and no data is named."""
    data, given = config.data, prior_sets(config)[number]
    if not data.sets and config.env is not None:
        collect_prior(config.env, data.collect, Path(given.path), seed=config.seed)
    options = given.for_reader()
    if given.frame_cache is not None:
        size = config.policy.image_size
        options["frame_cache"] = FrameCache(Path(given.frame_cache), size, size)
    return open_episodes(
        given.path,
        rewards=given.rewards,
        on_bad_episode=data.on_bad_episode,
        num_workers=data.num_workers,
        remember=bool(data.sets),
        **options,
    )


def open_mixture(config: TrainConfig, sources: Sequence[Dataset]) -> Mixture:
    """Open the episodes of all ``sources`` for training; refuse data sets that do not fit each other."""
    data, sets = config.data, prior_sets(config)
    with _told():
        facts = [Facts.of(source, each.path) for source, each in zip(sources, sets, strict=True)]
        check_alike(facts, of_one_robot=data.robot is not None)
    weights = tuple(each.weight for each in sets if each.weight is not None)
    stores = windows.open_stores(sources, memory_bytes=data.memory_bytes, num_workers=data.num_workers)
    return Mixture(tuple(stores), tuple(each.path for each in sets), weights or None)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Log the warnings that are raised inside the context."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        logger.warning("%s", warning.message)


def check_instructions(config: TrainConfig, sources: Sequence[Dataset], spec: EnvSpec | None) -> None:
    """Warn of missing instructions if the policy reads them; refuse several tasks that share an empty instruction."""
    if not config.policy.traits.has_backbone:
        return
    if spec is not None and not spec.instruction.strip():
        logger.warning("%s has no instruction, and the policy reads one: say it with --env.instruction", spec.name)
    names = _paths(config)
    found = {name: instructions.untold(source) for name, source in zip(names, sources, strict=True)}
    silent = {name: each for name, each in found.items() if each is not None}
    for name, each in silent.items():
        if each.is_shared:
            raise ValueError(f"{name}: {each.told}")
        logger.warning("%s: %s", name, each.told)
    if len(silent) > 1:
        raise ValueError(
            f"{' and '.join(silent)} have episodes without an instruction, and the policy could not tell their tasks "
            f"apart: {instructions.CURE}"
        )


def check_stores(config: TrainConfig, prior: Mixture, dims: Dims, spec: EnvSpec | None) -> None:
    """Check each data set of the prior episodes, and log how many of its episodes were cut."""
    for name, store in zip(prior.names, prior.stores, strict=True):
        check_prior(config, store, dims, spec, name)
        if config.agent.algorithm != "bc" and (num_cut := chunks.num_cut(store)):
            logger.info(
                "%s: %d of %d episodes were cut and do not say what was seen after their last action: their last whole "
                "window stays out of the TD loss",
                *(name, num_cut, store.num_episodes),
            )


def check_prior(config: TrainConfig, prior: EpisodeStore, dims: Dims, spec: EnvSpec | None, name: str) -> None:
    """Refuse data whose robot is not that of the configuration or of the environment."""
    if config.data.action_dim not in (None, dims.action):
        raise ValueError(
            f"data.action_dim is {config.data.action_dim}, but the actions in {name} have {dims.action} "
            "dimensions: this is data of another robot, or another choice of its keys"
        )
    if spec is not None and (spec.state_dim, spec.action_dim) != (dims.state, dims.action):
        raise ValueError(
            f"{name} has {dims.state} state and {dims.action} action dimensions, but {spec.name} has "
            f"{spec.state_dim} and {spec.action_dim}: name an environment of the same robot (--env.name), none (--env "
            "None), or other keys of the data (--data.state_keys, --data.action_keys)"
        )
    mapping.check(
        config.data.robot,
        delta_mask(config),
        where=name,
        dims=(dims.state, dims.action),
        cameras=prior.cameras if config.policy.traits.has_backbone else None,
    )


def make_norm_stats(
    config: TrainConfig, prior: Mixture, sources: Sequence[Dataset], spec: EnvSpec | None
) -> dict[str, NormStats]:
    """Return the configured statistics, or compute those of the prior data as it reaches normalization.

    Several data sets are weighted by their shares. With "bounds", the action space gives the statistics of actions.
    """
    with _told():
        given = _given_stats(config, prior)
        stats = given or _own_stats(config, prior, sources, config.data.min_std)
        if given or len(sources) > 1:
            _judge_stats(config, stats, prior, sources)
    if config.data.action_normalization == "bounds":
        if spec is None:
            raise ValueError(
                "data.action_normalization='bounds' needs an environment, which knows its action space; "
                "use 'z_score' or 'quantile' for data alone"
            )
        stats["actions"] = statistics.bounds_stats(spec.action_low, spec.action_high)
    return stats


def _own_stats(config: TrainConfig, prior: Mixture, sources: Sequence[Dataset], min_std: float) -> dict[str, NormStats]:
    before, store = before_normalization(config), prior.stores[0]
    if store.in_memory and not before and len(sources) == 1:
        return statistics.from_store(store, min_std=min_std)
    transform = Compose(before) if before else None
    horizon = config.policy.action_horizon if before else 1
    return statistics.from_sources(sources, prior.shares, transform, horizon=horizon, min_std=min_std)


def _judge_stats(
    config: TrainConfig, stats: Mapping[str, NormStats], prior: Mixture, sources: Sequence[Dataset]
) -> None:
    """Warn if statistics that were given, or computed over several data sets, do not fit one of the data sets."""
    where = config.data.norm_stats or "the statistics of all data sets together"
    for name, store, source in zip(prior.names, prior.stores, sources, strict=True):
        own = _own_stats(config, Mixture((store,)), [source], 0.0)
        statistics.warn_of_misfits(stats, own, where=where, of=name, quantiles=has_quantiles(config))


def _given_stats(config: TrainConfig, prior: Mixture) -> dict[str, NormStats] | None:
    """Load the statistics that the configuration names, if any."""
    if config.data.norm_stats is None:
        return None
    dims = {"state": prior.stores[0].state.shape[1], "actions": prior.stores[0].actions.shape[1]}
    return normalize.load_for(config.data.norm_stats, dims, quantiles=has_quantiles(config))
