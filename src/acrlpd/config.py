"""The complete configuration of a run: fields and validation only. Presets fill it, the command line overrides it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from acrlpd import files
from acrlpd.agents.config import AgentConfig
from acrlpd.agents.losses import LossWeights
from acrlpd.data.options import DataSource, ReaderOptions
from acrlpd.data.rewards import RewardConfig
from acrlpd.data.robots.mapping import Robot
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.vector import RolloutConfig
from acrlpd.models import gemma
from acrlpd.models.kinds import POLICY_KINDS, PolicyKind
from acrlpd.named_code import StoredName, names_code

T = TypeVar("T")
PolicyName = Literal["pi0", "pi05", "mlp_flow", "gaussian"]
LoggerKind = Literal["tensorboard", "wandb", "trackio"]


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The kind of policy and its sizes. State and action size come from the data unless the model is wider."""

    kind: PolicyName = "pi0"
    action_horizon: int = 50
    action_dim: int | None = None  # the model's width; actions and state are zero-padded to it. None: the data's sizes
    paligemma_variant: str = "gemma_2b"
    action_expert_variant: str = "gemma_300m"
    vision_variant: str = "so400m_14"
    vocab_size: int | None = None  # None: the tokenizer's
    max_token_len: int = 48
    image_size: int = 224
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # for computation; parameters are float32
    remat: bool = True  # recompute activations in the backward pass
    unroll: bool = False  # write out the layers instead of a loop: slower to compile, faster with few layers
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # only for mlp_flow and gaussian
    tokenizer: str | None = None  # a SentencePiece file; None: the small one in this package
    weights: str | None = None  # start from this checkpoint; None: from scratch
    freeze_pi0_backbone: bool = False  # image tower and vision-language expert; LoRA variants always freeze their bases
    frozen_dtype: Literal["bfloat16", "float32"] = "float32"  # dtype in which frozen parameters are stored

    def __post_init__(self):
        for name in ("action_horizon", "action_dim", "vocab_size", "max_token_len", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"policy.{name} must be at least 1, got {value}")
        if any(width < 1 for width in self.hidden_dims):
            raise ValueError(f"policy.hidden_dims must be at least 1 each, got {self.hidden_dims}")
        if self.freeze_pi0_backbone and not self.traits.has_backbone:
            raise ValueError(f"policy.freeze_pi0_backbone needs a pi0 policy: {self.kind} has no backbone")
        if self.frozen_dtype != "float32" and not (self.freeze_pi0_backbone or self.has_lora):
            raise ValueError(
                f"policy.frozen_dtype={self.frozen_dtype!r} has no effect: no parameter is frozen. Set "
                "policy.freeze_pi0_backbone, choose a LoRA variant, or leave frozen_dtype at its default"
            )

    @property
    def traits(self) -> PolicyKind:
        """The properties of this kind of policy."""
        return POLICY_KINDS[self.kind]

    @property
    def has_lora(self) -> bool:
        """Return whether LoRA adapters train instead of the weights that they adapt."""
        variants = (self.paligemma_variant, self.action_expert_variant)
        return self.traits.has_backbone and any(gemma.get_config(variant).has_lora for variant in variants)


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """How to collect prior data if none is given: an expert with smooth noise, whose strength is drawn per episode."""

    episodes: int = 100
    policy: Literal["expert", "random"] = "expert"
    noise_range: tuple[float, float] = (0.0, 0.8)
    num_workers: int = 1  # processes

    def __post_init__(self):
        for name in ("episodes", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.collect.{name} must be at least 1, got {getattr(self, name)}")
        low, high = self.noise_range
        if not 0 <= low <= high:
            raise ValueError(f"data.collect.noise_range must be 0 <= low <= high, got {self.noise_range}")


@dataclasses.dataclass(frozen=True)
class DataConfig(ReaderOptions):
    """Prior data, how to read it, batches and replay."""

    path: str | tuple[str, ...] | None = None  # one or several data sets in a supported format; None: the run collects
    weights: tuple[float, ...] = ()  # relative sampling weight of each path; empty: every step is equally likely
    sources: tuple[DataSource, ...] = ()  # replaces path and weights when data sets need options of their own
    action_dim: int | None = None  # the robot's; data of another robot is refused. None: whatever the data has
    robot: Robot | None = None  # convert the data as openpi's checkpoints for this robot expect it; None: unchanged
    delta_mask: tuple[int, ...] | None = (
        None  # 6 -1: six actions are relative to the state, one is not; 0: none are; None: the robot's mask
    )
    frame_cache: str | None = None  # folder that `acrlpd data cache` filled at policy.image_size
    rewards: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    on_bad_episode: Literal["error", "skip"] = "error"  # for an episode that cannot be used; skip warns and goes on
    memory_bytes: int | None = None  # max data in memory, the rest is read on demand; None: half of physical memory
    prefix_bytes: int = 4 * 1024**3  # max disk space for a frozen backbone's outputs; larger ones are not stored
    num_workers: int = 0  # processes that read many episodes when they are opened, and decode what is not in memory
    collect: CollectConfig = dataclasses.field(default_factory=CollectConfig)
    batch_size: int = 256
    sequence_ratio: float = 0.5  # share of a batch whose rows start where a whole chunk fits
    online_ratio: float | None = 0.5  # share of an online batch from replay (RLPD); None: all rows are equally likely
    online_ratio_episodes: int = (
        25  # online episodes at which online_ratio is reached; until then the share grows linearly
    )
    ends_in_chunks: bool = True  # chunks that a terminal cuts short count in the TD loss; QC drops them
    max_replay_bytes: int = 2 * 1024**3
    norm_stats: str | None = None  # openpi's norm_stats.json, its folder, or a checkpoint with assets; None: computed
    min_std: float = 1e-2  # floor of a state dimension's standard deviation when statistics are computed
    action_normalization: Literal["bounds", "z_score", "quantile"] = "bounds"  # bounds: those of the action space

    def __post_init__(self):
        self._check_sets()
        positive = ("batch_size", "action_dim", "max_replay_bytes", "online_ratio_episodes")
        for name, least in (*((name, 1) for name in positive), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} must be at least {least}, got {value}")
        for name in ("memory_bytes", "prefix_bytes", "min_std"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"data.{name} must be finite and not negative, got {value}")
        for name in ("sequence_ratio", "online_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 <= ratio <= 1:
                raise ValueError(f"data.{name} must lie in [0, 1], got {ratio}")
        if (self.robot or any(n > 0 for n in self.delta_mask or ())) and self.action_normalization == "bounds":
            raise ValueError(
                "data.action_normalization='bounds' applies to the environment's own actions, which data.robot and "
                "data.delta_mask change: use 'z_score' (openpi's for pi0) or 'quantile' (for pi0.5)"
            )
        if self.norm_stats is not None and self.action_normalization == "bounds":
            raise ValueError(
                "data.action_normalization='bounds' uses the environment's action space, but data.norm_stats brings "
                "statistics of the actions, too: use 'z_score' (openpi's for pi0) or 'quantile' (for pi0.5)"
            )

    def _check_sets(self) -> None:
        """Refuse weights and options that do not fit the named data sets."""
        if self.sources and (self.path is not None or self.weights):
            raise ValueError("data.sources exclude data.path and data.weights: each of them has a path and a weight")
        if "" in self._paths or self.path == ():
            raise ValueError("a data set needs a path: name it in data.path, or in each of data.sources")
        count = len(self.sources or self._paths)
        weights = [each.weight for each in self.sources if each.weight is not None] or self.weights
        if weights and (len(weights) != count or count == 1):
            raise ValueError(f"weights need several data sets, one for each: got {len(weights)} for {count}")
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"the weights of data sets must be finite and above 0, got {weights}")
        for each in (self, *self.sets):
            each.check()
        if count > 1 and self.frame_cache is not None:
            raise ValueError("a frame cache is of one data set: say frame_cache of each in data.sources")

    @property
    def _paths(self) -> tuple[str, ...]:
        if self.sources:
            return tuple(each.path for each in self.sources)
        return () if self.path is None else (self.path,) if isinstance(self.path, str) else self.path

    @property
    def name(self) -> str | None:
        """The name of the prior data in results."""
        return " + ".join(self._paths) or None

    @property
    def sets(self) -> tuple[DataSource, ...]:
        """The named data sets, each with all of its options; if there are none, the run collects its own."""
        weights = self.weights or (None,) * len(self._paths)
        pairs = zip(self._paths, weights, strict=True)
        sets = self.sources or [DataSource(path=path, weight=weight) for path, weight in pairs]
        return tuple(each.over(self) for each in sets)


@dataclasses.dataclass(frozen=True)
class CosineDecaySchedule:
    """Linear warm-up to ``peak_lr``, then cosine to ``decay_lr`` at ``decay_steps``, counted from step 0 (openpi).

    With ``rsqrt_timescale`` the rate falls as 1 / sqrt(1 + steps since the warm-up / timescale) instead, without end.
    """

    warmup_steps: int = 1000
    peak_lr: float = 2.5e-5
    decay_steps: int = 30_000
    decay_lr: float = 2.5e-6
    rsqrt_timescale: float | None = None

    def __post_init__(self):
        for name in ("warmup_steps", "peak_lr", "decay_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative or infinite, got {getattr(self, name)}")
        if self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps ({self.decay_steps}) counts from step 0 and must exceed warmup_steps "
                f"({self.warmup_steps})"
            )
        if self.rsqrt_timescale is not None and not self.rsqrt_timescale > 0:
            raise ValueError(f"rsqrt_timescale must be positive, got {self.rsqrt_timescale}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW after clipping by the global norm, as in openpi."""

    schedule: CosineDecaySchedule = dataclasses.field(default_factory=CosineDecaySchedule)
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip_gradient_norm: float = 1.0

    def __post_init__(self):
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("eps", "clip_gradient_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")


@dataclasses.dataclass(frozen=True)
class OptimizersConfig:
    """One optimiser per group of parameters."""

    policy: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    critic: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    temperature: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation in the simulator, always on the same seeds, so that all policies face the same tasks.

    The evaluations on the way choose the policy that a run keeps. They use other seeds than the evaluation at the end
    of a phase, so that its result is not biased by this choice.
    """

    episodes: int = 50  # at the end of each phase
    frequency: int = 10_000  # updates between evaluations on the way; half as many in the online phase
    progress_episodes: int = 50  # episodes of each evaluation on the way
    num_envs: int = 10  # environments side by side, with one policy call for all
    first_seed: int = 1_000_000  # for the end of a phase; far from the seeds of collection and training

    def __post_init__(self):
        for name in ("episodes", "frequency", "progress_episodes", "num_envs"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name} must be at least 1, got {getattr(self, name)}")
        if self.first_seed < 0:
            raise ValueError(f"eval.first_seed must not be negative, got {self.first_seed}")
        if self.episodes > PROGRESS_OFFSET:
            raise ValueError(f"eval.episodes must be at most {PROGRESS_OFFSET}, got {self.episodes}")

    @property
    def final_seeds(self) -> range:
        """Seeds of the episodes at the end of a phase."""
        return range(self.first_seed, self.first_seed + self.episodes)

    @property
    def progress_seeds(self) -> range:
        """Seeds of the evaluations on the way; none of them is a final seed."""
        first = self.first_seed + PROGRESS_OFFSET
        return range(first, first + self.progress_episodes)


PROGRESS_OFFSET = 500_000  # distance from the seeds at the end of a phase to those on the way


@dataclasses.dataclass(frozen=True)
class LoggerConfig:
    """The loggers that get the metrics in addition to ``metrics.jsonl``."""

    kinds: tuple[LoggerKind, ...] = ()
    project: str = "acrlpd_pi0"  # in wandb and trackio, where a run has the run's name
    wandb_mode: Literal["online", "offline", "disabled"] = "online"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The configuration of a run: policy, algorithm, data, lengths of the phases, and the place of its files."""

    preset: str | None = None  # name of the preset that it started from, for messages
    name: str = "run"
    run_dir: str = "runs"  # the run's own folder is run_dir/name
    seed: int = 0
    env: EnvConfig | None = None  # None: offline only, on data.path, regardless of online_steps
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    agent: AgentConfig = dataclasses.field(default_factory=AgentConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizers: OptimizersConfig = dataclasses.field(default_factory=OptimizersConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    offline_steps: int = 1_000_000  # updates
    online_steps: int = 500_000  # environment steps
    utd_ratio: float = 1.0  # updates per environment step
    updates_per_call: int = 1  # updates in one compiled call, which avoids the overhead between small updates
    warmup_env_steps: int = 0  # online steps of pure data collection before the first online update
    online_envs: int = 1  # environments that collect side by side
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    overlap_rollouts: bool = False  # execute chunks during updates, by a policy that is some updates old
    execute_horizon: int | None = None  # steps of a chunk that are executed, and judged by critics; None: all of them
    critic_alone_steps: int = 0  # first offline updates, which train only the critics, on the data's own next chunks
    actor_warmup_steps: int = 0  # updates before the actor loss counts, because the critic knows nothing at first
    online_loss_weights: LossWeights | None = None  # approached linearly after the offline phase; None: no change
    online_transition_steps: int = 1000  # online updates after which online_loss_weights are reached
    log_frequency: int = 100  # updates
    loggers: LoggerConfig = dataclasses.field(default_factory=LoggerConfig)
    save_frequency: int = 50_000  # updates
    max_to_keep: int = 2  # newest checkpoints, in addition to the best and the one at the end of the offline phase
    keep_period: int | None = None  # updates; checkpoints at multiples of it are never deleted
    max_skipped_updates: int = 10  # in a row, for NaN or spikes; then the run rolls back to a checkpoint before them
    max_rollbacks: int = 3  # after these the run ends; each rollback draws other batches and noise
    early_stopping_patience: int = 50  # online evaluations without a better result, after which the run ends
    early_stopping_success: float | None = None  # success rate of an online evaluation at which the run ends
    asset_id: str = "acrlpd"  # folder of the normalization statistics in a checkpoint, as openpi's
    fsdp_devices: int = 1

    def __post_init__(self):
        horizon = self.policy.action_horizon
        if self.execute_horizon is not None and not 1 <= self.execute_horizon <= horizon:
            raise ValueError(
                f"execute_horizon ({self.execute_horizon}) must lie between 1 and policy.action_horizon ({horizon}): "
                "the policy cannot execute more steps than it predicts. Lower it or train with a longer chunk."
            )
        judged = self.agent.critic.horizon
        if judged is not None and not self.executed_steps <= judged <= horizon:
            raise ValueError(
                f"agent.critic.horizon ({judged}) must lie between the steps that are executed ({self.executed_steps}) "
                f"and policy.action_horizon ({horizon}): critics judge all that is executed, and no more than is "
                "predicted. Leave it out to judge what is executed, or change execute_horizon."
            )
        steps = ("offline_steps", "online_steps", "warmup_env_steps", "actor_warmup_steps", "critic_alone_steps")
        for name in ("seed", *steps):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        counts = ("log_frequency", "save_frequency", "online_envs", "early_stopping_patience", "max_to_keep")
        for name in (*counts, "updates_per_call", "online_transition_steps", "fsdp_devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_skipped_updates < 1 or not 0 <= self.max_rollbacks <= 3:
            raise ValueError(
                "max_skipped_updates must be at least 1 and max_rollbacks lie in 0..3, "
                f"got {self.max_skipped_updates} and {self.max_rollbacks}"
            )
        if self.keep_period is not None and self.keep_period < 1:
            raise ValueError(f"keep_period must be at least 1, got {self.keep_period}")
        if self.early_stopping_success is not None and not 0 <= self.early_stopping_success <= 1:
            raise ValueError(f"early_stopping_success must lie in [0, 1], got {self.early_stopping_success}")
        if self.data.batch_size % self.agent.gradient_accumulation_steps:
            raise ValueError(
                f"agent.gradient_accumulation_steps ({self.agent.gradient_accumulation_steps}) must divide "
                f"data.batch_size ({self.data.batch_size})"
            )
        if (self.policy.kind == "gaussian") != (self.agent.algorithm == "rlpd_ac"):
            raise ValueError(
                f"agent.algorithm={self.agent.algorithm!r} does not go with policy.kind={self.policy.kind!r}: "
                "rlpd_ac needs the gaussian policy, and only rlpd_ac can use it (--algorithm rlpd-ac sets both)"
            )
        files.inside("assets", self.asset_id, "asset_id")
        if self.policy.traits.state_in_prompt and self.data.action_normalization == "z_score":
            raise ValueError(
                f"data.action_normalization='z_score' does not work with policy.kind={self.policy.kind!r}, which reads "
                "the state in 256 steps from -1 to 1 and so needs quantiles: use --data.action_normalization quantile"
            )
        if self.critic_alone_steps > self.offline_steps:
            raise ValueError(
                f"critic_alone_steps ({self.critic_alone_steps}) are the first of the offline_steps "
                f"({self.offline_steps}), so they cannot be more"
            )
        if self.critic_alone_steps and self.agent.algorithm == "bc":
            raise ValueError("critic_alone_steps must be 0 with agent.algorithm='bc', which does not use critics")
        if not 0 < self.utd_ratio < math.inf:
            raise ValueError(f"utd_ratio must be positive, got {self.utd_ratio}")
        if self.env is None and not self.data.sets:
            raise ValueError("a run needs data.path (a folder of episodes), env.name (to collect some), or both")

    @property
    def executed_steps(self) -> int:
        """The number of steps of each chunk that are executed."""
        return self.execute_horizon or self.policy.action_horizon

    @property
    def critic_horizon(self) -> int:
        """The number of steps of each chunk that critics judge, and that a TD target looks ahead."""
        return self.agent.critic.horizon or self.executed_steps

    def with_critic_horizon(self, horizon: int) -> TrainConfig:
        critic = dataclasses.replace(self.agent.critic, horizon=horizon)
        return dataclasses.replace(self, agent=dataclasses.replace(self.agent, critic=critic))


ACRLPDPi0Config = ACRLPDTrainingConfig = TrainConfig  # its two names in the founding design


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain JSON values."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, StoredName):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


class ConfigError(ValueError):
    """An error that lists everything wrong with a configuration, one problem per line."""


def from_dict(cls: type[T], values: Mapping[str, Any], *, base: T | None = None, judge: bool = True) -> T:
    """Make a configuration from the form of ``to_dict``; missing fields keep the value of ``base``, or the default.

    Without ``judge``, the values need not fit together yet: the caller changes the result once more and judges it then.

    Raises:
        ConfigError: unknown names, with the nearest valid one; values of the wrong kind or out of range. All at once.
    """
    problems: list[str] = []
    found = _build(cls, values, base, "", problems, judge)
    if judge and base is not None and not problems:
        problems += _faults(found)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return typing.cast(T, found)


def from_stored(values: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration stored in a checkpoint or run folder. Code it names is not run: see ``StoredName``.

    It names the critics' horizon, so that critics fit whatever is executed later. Runs of versions without that field
    have critics of whole chunks, also where they execute less.
    """
    config = from_dict(TrainConfig, values)
    has_field = "horizon" in values.get("agent", {}).get("critic", {})
    config = config.with_critic_horizon(config.critic_horizon if has_field else config.policy.action_horizon)
    if names_code(config.agent.extraction):
        agent = dataclasses.replace(config.agent, extraction=StoredName(config.agent.extraction))
        config = dataclasses.replace(config, agent=agent)
    if config.env is None:
        return config
    return dataclasses.replace(config, env=dataclasses.replace(config.env, name=StoredName(config.env.name)))


def _faults(config: Any) -> list[str]:
    """Return the errors of every part of a configuration, for a ``base`` that may not have been judged."""
    parts = [value for value in vars(config).values() if dataclasses.is_dataclass(value)]
    own = _refusal(getattr(config, "__post_init__", lambda: None), {})
    return [*(fault for part in parts for fault in _faults(part)), *([own] if own else [])]


def _unjudged(cls: type, base: Any, changes: Mapping[str, Any]) -> Any:
    """Return a ``cls`` made without its constructor, so without validation."""
    found: Any = object.__new__(cls)
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = default if base is None else getattr(base, field.name)
        object.__setattr__(found, field.name, changes.get(field.name, value))
    return found


def _build(cls: type, values: Mapping[str, Any], base: Any, path: str, problems: list[str], judge: bool) -> Any:
    """Build a ``cls`` from nested values. Errors are added to ``problems``; the result is then meaningless."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    changes = {}
    before = len(problems)
    for name, value in values.items():
        if name not in names:
            problems.append(_unknown(f"{path}{name}", name, names, path))
            continue
        part = _dataclass_of(hints[name])
        try:
            if part is not None and isinstance(value, Mapping):
                inner = None if base is None else getattr(base, name)
                changes[name] = _build(part, value, inner, f"{path}{name}.", problems, judge)
            else:
                changes[name] = _typed_value(hints[name], value, f"{path}{name}")
        except ValueError as error:
            problems.append(str(error))
    sound = {name: value for name, value in changes.items() if value is not None or values[name] is None}
    if not judge:
        return _unjudged(cls, base, sound)
    make = cls if base is None else functools.partial(dataclasses.replace, base)
    try:
        found = make(**sound)
    except ValueError as error:
        problems += _apart(make, sound) or [str(error)]
        return None
    return found if len(problems) == before else None


def _apart(make: Any, changes: Mapping[str, Any]) -> list[str]:
    """Return a message for each value that is wrong by itself, because a constructor stops at the first error."""
    guilty = [name for name, value in changes.items() if _refusal(make, {name: value})]
    good = {name: value for name, value in changes.items() if name not in guilty}
    messages = [_refusal(make, {**good, name: changes[name]}) for name in guilty]
    return [message for message in messages if message]


def _refusal(make: Any, changes: Mapping[str, Any]) -> str:
    try:
        make(**changes)
    except ValueError as error:
        return str(error)
    return ""


def _unknown(full: str, name: str, names: list[str], path: str) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {path}{near[0]}?" if near else f"there are {', '.join(names)}"
    return f"unknown configuration field {full}: {hint}"


def _dataclass_of(hint: Any) -> type | None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((typing.cast(type, option) for option in options if dataclasses.is_dataclass(option)), None)


def _typed_value(hint: Any, value: Any, path: str) -> Any:
    """Convert ``value`` to the field's type: lists become tuples, and 2e-5, which YAML reads as text, a number."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is_union(hint) else (hint,)
    if value is None and types.NoneType in options:
        return None
    kinds = [option for option in options if option is not types.NoneType]
    fitting = (kind for kind in kinds if (typing.get_origin(kind) is tuple) == isinstance(value, (list, tuple)))
    hint = next(fitting, kinds[0])
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _part(hint, value, path)
    if typing.get_origin(hint) is typing.Literal:
        return _chosen(typing.get_args(hint), value, path)
    if typing.get_origin(hint) is tuple:
        return _items(typing.get_args(hint), value, path)
    if hint in (int, float):
        return _number(hint, value, path)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise ValueError(f"{path}: expected {_KINDS.get(hint, 'a group of fields')}, got {value!r}")
    return value


def _part(kind: Any, values: Mapping[str, Any], path: str) -> Any:
    """Build one element of a list of dataclasses."""
    problems: list[str] = []
    found = _build(kind, values, None, f"{path}.", problems, judge=True)
    if problems:
        raise ConfigError("\n".join(problems))
    return found


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Union


def _chosen(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{path}: {value!r} is not a valid value. {hint}There are {', '.join(map(repr, choices))}")


def _items(hints: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{path}: expected a list, got {value!r}")
    kinds = [hints[0]] * len(value) if hints[-1] is Ellipsis else list(hints)
    if len(kinds) != len(value):
        raise ValueError(f"{path}: expected {len(kinds)} values, got {value!r}")
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_typed_value(kind, item, f"{path}[{place}]") for place, (kind, item) in pairs)


def _number(kind: type, value: Any, path: str) -> Any:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number) or (kind is int and not number.is_integer()):
        raise ValueError(f"{path}: expected {_KINDS[kind]}, got {value!r}")
    return value if type(value) is kind else kind(number)
