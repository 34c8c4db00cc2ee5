"""The complete configuration of a run: fields and validation only. Presets fill it, the command line overrides it."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from acrlpd import fields, files
from acrlpd.agents.config import AgentConfig
from acrlpd.agents.losses import LossWeights
from acrlpd.data.formats.options import DataSource, ReaderOptions
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.view.robots.mapping import Robot
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.vector import RolloutConfig
from acrlpd.fields import Interval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share
from acrlpd.models import gemma
from acrlpd.models.kinds import POLICY_KINDS, PolicyKind
from acrlpd.named_code import StoredName, names_code

T = TypeVar("T")
PolicyName = Literal["pi0", "pi05", "mlp_flow", "gaussian"]
LoggerKind = Literal["tensorboard", "wandb", "trackio"]


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The kind of policy and its sizes. State and action size come from the data unless the model is wider."""

    kind: PolicyName = "pi0"  # mlp_flow: a flow MLP on the state alone; gaussian: rlpd_ac's
    action_horizon: PositiveInt = 50  # steps of a chunk
    # the model's width; actions and state are zero-padded to it. None: the data's sizes
    action_dim: PositiveInt | None = None
    paligemma_variant: str = "gemma_2b"  # size of the vision-language expert (models/gemma.py); _lora: adapters train
    action_expert_variant: str = "gemma_300m"  # size of the action expert, likewise
    vision_variant: str = "so400m_14"  # size of the image tower (models/siglip.py)
    vocab_size: PositiveInt | None = None  # None: the tokenizer's
    max_token_len: PositiveInt = 48  # tokens of the prompt
    image_size: PositiveInt = 224  # pixels; pictures are resized to this height and width
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # for computation; parameters are float32
    remat: bool = True  # recompute activations in the backward pass
    unroll: bool = False  # write out the layers instead of a loop: slower to compile, faster with few layers
    hidden_dims: tuple[PositiveInt, ...] = (512, 512, 512, 512)  # only for mlp_flow and gaussian
    tokenizer: str | None = None  # a SentencePiece file; None: the small one in this package
    weights: str | None = None  # start from this checkpoint; None: from scratch
    # no parameter trains: critics alone learn, in critic_alone_steps, which are then all the steps
    frozen: bool = False
    freeze_pi0_backbone: bool = False  # image tower and vision-language expert; LoRA variants always freeze their bases
    frozen_dtype: Literal["bfloat16", "float32"] = "float32"  # dtype of frozen parameters; bfloat16 halves their memory

    def __post_init__(self):
        fields.check(self)
        if self.freeze_pi0_backbone and not self.traits.has_backbone:
            raise ValueError(f"policy.freeze_pi0_backbone needs a pi0 policy: {self.kind} has no backbone")
        if self.frozen_dtype != "float32" and not (self.frozen or self.freeze_pi0_backbone or self.has_lora):
            raise ValueError(
                f"policy.frozen_dtype={self.frozen_dtype!r} has no effect: no parameter is frozen. Set "
                "policy.frozen or freeze_pi0_backbone, choose a LoRA variant, or leave frozen_dtype at its default"
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

    episodes: PositiveInt = 100  # successes and failures
    policy: Literal["expert", "random"] = "expert"  # who acts
    noise_range: tuple[NonNegativeFloat, NonNegativeFloat] = (0.0, 0.8)  # from ... to, in the units of the actions
    num_workers: PositiveInt = 1  # processes

    def __post_init__(self):
        fields.check(self)
        if self.noise_range[0] > self.noise_range[1]:
            raise ValueError(f"data.collect.noise_range must be low <= high, got {self.noise_range}")


@dataclasses.dataclass(frozen=True)
class DataConfig(ReaderOptions):
    """Prior data, how to read it, batches and replay."""

    path: str | tuple[str, ...] | None = None  # one or several data sets in a supported format; None: the run collects
    weights: tuple[
        PositiveFloat, ...
    ] = ()  # relative sampling weight of each path; empty: every step is equally likely
    sources: tuple[DataSource, ...] = ()  # replaces path and weights when data sets need options of their own
    action_dim: PositiveInt | None = None  # the robot's; data of another robot is refused. None: whatever the data has
    robot: Robot | None = None  # convert the data as openpi's checkpoints for this robot expect it; None: unchanged
    # 6 -1: six actions are relative to the state, one is not; 0: none are; None: the robot's mask
    delta_mask: tuple[int, ...] | None = None
    frame_cache: str | None = None  # folder that `acrlpd data cache` filled at policy.image_size
    rewards: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    on_bad_episode: Literal["error", "skip"] = "error"  # for an episode that cannot be used; skip warns and goes on
    # share of each data set's episodes that are held out of training and statistics, to evaluate on; 0: none
    validation_fraction: Annotated[float, Interval("[0, 1)")] = 0.0
    validation_seed: NonNegativeInt = 0  # which episodes these are; not the run's seed, so that runs can be compared
    # max data in memory, the rest is read on demand; None: half of physical memory
    memory_bytes: NonNegativeInt | None = None
    # max disk space for a frozen backbone's outputs; larger ones are not stored
    prefix_bytes: NonNegativeInt = 4 * 1024**3
    # processes that read many episodes when they are opened, and decode what is not in memory
    num_workers: NonNegativeInt = 0
    collect: CollectConfig = dataclasses.field(default_factory=CollectConfig)
    batch_size: PositiveInt = 256  # chunks in an update
    sequence_ratio: Share = 0.5  # share of a batch whose rows start where a whole chunk fits
    online_ratio: Share | None = 0.5  # share of an online batch from replay (RLPD); None: all rows are equally likely
    # online episodes at which online_ratio is reached; until then the share grows linearly
    online_ratio_episodes: PositiveInt = 25
    ends_in_chunks: bool = True  # chunks that a terminal cuts short count in the TD loss; QC drops them
    max_replay_bytes: PositiveInt = 2 * 1024**3  # own episodes beyond this size are forgotten, the oldest first
    norm_stats: str | None = None  # openpi's norm_stats.json, its folder, or a checkpoint with assets; None: computed
    min_std: NonNegativeFloat = 1e-2  # floor of a state dimension's standard deviation when statistics are computed
    action_normalization: Literal["bounds", "z_score", "quantile"] = "bounds"  # bounds: those of the action space

    def __post_init__(self):
        fields.check(self)
        self._check_sets()
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
        for each in (self, *self.sets):
            each.check()
        if count > 1 and self.frame_cache is not None:
            raise ValueError("data.frame_cache holds the pictures of one data set: set that of each data.sources")

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

    warmup_steps: NonNegativeInt = 1000  # updates
    peak_lr: NonNegativeFloat = 2.5e-5  # learning rate after the warm-up
    decay_steps: PositiveInt = 30_000  # updates, the warm-up among them
    decay_lr: NonNegativeFloat = 2.5e-6  # learning rate from then on
    # updates; openpi's second schedule, without decay_steps and decay_lr. None: cosine
    rsqrt_timescale: Annotated[float, Interval("(0, inf]")] | None = None

    def __post_init__(self):
        fields.check(self)
        if self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps ({self.decay_steps}) counts from step 0 and must exceed warmup_steps "
                f"({self.warmup_steps})"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW after clipping by the global norm, as in openpi."""

    schedule: CosineDecaySchedule = dataclasses.field(default_factory=CosineDecaySchedule)
    b1: Annotated[float, Interval("[0, 1)")] = 0.9  # decay of the mean of the gradients
    b2: Annotated[float, Interval("[0, 1)")] = 0.95  # decay of the mean of their squares
    eps: PositiveFloat = 1e-8  # added to the root of that mean
    weight_decay: NonNegativeFloat = 1e-10  # decoupled, of all parameters
    clip_gradient_norm: Annotated[float, Interval("(0, inf]")] = 1.0  # of the group's whole gradient; inf: no clipping

    def __post_init__(self):
        fields.check(self)


@dataclasses.dataclass(frozen=True)
class OptimizersConfig:
    """One optimiser per group of parameters."""

    policy: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    critic: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    temperature: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self):
        fields.check(self)


PROGRESS_OFFSET = 500_000  # distance from the seeds at the end of a phase to those on the way


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation in the simulator, always on the same seeds, so that all policies face the same tasks.

    Without a simulator, actions are compared with those of held-out episodes, if ``data.validation_fraction`` asks for
    some. The evaluations on the way choose the policy that a run keeps. In a simulator they use other seeds than the
    evaluation at the end of a phase, so that its result is not biased by this choice.
    """

    episodes: Annotated[int, Interval(f"[1, {PROGRESS_OFFSET}]")] = 50  # at the end of each phase
    frequency: PositiveInt = 10_000  # updates between evaluations on the way; half as many in the online phase
    progress_episodes: PositiveInt = 50  # episodes of each evaluation on the way
    # recorded chunks in each evaluation of a run without an environment, on the episodes that it holds out
    held_out_chunks: PositiveInt = 256
    num_envs: PositiveInt = 10  # environments side by side, with one policy call for all
    first_seed: NonNegativeInt = 1_000_000  # for the end of a phase; far from the seeds of collection and training

    def __post_init__(self):
        fields.check(self)

    @property
    def final_seeds(self) -> range:
        """Seeds of the episodes at the end of a phase."""
        return range(self.first_seed, self.first_seed + self.episodes)

    @property
    def progress_seeds(self) -> range:
        """Seeds of the evaluations on the way; none of them is a final seed."""
        first = self.first_seed + PROGRESS_OFFSET
        return range(first, first + self.progress_episodes)


@dataclasses.dataclass(frozen=True)
class LoggerConfig:
    """The loggers that get the metrics in addition to ``metrics.jsonl``."""

    kinds: tuple[LoggerKind, ...] = ()  # each needs its package
    project: str = "acrlpd_pi0"  # in wandb and trackio, where a run has the run's name
    wandb_mode: Literal["online", "offline", "disabled"] = "online"  # wandb's own

    def __post_init__(self):
        fields.check(self)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The configuration of a run: policy, algorithm, data, lengths of the phases, and the place of its files."""

    preset: str | None = None  # name of the preset that it started from, for messages
    name: str = "run"  # of the run
    run_dir: str = "runs"  # the run's own folder is run_dir/name
    seed: NonNegativeInt = 0  # of parameters, batches, noise and training episodes
    env: EnvConfig | None = None  # None: offline only, on data.path, regardless of online_steps
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    agent: AgentConfig = dataclasses.field(default_factory=AgentConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizers: OptimizersConfig = dataclasses.field(default_factory=OptimizersConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    offline_steps: NonNegativeInt = 1_000_000  # updates
    online_steps: NonNegativeInt = 500_000  # environment steps
    utd_ratio: PositiveFloat = 1.0  # updates per environment step
    updates_per_call: PositiveInt = 1  # updates in one compiled call, which avoids the overhead between small updates
    warmup_env_steps: NonNegativeInt = 0  # online steps of pure data collection before the first online update
    online_envs: PositiveInt = 1  # environments that collect side by side
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    overlap_rollouts: bool = False  # execute chunks during updates, by a policy that is some updates old
    # steps of a chunk that are executed, and judged by critics; None: all of them
    execute_horizon: PositiveInt | None = None
    # first offline updates, which train only the critics, on the data's own next chunks
    critic_alone_steps: NonNegativeInt = 0
    # updates before the actor loss counts, because the critic knows nothing at first
    actor_warmup_steps: NonNegativeInt = 0
    online_loss_weights: LossWeights | None = None  # approached linearly after the offline phase; None: no change
    online_transition_steps: PositiveInt = 1000  # online updates after which online_loss_weights are reached
    log_frequency: PositiveInt = 100  # updates
    loggers: LoggerConfig = dataclasses.field(default_factory=LoggerConfig)
    save_frequency: PositiveInt = 50_000  # updates
    # newest checkpoints, in addition to the best and the one at the end of the offline phase
    max_to_keep: PositiveInt = 2
    keep_period: PositiveInt | None = None  # updates; checkpoints at multiples of it are never deleted
    # in a row, for NaN or spikes; then the run rolls back to a checkpoint before them
    max_skipped_updates: PositiveInt = 10
    # after these the run ends; each rollback draws other batches and noise
    max_rollbacks: Annotated[int, Interval("[0, 3]")] = 3
    early_stopping_patience: PositiveInt = 50  # online evaluations without a better result, after which the run ends
    early_stopping_success: Share | None = None  # success rate of an online evaluation at which the run ends
    asset_id: str = "acrlpd"  # folder of the normalization statistics in a checkpoint, as openpi's
    fsdp_devices: PositiveInt = 1  # devices that share large arrays; the others hold copies

    def __post_init__(self):
        fields.check(self)
        horizon = self.policy.action_horizon
        if self.execute_horizon is not None and self.execute_horizon > horizon:
            raise ValueError(
                f"execute_horizon ({self.execute_horizon}) exceeds policy.action_horizon ({horizon}): the policy "
                "cannot execute more steps than it predicts. Lower it or train with a longer chunk."
            )
        self.agent.horizons(horizon, self.executed_steps)
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
        if self.policy.frozen and (self.critic_alone_steps != self.offline_steps or (self.env and self.online_steps)):
            raise ValueError(
                "policy.frozen leaves critics alone to learn: set critic_alone_steps to the offline_steps "
                f"({self.offline_steps}), and online_steps to 0"
            )
        if self.env is None and not self.data.sets:
            raise ValueError("a run needs data.path (a folder of episodes), env.name (to collect some), or both")

    @property
    def executed_steps(self) -> int:
        """The number of steps of each chunk that are executed."""
        return self.execute_horizon or self.policy.action_horizon

    @property
    def critic_horizon(self) -> int:
        """The number of steps of each chunk that critics judge."""
        return self.agent.horizons(self.policy.action_horizon, self.executed_steps)[0]

    @property
    def backup_horizon(self) -> int:
        """The number of steps that a TD target looks ahead: more than critics judge if there are long critics."""
        return self.agent.horizons(self.policy.action_horizon, self.executed_steps)[1]

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
        ConfigError: unknown names, with the nearest valid one; values that a field does not allow; values that do not
            fit together. All problems are reported together; later checks use the value that the wrong one would have
            replaced.
    """
    problems: list[str] = []
    found = _build(cls, values, base, "", problems)
    if judge:
        problems += _contradictions(found)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return typing.cast(T, found)


def judged(config: T, base: T) -> T:
    """Return a configuration that was made without its constructor, if it is right; see ``from_dict`` for errors."""
    return from_dict(type(config), _nested(config), base=base)


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


def _nested(config: Any) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: _nested(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def unjudged(cls: type[T], values: Mapping[str, Any], base: T | None = None) -> T:
    """Return a ``cls`` made without its constructor, so without any check."""
    found = object.__new__(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = default if base is None else getattr(base, field.name)
        object.__setattr__(found, field.name, values.get(field.name, value))
    return found


def _contradictions(config: Any) -> Iterator[str]:
    """Yield the first error of each part of a configuration whose fields are all allowed, its parts first."""
    for value in vars(config).values():
        if dataclasses.is_dataclass(value):
            yield from _contradictions(value)
    try:
        config.__post_init__()
    except ValueError as error:
        yield str(error)


def _build(cls: type, values: Mapping[str, Any], base: Any, path: str, problems: list[str]) -> Any:
    """Return a ``cls`` with those of ``values`` that its fields allow; the others are told in ``problems``."""
    hints, sound = fields.hints(cls), {}
    names = [field.name for field in dataclasses.fields(cls)]
    for name, value in values.items():
        if name not in names:
            problems.append(_unknown(f"{path}{name}", name, names, path))
            continue
        inner = None if base is None else getattr(base, name)
        before = len(problems)
        found = _read(hints[name], value, inner, f"{path}{name}", problems)
        faults = [] if len(problems) > before else fields.faults(hints[name], found, f"{path}{name}")
        problems += faults
        if not faults:
            sound[name] = found
    return unjudged(cls, sound, base)


def _unknown(full: str, name: str, names: list[str], path: str) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {path}{near[0]}?" if near else f"there are {', '.join(names)}"
    return f"unknown configuration field {full}: {hint}"


def _read(hint: Any, value: Any, base: Any, path: str, problems: list[str]) -> Any:
    """Return ``value`` as the field has it: lists become tuples, and 2e-5, which YAML reads as text, a number."""
    part = fields.dataclass_in(hint)
    if part is not None and isinstance(value, Mapping):
        return _build(part, value, base, f"{path}.", problems)
    if isinstance(value, (list, tuple)):
        kinds = fields.items_of(hint, len(value))
        pairs = enumerate(zip(kinds or (), value, strict=kinds is not None))
        items = [_read(kind, item, None, f"{path}[{place}]", problems) for place, (kind, item) in pairs]
        return tuple(items) if kinds is not None else value
    return _number(fields.kinds(hint), value)


def _number(kinds: tuple[Any, ...], value: Any) -> Any:
    """Return text or a number as an int or a float if the field has such numbers, and anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not {int, float} & set(kinds):
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return value
    if float in kinds:
        return number
    return int(number) if number.is_integer() and not isinstance(value, int) else value
