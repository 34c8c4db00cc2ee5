"""Construction of a run from its configuration: a trainer with all its parts, new or resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import TrainConfig
from acrlpd.data.held_out import Part
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.mixture import Mixture
from acrlpd.data.replay import ReplayJournal
from acrlpd.data.sources import Dataset
from acrlpd.data.store import windows
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.transforms import Transform
from acrlpd.envs import rollout
from acrlpd.envs.env import EnvSpec
from acrlpd.envs.registry import make_vector
from acrlpd.envs.vector import VectorEnv
from acrlpd.training import ending, linking, offline_evaluation, overwriting, prefixes, resuming
from acrlpd.training.build import Dims, abstract_agent, make_agent, make_transform
from acrlpd.training.checkpoint import ACRLPDCheckpointManager
from acrlpd.training.fingerprint import Fingerprint, fingerprint
from acrlpd.training.guards import RunLock
from acrlpd.training.loop import ACRLPDTrainer
from acrlpd.training.offline_evaluation import HeldOut
from acrlpd.training.overwriting import Replaced
from acrlpd.training.parts import RunParts
from acrlpd.training.prior_data import (
    check_instructions,
    check_stores,
    held_out_of,
    make_chunk_loader,
    make_norm_stats,
    open_mixture,
    open_sets,
    prior_sets,
)
from acrlpd.training.run import Interaction, Progress, RunFiles, run_files, settle_best

logger = logging.getLogger(__name__)


def make_trainer(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    override: Collection[str] = (),
    from_step: int | None = None,
) -> ACRLPDTrainer:
    """Make a trainer at the start of its run, or at the newest checkpoint of a resumed one.

    ``override`` has patterns of fields ("optimizers.*.schedule.*") in which a resumed run may differ from its first
    configuration. ``from_step`` goes back to an older checkpoint and, once that is restored, deletes the later ones.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    config = config.with_critic_horizon(config.critic_horizon)  # a run stores what its critics were trained for
    files = run_files(config)
    overwriting.tell_of_set_aside(files.directory)
    is_first = jax.process_index() == 0
    with contextlib.ExitStack() as failed:
        replaced = overwriting.set_aside(config, files) if overwrite and is_first else None
        if replaced is not None:
            failed.callback(replaced.put_back)
        if overwrite and jax.process_count() > 1:
            multihost_utils.sync_global_devices("the old run is set aside")
        lock = RunLock(files.directory) if is_first else None
        if lock is not None:
            failed.callback(lock.release)
        resuming.claim_directory(config, files, resume=resume, override=override)
        parts = _make_parts(config, files, lock, replaced, override=override, from_step=from_step)
        trainer = ACRLPDTrainer(parts)
        failed.pop_all()
    return trainer


def _make_parts(
    config: TrainConfig,
    files: RunFiles,
    lock: RunLock | None,
    replaced: Replaced | None,
    *,
    override: Collection[str],
    from_step: int | None,
) -> RunParts:
    """Make the parts of a run in the folder that it has claimed."""
    _check_parts(config)
    environments = make_environments(config, config.eval.num_envs) if config.env else None
    prior = _open_prior(config, environments.spec if environments else None)
    checkpoints = ACRLPDCheckpointManager(
        files.checkpoints,
        max_to_keep=config.max_to_keep,
        keep_period=config.keep_period,
        keep=(config.offline_steps,),
        writer=True,
        params=_unchanging_params(config, prior),
    )
    fresh_agent = functools.partial(make_agent, config, prior.dims, prior.cameras, weights=config.policy.weights)
    if checkpoints.steps() or from_step is not None:
        agent, progress, stats = resuming.resume_from(
            files,
            checkpoints,
            make_agent(config, prior.dims, prior.cameras),
            from_step,
            config=config,
            prior=(", ".join(prior.mixture.names), prior.fingerprint),
            override=override,
        )
    else:
        resuming.check_nothing_was_learned(config, files, checkpoints)
        agent, progress = fresh_agent(), Progress()
        stats = make_norm_stats(config, prior.mixture, prior.sources, environments.spec if environments else None)
    settle_best(progress, Progress(), checkpoints, files)
    transform = make_transform(config, stats, prior.dims, prior.cameras)
    interaction = None
    if config.env and config.online_steps:
        interaction = make_interaction(config, files, progress, override=override)
    return RunParts(
        config,
        agent,
        progress,
        fresh_agent=fresh_agent,
        files=files,
        checkpoints=checkpoints,
        loader=make_loader(config, prior.mixture, transform, interaction, agent, stats),
        transform=transform,
        norm_stats=stats,
        prior=prior.fingerprint,
        fps=prior.fps,
        interaction=interaction,
        eval_environments=environments,
        held_out=_open_held_out(config, prior.sources) if environments is None else None,
        lock=lock,
        replaced=replaced,
    )


def _check_parts(config: TrainConfig) -> None:
    """Refuse a user's extraction code that cannot be used; warn of an online phase without an environment."""
    if config.agent.algorithm == "acrlpd":
        config.agent.make_extraction(config.agent.flow_steps)
    if config.env is None and config.online_steps:
        logger.warning("no online phase: online_steps is %d, but env.name names no environment", config.online_steps)


@dataclasses.dataclass(frozen=True)
class _Prior:
    """The prior data of a run, opened and checked."""

    sources: Sequence[Dataset]
    mixture: Mixture
    dims: Dims
    fingerprint: Fingerprint

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.mixture.cameras

    @property
    def fps(self) -> float | None:
        rates = {each.fps for each in self.sources}
        return rates.pop() if len(rates) == 1 else None


def _unchanging_params(config: TrainConfig, prior: _Prior) -> Path | None:
    """Return the folder of parameters that checkpoints link, because no update changes them; None if there is none."""
    if not config.policy.frozen:
        return None
    return linking.unchanging_params(config.policy, abstract_agent(config, prior.dims, prior.cameras).acting_policy)


def _open_prior(config: TrainConfig, spec: EnvSpec | None) -> _Prior:
    sources = open_sets(config)
    check_instructions(config, sources, spec)
    mixture = open_mixture(config, sources)
    dims = Dims(mixture.stores[0].state.shape[1], mixture.stores[0].actions.shape[1])
    check_stores(config, mixture, dims, spec)
    return _Prior(sources, mixture, dims, fingerprint(mixture.stores))


def _open_held_out(config: TrainConfig, sources: Sequence[Dataset]) -> HeldOut | None:
    """Open the episodes on which a run without an environment is evaluated; None if it holds none out."""
    kept = held_out_of(sources)
    if not kept:
        return None
    limit = HELD_OUT_BYTES if config.data.memory_bytes is None else min(config.data.memory_bytes, HELD_OUT_BYTES)
    stores = windows.open_stores(kept, memory_bytes=limit, num_workers=config.data.num_workers)
    whole = [each.whole for each in sources if isinstance(each, Part)]
    return HeldOut(tuple(stores), offline_evaluation.spread_of(whole), config.eval.held_out_chunks)


HELD_OUT_BYTES = 1 << 30  # of pictures of held-out episodes in memory; each evaluation reads the same ones


def make_loader(
    config: TrainConfig,
    prior: Mixture,
    transform: Transform,
    interaction: Interaction | None,
    agent: ACRLPDAgent,
    stats: Mapping[str, NormStats],
) -> ChunkLoader:
    """Make the loader of this process, for prior data and online episodes, with stored prefixes where they are used."""
    stored = features = next_features = None
    data = [Path(each.path) for each in prior_sets(config)]
    if all(path.exists() for path in data):
        folder = Path(config.run_dir) / "prefixes"
        rows = functools.partial(prefixes.open_rows, config, agent, prior, transform, stats, data=data, folder=folder)
        if prefixes.is_legal(config):
            stored = rows()
            if config.agent.target == "implicit":
                next_features = [each.features_alone() for each in stored] if stored else rows(features_alone=True)
        if prefixes.are_features_of_use(config, agent):
            features = rows(features_alone=True)
    return make_chunk_loader(
        config,
        prior,
        transform,
        prefixes=stored,
        features=features,
        next_features=next_features,
        next_actions=config.agent.target != "implicit",
        replay=interaction.replay if interaction else None,
        host_index=jax.process_index(),
        num_hosts=jax.process_count(),
    )


def make_interaction(
    config: TrainConfig, files: RunFiles, progress: Progress, *, override: Collection[str] = ()
) -> Interaction:
    """Make the online side of a run; its replay gets every episode in the journal of a resumed run, once."""
    journal = ReplayJournal(files.replay)
    replay = EpisodeStore(max_bytes=config.data.max_replay_bytes)
    journal_steps = 0
    for episode in journal.load(lambda damaged: resuming.check_journal(journal, damaged, progress, override)):
        replay.append(episode)
        journal_steps += len(episode)
    progress.next_episode, progress.journal_episodes = journal.next_number, len(journal)
    if not ending.online_is_over(config, progress):
        progress.count_from(journal_steps)
    collector = rollout.OnlineCollector(
        make_environments(config, config.online_envs),
        seed=config.seed,
        execute_horizon=config.executed_steps,
        first_episode=ONLINE_FIRST_EPISODE,
        finished={entry["episode"] for entry in journal.metadata() if "episode" in entry},
    )
    return Interaction(collector, journal, replay)


ONLINE_FIRST_EPISODE = 1_000_000  # away from the prior data's episodes, which count from 0 under the same seed


def make_environments(config: TrainConfig, count: int) -> VectorEnv:
    if config.env is None:
        raise ValueError("this run has no environment: set env.name")
    return make_vector(config.env, count, config.rollout)
