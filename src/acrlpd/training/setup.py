"""Construction of the parts of a run from its configuration: data, transforms, policy, agent, environments."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import jax
from flax import nnx
from jax.experimental import multihost_utils

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import PolicyConfig, TrainConfig, from_stored
from acrlpd.data import chunks, instructions, normalize, statistics, windows
from acrlpd.data.episodes import EpisodeStore
from acrlpd.data.frame_cache import FrameCache
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.mixture import Facts, Mixture, check_alike
from acrlpd.data.normalize import NormStats
from acrlpd.data.options import DataSource
from acrlpd.data.replay import ReplayJournal
from acrlpd.data.robots import mapping
from acrlpd.data.sources import Dataset, open_episodes
from acrlpd.data.tokenizer import PromptTokenizer
from acrlpd.data.transforms import Compose, TokenizePrompt, Transform, to_model
from acrlpd.envs import rollout
from acrlpd.envs.env import EnvSpec
from acrlpd.envs.registry import make_vector
from acrlpd.envs.vector import VectorEnv
from acrlpd.files import read_json
from acrlpd.models import weights as policy_weights
from acrlpd.models.flow import FlowPolicy
from acrlpd.models.gaussian import ChunkGaussianConfig
from acrlpd.models.mlp_flow import MLPFlowConfig
from acrlpd.models.pi0 import CAMERAS, Pi0, Pi0Config
from acrlpd.models.recognize import recognize
from acrlpd.training import ending, overwriting, prefixes, resuming
from acrlpd.training.checkpoint import ACRLPDCheckpointManager, DamagedCheckpoint
from acrlpd.training.collection import collect_prior
from acrlpd.training.fingerprint import fingerprint
from acrlpd.training.guards import RunLock
from acrlpd.training.loop import ACRLPDTrainer
from acrlpd.training.optimizer import make_optimizers
from acrlpd.training.overwriting import Replaced
from acrlpd.training.run import Interaction, Progress, RunFiles, settle_best
from acrlpd.training.sharding import make_mesh, parameter_sharding

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Dims:
    """Sizes of the robot's own state and action, before any padding."""

    state: int
    action: int


def run_files(config: TrainConfig) -> RunFiles:
    name = config.name
    if name in ("", ".", "..") or not name.isprintable() or any(separator in name for separator in "/\\"):
        raise ValueError(
            f"name {name!r}: expected the name of one folder below run_dir, without separators or control characters"
        )
    return RunFiles(Path(config.run_dir) / name)


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
        trainer = _make_trainer(config, files, lock, resume, override, from_step, replaced)
        failed.pop_all()
    return trainer


def _make_trainer(
    config: TrainConfig,
    files: RunFiles,
    lock: RunLock | None,
    resume: bool,
    override: Collection[str],
    from_step: int | None,
    replaced: Replaced | None,
) -> ACRLPDTrainer:
    resuming.claim_directory(config, files, resume=resume, override=override)
    if config.agent.algorithm == "acrlpd":
        config.agent.make_extraction(config.agent.flow_steps)  # refuses a user's extraction code that cannot be used
    if config.env is None and config.online_steps:
        logger.warning("no online phase: online_steps is %d, but env.name names no environment", config.online_steps)
    environments = make_environments(config, config.eval.num_envs) if config.env else None
    spec = environments.spec if environments else None
    sources = open_sets(config)
    check_instructions(config, sources, spec)
    prior = open_mixture(config, sources)
    dims = Dims(prior.stores[0].state.shape[1], prior.stores[0].actions.shape[1])
    _check_stores(config, prior, dims, spec)
    contents = fingerprint(prior.stores)
    checkpoints = ACRLPDCheckpointManager(
        files.checkpoints,
        max_to_keep=config.max_to_keep,
        keep_period=config.keep_period,
        keep=(config.offline_steps,),
        writer=True,
    )

    def fresh_agent() -> ACRLPDAgent:
        return make_agent(config, dims, prior.cameras, weights=config.policy.weights)

    if checkpoints.steps() or from_step is not None:
        agent, progress, stats = resuming.resume_from(
            files,
            checkpoints,
            make_agent(config, dims, prior.cameras),
            from_step,
            config=config,
            prior=(", ".join(prior.names), contents),
            override=override,
        )
    else:
        resuming.check_nothing_was_learned(config, files, checkpoints)
        agent, progress = fresh_agent(), Progress()
        stats = make_norm_stats(config, prior, sources, spec)
    settle_best(progress, Progress(), checkpoints, files)
    transform = make_transform(config, stats, dims, prior.cameras)
    interaction = None
    if config.env and config.online_steps:
        interaction = make_interaction(config, files, progress, override=override)
    return ACRLPDTrainer(
        agent,
        make_loader(config, prior, transform, interaction, agent, stats),
        config,
        transform=transform,
        norm_stats=stats,
        files=files,
        checkpoints=checkpoints,
        progress=progress,
        interaction=interaction,
        eval_environments=environments,
        fresh_agent=fresh_agent,
        lock=lock,
        replaced=replaced,
        prior=contents,
    )


def _check_stores(config: TrainConfig, prior: Mixture, dims: Dims, spec: EnvSpec | None) -> None:
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


def check_instructions(config: TrainConfig, sources: Sequence[Dataset], spec: EnvSpec | None) -> None:
    """Warn of missing instructions if the policy reads them; refuse several tasks that share an empty instruction."""
    if not config.policy.traits.has_backbone:
        return
    if spec is not None and not spec.instruction.strip():
        logger.warning("%s has no instruction, and the policy reads one: say it with --env.instruction", spec.name)
    names = [each.path for each in prior_sets(config)]
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


def make_loader(
    config: TrainConfig,
    prior: Mixture,
    transform: Transform,
    interaction: Interaction | None,
    agent: ACRLPDAgent,
    stats: Mapping[str, NormStats],
) -> ChunkLoader:
    """Make the loader of this process, for prior data and online episodes, with stored prefixes where they are used."""
    stored = features = None
    data = [Path(each.path) for each in prior_sets(config)]
    if all(path.exists() for path in data):
        folder = Path(config.run_dir) / "prefixes"
        rows = functools.partial(prefixes.open_rows, config, agent, prior, transform, stats, data=data, folder=folder)
        if prefixes.is_legal(config):
            stored = rows()
        if prefixes.are_features_of_use(config, agent):
            features = rows(features_alone=True)
    return ChunkLoader(
        prior,
        transform,
        prefixes=stored,
        features=features,
        batch_size=config.data.batch_size,
        horizon=config.policy.action_horizon,
        sequence_ratio=config.data.sequence_ratio,
        seed=config.seed,
        replay=interaction.replay if interaction else None,
        online_ratio=config.data.online_ratio,
        online_ratio_episodes=config.data.online_ratio_episodes,
        ends_in_chunks=config.data.ends_in_chunks,
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


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained agent with what it needs to act."""

    agent: ACRLPDAgent
    transform: Transform
    config: TrainConfig
    step: int


def load_checkpoint(path: str | Path, *, extraction: str | None = None) -> Loaded:
    """Return the agent of a checkpoint, sharded over devices as in training if their number allows it.

    ``path`` is a run (its best policy, or the newest if none was evaluated), its ``checkpoints`` folder (the newest),
    the folder of one step, or RUN/best. Loading runs no code that the checkpoint names, but a script that makes
    environments from its ``config`` runs the code that ``config.env.name`` names.

    ``extraction`` replaces the one that the agent was trained with. An agent that was trained with a user's extraction,
    which is code, acts only if that code or a built-in extraction is named here.
    """
    loaded = load_stored(path, extraction)
    env = loaded.config.env
    return loaded if env is None else dataclasses.replace(loaded, config=with_task(loaded.config, str(env.name)))


def load_stored(path: str | Path, extraction: str | None = None) -> Loaded:
    """Load as ``load_checkpoint``, for a command, which runs only code that its user names: see ``StoredName``."""
    loaded = read_policy(Path(path), _load)
    if extraction is None:
        return loaded
    config = with_extraction(loaded.config, extraction)
    return dataclasses.replace(loaded, agent=loaded.agent.with_extraction(extraction), config=config)


def read_policy(path: Path, read: Callable[[ACRLPDCheckpointManager, int], T]) -> T:
    """Read the checkpoint that ``path`` names: for a run its best one, for a folder of several the newest.

    If that one is damaged and ``path`` does not name it explicitly, log an error and read another one.
    """
    directory, step = locate_checkpoint(path)
    manager = ACRLPDCheckpointManager(directory)
    if step is not None:
        return read(manager, step)
    kept = kept_step(path)
    if kept is not None:
        try:
            return read(manager, kept)
        except DamagedCheckpoint as error:
            logger.error("%s. It is the best of %s: falling back to the newest.", error, path)
    return manager.newest(functools.partial(read, manager))


def kept_step(path: Path) -> int | None:
    """Return the step of the best policy of the run ``path``; None if no evaluation chose one, or it is gone.

    The best is chosen by the evaluations on the way, which use other seeds than the run's results.
    """
    if not (path / "checkpoints").is_dir() or not RunFiles(path).best.is_file():
        return None
    step = _best_step(RunFiles(path).best)
    return step if step in ACRLPDCheckpointManager(path / "checkpoints").steps() else None


def _load(manager: ACRLPDCheckpointManager, step: int) -> Loaded:
    known = read_interface(manager, step)
    config = known.config
    here = dataclasses.replace(config, fsdp_devices=1) if jax.device_count() % config.fsdp_devices else config
    restored = manager.restore(make_agent(here, known.dims, known.cameras), step)
    return Loaded(restored.agent, make_transform(config, known.stats, known.dims, known.cameras), config, restored.step)


@dataclasses.dataclass(frozen=True)
class SavedInterface:
    """The configuration, statistics and cameras in a checkpoint: enough to make an agent of the same shapes."""

    config: TrainConfig
    stats: dict[str, NormStats]
    cameras: tuple[str, ...]

    @property
    def dims(self) -> Dims:
        return Dims(len(self.stats["state"].mean), len(self.stats["actions"].mean))


def read_interface(manager: ACRLPDCheckpointManager, step: int) -> SavedInterface:
    """Read everything except the arrays. Like reading them, this raises ``DamagedCheckpoint``."""
    run, stats = manager.read_run(step), manager.read_norm_stats(step)
    try:
        config = from_stored(run["config"])
    except ValueError as error:
        raise ValueError(f"checkpoint {manager.directory / str(step)}: {error}") from error
    return SavedInterface(config, stats, tuple(run["cameras"]))


def locate_checkpoint(path: Path) -> tuple[Path, int | None]:
    """Return the checkpoints folder, and the step if ``path`` names one; ``<run>/best`` names the best evaluation's."""
    overwriting.tell_of_set_aside(path)
    best = RunFiles(path.parent).best
    if is_best(path):
        return RunFiles(path.parent).checkpoints, _best_step(best)
    if not path.is_dir():
        raise ValueError(f"checkpoint {path} is not a folder. Name a run (runs/demo), or a step below its checkpoints.")
    if path.name.isdigit():
        return path.parent, int(path.name)
    return (path / "checkpoints", None) if (path / "checkpoints").is_dir() else (path, None)


def is_best(path: Path) -> bool:
    """Return whether ``path`` is ``<run>/best``, which names a run's best checkpoint but is not a folder."""
    return path.name == "best" and RunFiles(path.parent).best.is_file()


def _best_step(file: Path) -> int:
    step = read_json(file, allow_nan=True).get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(
            f"{file}: expected the step of the best evaluation, found {step!r:.100}. Without this file, the newest "
            "checkpoint is taken"
        )
    return step


def prior_sets(config: TrainConfig) -> tuple[DataSource, ...]:
    """Return the data sets of the prior episodes: those given, or the one collected in the run's own folder."""
    own = DataSource(path=str(run_files(config).directory / "prior"))
    return config.data.sets or (own.over(config.data),)


def open_sets(config: TrainConfig) -> list[Dataset]:
    """Open every data set of the prior episodes."""
    return [open_prior(config, number) for number in range(len(prior_sets(config)))]


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


def make_transform(
    config: TrainConfig, stats: Mapping[str, NormStats], dims: Dims, cameras: tuple[str, ...] | None = None
) -> Transform:
    """Return the transform from raw to model observations, in openpi's order; serving uses the same list.

    ``cameras`` are the data's cameras to read; all others are ignored. None reads all.
    """
    policy = config.policy
    return to_model(
        before_normalization(config),
        stats,
        TokenizePrompt(make_tokenizer(policy), policy.traits.state_in_prompt),
        quantiles=has_quantiles(config),
        image_size=policy.image_size,
        action_dim=policy.action_dim,
        robot_action_dim=dims.action,
        cameras=None if cameras is None else model_cameras(config, cameras),
    )


def make_tokenizer(policy: PolicyConfig) -> PromptTokenizer:
    """Make the prompt tokenizer; only policies with a backbone read its tokens."""
    vocab_size = policy.vocab_size if policy.traits.has_backbone else None
    return PromptTokenizer(policy.tokenizer, max_length=policy.max_token_len, vocab_size=vocab_size)


def has_quantiles(config: TrainConfig) -> bool:
    """Return whether states and actions are normalized by quantiles instead of mean and standard deviation."""
    return config.policy.traits.state_in_prompt or config.data.action_normalization == "quantile"


def before_normalization(config: TrainConfig) -> list[Transform]:
    """Return the transforms before normalization; none if the data is used unchanged."""
    return mapping.before_normalization(
        config.data.robot, config.data.delta_mask, pi05=config.policy.traits.state_in_prompt
    )


def delta_mask(config: TrainConfig) -> tuple[bool, ...]:
    """Return which action dimensions are relative to the state for the policy."""
    return mapping.delta_mask(config.data.robot, config.data.delta_mask, pi05=config.policy.traits.state_in_prompt)


def model_cameras(config: TrainConfig, cameras: tuple[str, ...]) -> tuple[str, ...]:
    """Return the model's camera names for the data's ``cameras``."""
    return cameras if config.data.robot is None else CAMERAS


def make_policy(config: PolicyConfig, dims: Dims, cameras: tuple[str, ...], rngs: nnx.Rngs) -> FlowPolicy:
    """Make a policy of the configured kind with fresh parameters."""
    sizes = (dims.state, dims.action, config.action_horizon, config.hidden_dims)
    if config.kind == "mlp_flow":
        return MLPFlowConfig(*sizes).create(rngs)
    if config.kind == "gaussian":  # it is no flow, but rlpd_ac, its only user, never uses it as one
        return cast(FlowPolicy, ChunkGaussianConfig(*sizes).create(rngs))
    return pi0_config(config, dims, cameras).create(rngs)


def pi0_config(config: PolicyConfig, dims: Dims, cameras: tuple[str, ...]) -> Pi0Config:
    """Return the model configuration. openpi uses one width for state and action; a small model the data's two."""
    return Pi0Config(
        pi05=config.traits.state_in_prompt,
        action_dim=config.action_dim or dims.action,
        state_dim=config.action_dim or dims.state,
        action_horizon=config.action_horizon,
        max_token_len=config.max_token_len,
        paligemma_variant=config.paligemma_variant,
        action_expert_variant=config.action_expert_variant,
        vision_variant=config.vision_variant,
        vocab_size=config.vocab_size or make_tokenizer(config).vocab_size,
        image_size=config.image_size,
        cameras=cameras,
        dtype=config.dtype,
        remat=config.remat,
        unroll=config.unroll,
    )


def make_agent(config: TrainConfig, dims: Dims, cameras: tuple[str, ...], *, weights: str | None = None) -> ACRLPDAgent:
    """Make a fresh agent, placed on the mesh; its policy starts from ``weights`` if given."""
    agent = create_agent(config, dims, cameras, weights=weights)
    return jax.device_put(agent, parameter_sharding(make_mesh(config.fsdp_devices), agent))


def create_agent(
    config: TrainConfig, dims: Dims, cameras: tuple[str, ...], *, weights: str | None = None
) -> ACRLPDAgent:
    """Make a fresh agent on JAX's default device. Without weights it can be traced, for shapes without memory."""
    if weights is not None and config.policy.traits.has_backbone and config.policy.vocab_size is not None:
        make_tokenizer(config.policy).check_trained(config.policy.vocab_size)
    policy_rng, agent_rng = jax.random.split(jax.random.key(config.seed))
    policy = make_policy(config.policy, dims, model_cameras(config, cameras), nnx.Rngs(params=policy_rng))
    if weights is not None:
        load_weights(policy, weights)
    trainable = trainable_part(config.policy, policy)
    _keep_frozen_in(config.policy.frozen_dtype, policy, trainable)
    return ACRLPDAgent.create(
        config.agent,
        policy,
        make_optimizers(config.optimizers),
        state_dim=config.policy.action_dim or dims.state,
        action_dim=dims.action,
        rng=agent_rng,
        trainable=trainable,
    )


def load_weights(policy: FlowPolicy, path: str) -> None:
    """Load a checkpoint's parameters into ``policy``. A bare PaliGemma leaves the other ones fresh, as in openpi."""
    arrays = policy_weights.read_params(path)
    bare = recognize(arrays).get("model") == "paligemma"
    may_miss = policy_weights.NOT_IN_PALIGEMMA if bare else policy_weights.LORA
    policy_weights.load_into(cast(nnx.Module, policy), arrays, may_miss=may_miss, source=path)
    logger.info("policy: %d arrays from %s", len(arrays), path)


def with_task(config: TrainConfig, task: str) -> TrainConfig:
    """Return the configuration with another environment of the run's robot, whose instruction is its own.

    Passing the run's own environment name as plain text permits running the code that the checkpoint names.
    """
    if config.env is None:
        raise ValueError("this run has no environment: set env.name")
    instruction = config.env.instruction if task == config.env.name else None
    return dataclasses.replace(config, env=dataclasses.replace(config.env, name=task, instruction=instruction))


def with_extraction(config: TrainConfig, name: str) -> TrainConfig:
    """Return the configuration with another extraction. Passing its own as plain text permits running its code."""
    return dataclasses.replace(config, agent=dataclasses.replace(config.agent, extraction=name))


def make_environments(config: TrainConfig, count: int) -> VectorEnv:
    if config.env is None:
        raise ValueError("this run has no environment: set env.name")
    return make_vector(config.env, count, config.rollout)


def trainable_part(config: PolicyConfig, policy: FlowPolicy) -> Callable[[str], bool]:
    """Return which paths train: all except weights that adapters replace (openpi's rule) and a frozen backbone."""
    if not isinstance(policy, Pi0):
        return lambda path: True
    freezes, frozen_backbone = policy.config.freezes, config.freeze_pi0_backbone
    return lambda path: not freezes(path) and (policy.is_suffix_param(path) or not frozen_backbone)


def _keep_frozen_in(dtype: str, policy: FlowPolicy, trainable: Callable[[str], bool]) -> None:
    frozen = nnx.filter_state(nnx.state(policy), lambda path, _: not trainable("/".join(map(str, path))))
    nnx.update(policy, jax.tree.map(lambda array: array.astype(dtype), frozen))
