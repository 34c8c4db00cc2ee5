"""Load a checkpoint as a policy that answers requests, for ``acrlpd serve``, or export it, for ``acrlpd export``."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.agents.config import AgentConfig
from acrlpd.config import TrainConfig, to_dict
from acrlpd.data import normalize
from acrlpd.data.fast_tokenizer import FastPromptTokenizer, FastTokenizer, TokenizeFast
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.normalize import NormStats
from acrlpd.data.robots import mapping
from acrlpd.data.robots.mapping import ROBOTS, Robot, before_normalization, fast_cameras, unseen
from acrlpd.data.tokenizer import PromptTokenizer
from acrlpd.data.transforms import (
    Compose,
    Data,
    DefaultPrompt,
    TokenizePrompt,
    Transform,
    make_bool_mask,
    to_model,
)
from acrlpd.files import written_whole
from acrlpd.models import lora, paligemma, torch_names, weights
from acrlpd.models.pi0 import Pi0, Pi0Config
from acrlpd.models.pi0_fast import Pi0Fast, Pi0FastConfig
from acrlpd.models.recognize import recognize, unsized
from acrlpd.serving import export
from acrlpd.serving.budget import Plan
from acrlpd.serving.export import Interface
from acrlpd.serving.policy import AgentSampler, FlowSampler, Policy, Sampler, TokenSampler
from acrlpd.serving.production import PRODUCTION_SERVING_CONFIG, Platform
from acrlpd.training import setup
from acrlpd.training.checkpoint import ACRLPDCheckpointManager, read_norm_stats
from acrlpd.training.sharding import make_mesh, parameter_sharding
from acrlpd.types import Observation

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ActingOptions:
    """Options for how a trained agent chooses its actions."""

    mode: Literal["greedy", "bc"] = "greedy"  # bc: one sample of the flow, without the critic
    num_samples: int | None = None  # candidates; None: as trained
    num_steps: int | None = None  # Euler steps of the flow; None: as trained, 10 for openpi's models
    real_time: bool = False  # chunks may continue the one being executed, if a client sends it
    latency_budget_ms: float | None = None  # compute as many candidates and flow steps as fit; None: always all
    default_prompt: str | None = None  # the prompt for observations without one
    seed: int = 0  # the seed for requests that bring none of their own
    extraction: str | None = None  # how to choose instead; code of your own (FILE.py:NAME) must be named here

    def __post_init__(self):
        if self.latency_budget_ms is not None and not 0 < self.latency_budget_ms < math.inf:
            raise ValueError(f"latency_budget_ms must be a positive number or absent, got {self.latency_budget_ms}")
        for name in ("num_samples", "num_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or absent, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 below 2**32, got {self.seed}")

    @property
    def budget_s(self) -> float | None:
        return None if self.latency_budget_ms is None else self.latency_budget_ms / 1000


@dataclasses.dataclass(frozen=True)
class OpenPIOptions:
    """Settings that openpi keeps in its configurations and not in its checkpoints."""

    robot: Robot | None = None  # the robot whose observations and actions the checkpoint has
    action_horizon: int = 50  # as trained; it cannot be read from the parameters
    asset_id: str | None = None  # which statistics, if the checkpoint has several; None: the only ones
    tokenizer: str | None = None  # PaliGemma's paligemma_tokenizer.model; None: the one for nano models
    fast_tokenizer: str | None = None  # folder of the FAST tokenizer, for a pi0-FAST checkpoint
    temperature: float = 0.0  # temperature for sampling pi0-FAST's tokens; 0: the most likely
    delta_mask: tuple[int, ...] | None = None  # 6 -1: six joints relative to the state, one not; None: the robot's
    max_token_len: int | None = None  # None: 48 for pi0, 200 for pi0.5, 250 for pi0-FAST
    discrete_state_input: bool | None = None  # write the state into the prompt; None: for pi0.5 only
    quantiles: bool | None = None  # normalize state and actions by quantiles; None: for all but pi0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # dtype of parameters and computation; openpi serves bfloat16

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature}")
        for name in ("action_horizon", "max_token_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class ActionsOnly:
    """The transform that reduces an answer to its actions, as for openpi's robots; it comes first in a list.

    openpi's chunk broker cuts every array of an answer into steps, and a state has no steps.
    """

    def __call__(self, data: Data) -> Data:
        return data

    def inverse(self, data: Data) -> Data:
        return {"actions": data["actions"]}


def is_ours(path: str | Path) -> bool:
    """Return whether ``path`` is a run of this project's trainer, its checkpoints folder, or one checkpoint."""
    if setup.is_best(Path(path)):
        return True
    if not Path(path).is_dir():
        return False
    directory, step = setup.locate_checkpoint(Path(path))
    steps = [directory / str(step)] if step is not None else list(directory.iterdir())
    return any((each / part).is_dir() for each in steps for part in ("acrlpd", "run"))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained agent without optimiser state, with its configuration, statistics and cameras."""

    agent: ACRLPDAgent
    config: TrainConfig
    stats: Mapping[str, NormStats]
    cameras: tuple[str, ...]
    step: int
    manager: ACRLPDCheckpointManager

    @property
    def dims(self) -> setup.Dims:
        return setup.Dims(len(self.stats["state"].mean), len(self.stats["actions"].mean))


def load_trained(path: str | Path, extraction: str | None = None) -> Trained:
    """Load the agent of a checkpoint, ready to act; arguments as in ``training.setup.load_checkpoint``.

    Optimiser state, twice the size of what it optimises, is never read.
    """
    trained = setup.read_policy(Path(path), _load_trained)
    if extraction is None:
        return trained
    config = setup.with_extraction(trained.config, extraction)
    return dataclasses.replace(trained, agent=trained.agent.with_extraction(extraction), config=config)


def _load_trained(manager: ACRLPDCheckpointManager, step: int) -> Trained:
    known = setup.read_interface(manager, step)
    config = dataclasses.replace(known.config, fsdp_devices=1)
    agent = _abstract_agent(config, known.stats, known.cameras)
    return reload(Trained(agent, config, known.stats, known.cameras, -1, manager), step)


def reload(trained: Trained, step: int) -> Trained:
    """Load the same agent at another step. Programs that were compiled for one step fit the other."""
    restored = trained.manager.restore(trained.agent, step)
    return dataclasses.replace(trained, agent=restored.agent, step=restored.step)


def _abstract_agent(config: TrainConfig, stats: Mapping[str, NormStats], cameras: tuple[str, ...]) -> ACRLPDAgent:
    dims = setup.Dims(len(stats["state"].mean), len(stats["actions"].mean))
    agent = jax.eval_shape(lambda: setup.make_agent(config, dims, cameras))
    agent = dataclasses.replace(agent, opt_state={})
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        agent,
        parameter_sharding(make_mesh(config.fsdp_devices), agent),
    )


def trained_policy(trained: Trained, options: ActingOptions) -> Policy:
    """Return the policy that a server answers with."""
    config = trained.config
    if options.real_time and not config.policy.traits.is_flow:
        raise ValueError("real_time guides the steps of a flow, and rlpd_ac's policy has none: leave it off")
    sampler = AgentSampler(
        trained.agent, mode=options.mode, num_samples=options.num_samples, num_steps=options.num_steps
    )
    transform = Compose(
        [
            ActionsOnly(),
            *_default_prompt(options.default_prompt, needed=config.policy.traits.has_backbone),
            setup.make_transform(config, trained.stats, trained.dims, _read_cameras(trained)),
        ]
    )
    return Policy(
        sampler,
        transform,
        spec=_spec(trained),
        real_time=options.real_time,
        budget_s=options.budget_s,
        rng=jax.random.key(options.seed),
        metadata={"acrlpd": {"step": trained.step, "action_horizon": config.policy.action_horizon}},
    )


def _default_prompt(prompt: str | None, *, needed: bool) -> list[Transform]:
    """Return the transform that fills in a missing prompt; a policy that reads no prompt does not ask for one."""
    if prompt is None and needed:
        return []
    return [DefaultPrompt(prompt or "")]


def _read_cameras(trained: Trained) -> tuple[str, ...]:
    """Return the data's cameras that the policy reads; clients need not send the others."""
    return trained.cameras if trained.config.policy.traits.has_backbone else ()


def _spec(trained: Trained) -> Observation:
    policy, dims = trained.config.policy, trained.dims
    if not policy.traits.has_backbone:
        return _observation_spec(dims.state, (), 0, policy.max_token_len)
    cameras = setup.model_cameras(trained.config, trained.cameras)
    return _observation_spec(policy.action_dim or dims.state, cameras, policy.image_size, policy.max_token_len)


def _observation_spec(state_dim: int, cameras: tuple[str, ...], image_size: int, max_token_len: int) -> Observation:
    return Observation(
        state=jax.ShapeDtypeStruct((state_dim,), np.float32),
        images={camera: jax.ShapeDtypeStruct((image_size, image_size, 3), np.uint8) for camera in cameras},
        image_masks={camera: jax.ShapeDtypeStruct((), np.bool_) for camera in cameras},
        tokenized_prompt=jax.ShapeDtypeStruct((max_token_len,), np.int32),
        tokenized_prompt_mask=jax.ShapeDtypeStruct((max_token_len,), np.bool_),
    )


class Follower:
    """The policy of a run that may still be training; ``refresh`` returns a newer one when there is one."""

    def __init__(self, path: str | Path, options: ActingOptions):
        self._path = Path(path)
        self._options = options
        self._trained = load_trained(path, options.extraction)
        self._fixed = setup.locate_checkpoint(Path(path))[1] is not None

    @property
    def policy(self) -> Policy:
        return trained_policy(self._trained, self._options)

    def refresh(self) -> Policy | None:
        """Return the policy of a better or newer checkpoint than the last one given; None if there is none.

        There never is where the path names one step. A run's is the best, once its evaluations have chosen one.
        """
        if self._fixed:
            return None
        manager, served = self._trained.manager, self._trained.step
        kept = setup.kept_step(self._path)
        if kept is not None:
            if kept == served:
                return None
            self._trained = reload(self._trained, kept)
            return self.policy
        if max(manager.steps(), default=-1) <= served:
            return None
        self._trained = manager.newest(functools.partial(reload, self._trained), after=served)
        return self.policy


# -- export ------------------------------------------------------------------------------------------------------------

OptimizationLevel = Literal["fast", "standard", "accurate"]
LEVELS: dict[str, tuple[int | None, int | None]] = {"fast": (3, 10), "standard": (None, None), "accurate": (None, 50)}
"""Numbers of critics to keep and of Euler steps; None: as trained."""

TD_BATCHES = 8  # number of batches over which the critics' errors are averaged


def export_acrlpd_model(
    checkpoint_path: str | Path,
    output_dir: str | Path,
    optimization_level: OptimizationLevel = "standard",
    *,
    platform: Platform | None = None,
    data: str | Path | None = None,
    extraction: str | None = None,
) -> str:
    """Write a trained agent for production and return the folder.

    ``OUT/<step>/`` is a checkpoint that ``acrlpd serve`` and openpi's own server read, without optimiser state;
    ``OUT/stablehlo/`` is the whole inference function (``serving.export``); ``OUT/pytorch/`` is the policy for openpi's
    PyTorch port, if it is a pi0.

    Args:
        optimization_level: fast keeps the 3 critics of smallest TD error and takes 10 flow steps; accurate takes 50;
            standard leaves the agent as it was trained.
        platform: use the numbers of the production table instead of the level's.
        data: episodes for the TD error, preferably not trained on. None: the run's own.
        extraction: how the agent chooses instead; code of your own must be named here (``setup.load_checkpoint``).
    """
    output = Path(output_dir).absolute()
    if output.exists():
        raise ValueError(f"{output} exists already: name another folder to export to")
    if optimization_level not in LEVELS:
        raise ValueError(f"optimization_level must be one of {', '.join(LEVELS)}, got {optimization_level!r}")
    trained = load_trained(checkpoint_path, extraction)
    if trained.agent.chooses:
        trained.config.agent.make_extraction(trained.config.agent.flow_steps)  # what cannot be used is refused here
    num_critics, num_steps = LEVELS[optimization_level]
    agent_config = trained.config.agent
    if platform is not None:
        table = PRODUCTION_SERVING_CONFIG[platform]
        num_critics, num_steps = table["critic_ensemble_size"], table["num_diffusion_steps"]
        agent_config = dataclasses.replace(agent_config, best_of_n_samples=table["best_of_n_samples"])
    agent_config = dataclasses.replace(agent_config, flow_steps=num_steps or agent_config.flow_steps)
    members = best_critics(trained, num_critics, data) if num_critics is not None else None
    small = _with_critics(trained, agent_config, members)
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as partial:
        _write_checkpoint(partial, small)
        export.write_stablehlo(partial / "stablehlo", small.agent, _interface(small))
        _write_pytorch(partial / "pytorch", small)
    logger.info("%s: %d critics, %d flow steps", output, agent_config.critic.num_critics, agent_config.flow_steps)
    return str(output)


def best_critics(trained: Trained, count: int, data: str | Path | None) -> np.ndarray | None:
    """Return the ``count`` critics of smallest TD error on episodes of ``data``; None if there are no others."""
    config = trained.config
    if count >= config.agent.critic.num_critics:
        return None
    if data is None:
        logger.warning("the critics are compared on the data they were trained on; --data names better data")
    else:
        other = dataclasses.replace(config.data, path=str(data), weights=(), sources=())
        config = dataclasses.replace(config, data=other)
    loader = ChunkLoader(
        setup.open_mixture(config, setup.open_sets(config)),
        setup.make_transform(config, trained.stats, trained.dims),
        batch_size=config.data.batch_size,
        horizon=config.policy.action_horizon,
        sequence_ratio=config.data.sequence_ratio,
        seed=config.seed,
    )
    rngs = jax.random.split(jax.random.key(config.seed), TD_BATCHES)
    errors = [export.member_td_errors(trained.agent, loader.batch(k), rng) for k, rng in enumerate(rngs)]
    mean = np.mean(jax.device_get(errors), axis=0)
    logger.info("TD error of each critic: %s", np.round(mean, 4))
    return np.sort(np.argsort(mean)[:count])


def _with_critics(trained: Trained, agent_config: AgentConfig, members: np.ndarray | None) -> Trained:
    """Return the agent under another configuration, with the critics ``members`` only; None: with all."""
    agent = trained.agent
    if members is not None:
        critic = dataclasses.replace(agent_config.critic, num_critics=len(members))
        agent_config = dataclasses.replace(agent_config, critic=critic)
        params, ema = (
            groups | {name: export.keep_critics(groups[name], members) for name in groups if name == "critic"}
            for groups in (agent.params, agent.ema)
        )
        target_critic = export.keep_critics(agent.target_critic, members)
        agent = dataclasses.replace(agent, params=params, ema=ema, target_critic=target_critic)
    config = dataclasses.replace(trained.config, agent=agent_config)
    nets = _abstract_agent(config, trained.stats, trained.cameras).nets
    return dataclasses.replace(trained, agent=dataclasses.replace(agent, nets=nets), config=config)


def _write_checkpoint(folder: Path, trained: Trained) -> None:
    manager = ACRLPDCheckpointManager(folder)
    run = {"config": to_dict(trained.config), "cameras": list(trained.cameras), "exported_from": trained.step}
    manager.save(trained.agent, asset_id=trained.config.asset_id, norm_stats=trained.stats, run=run)
    manager.wait()
    manager.close()


def _write_pytorch(folder: Path, trained: Trained) -> None:
    """Write the model, its statistics and its sizes as openpi's converter does; nothing if it is no pi0."""
    model = nnx.merge(trained.agent.nets.policy_def, trained.agent.acting_policy)
    if not isinstance(model, Pi0):
        logger.info("nothing written for PyTorch: openpi's port knows only pi0 and pi0.5")
        return
    stacks = (model.config.paligemma, model.config.action_expert)
    flat = lora.merge(weights.flatten(model), (stacks[0].adapter_scaling, stacks[1].adapter_scaling))
    folder.mkdir()
    metadata = {"format": "pt", **torch_names.head_sizes(flat)}
    weights.write_safetensors(folder / weights.TORCH_FILE, torch_names.to_torch(flat), metadata=metadata)
    normalize.save(folder / "assets" / trained.config.asset_id / normalize.FILE_NAME, trained.stats)
    policy = trained.config.policy
    sizes = {
        "action_dim": policy.action_dim or trained.dims.action,
        "action_horizon": policy.action_horizon,
        "paligemma_variant": policy.paligemma_variant.removesuffix("_lora"),  # adapters are merged
        "action_expert_variant": policy.action_expert_variant.removesuffix("_lora"),
        "precision": "float32",
    }
    (folder / "config.json").write_text(json.dumps(sizes, indent=2), encoding="utf-8")


def _interface(trained: Trained) -> Interface:
    config = trained.config
    num_samples = config.agent.best_of_n_samples if trained.agent.chooses else 1
    robot = config.data.robot
    return Interface(
        trained.stats,
        setup.has_quantiles(config),
        _spec(trained),
        Plan(num_samples, config.agent.flow_steps),
        greedy=trained.agent.chooses,
        robot=ROBOTS[robot] if robot else None,
        delta_mask=setup.delta_mask(config),
        unseen=unseen(robot, trained.cameras) if robot else (),
    )


# -- openpi's checkpoints ----------------------------------------------------------------------------------------------


def openpi_policy(
    path: str | Path,
    openpi: OpenPIOptions,
    options: ActingOptions,
    *,
    model: Pi0Config | Pi0FastConfig | None = None,
) -> Policy:
    """Return the policy of an openpi checkpoint (``params``, ``assets``). Without a critic, each answer is one sample.

    Without ``model``, it is recognized from the arrays, which works for the named variants.

    Raises:
        ValueError: a part of the checkpoint is missing or unknown, or an option does not fit its model.
    """
    if openpi.robot is None:
        raise ValueError(
            f"{path} is no run or checkpoint of this project; if it is one of openpi's, say whose: --robot "
            + " | ".join(ROBOTS)
        )
    if options.num_samples not in (None, 1):
        raise ValueError(f"{path} has no critic to choose among num_samples={options.num_samples}: leave it out")
    if options.extraction is not None:
        raise ValueError(f"{path} has no critic that extraction={options.extraction!r} could use: leave it out")
    platform = ROBOTS[openpi.robot]
    mapping.check(
        openpi.robot,
        make_bool_mask(*(openpi.delta_mask or ())),
        where=str(path),
        dims=(platform.state_dim, platform.action_dim),
        cameras=None,
        prefix="",
    )
    parameters = weights.locate(path)  # only once: a run that is still training writes newer ones
    model = model or _recognized(parameters, weights.inspect(parameters), openpi)
    tokenize = _tokenize(openpi, model)
    stats = _stats(parameters.parent / "assets", openpi.robot, openpi.asset_id)
    policy = nnx.eval_shape(lambda: model.create(nnx.Rngs(0)))
    weights.load_into(policy, weights.read_params(parameters), source=parameters)
    is_fast = isinstance(model, Pi0FastConfig)
    pi05 = isinstance(model, Pi0Config) and model.pi05
    before = before_normalization(openpi.robot, openpi.delta_mask, pi05=pi05, fast=is_fast)
    transform = to_model(
        [*_default_prompt(options.default_prompt, needed=True), *before],
        stats,
        tokenize,
        quantiles=is_fast or pi05 if openpi.quantiles is None else openpi.quantiles,
        image_size=model.image_size,
        action_dim=None if is_fast else model.action_dim,
        cameras=model.cameras,
    )
    state_dim = platform.state_dim if is_fast else model.action_dim
    return Policy(
        _sampler(policy, openpi, options),
        transform,
        spec=_observation_spec(state_dim, model.cameras, model.image_size, model.max_token_len),
        real_time=options.real_time,
        budget_s=options.budget_s,
        rng=jax.random.key(options.seed),
    )


def _sampler(policy: Pi0 | Pi0Fast, openpi: OpenPIOptions, options: ActingOptions) -> Sampler:
    if isinstance(policy, Pi0):
        return FlowSampler(policy, num_steps=options.num_steps or 10)
    flow_only = {
        "num_steps": options.num_steps is not None,
        "real_time": options.real_time,
        "latency_budget_ms": options.latency_budget_ms is not None,
    }
    if any(flow_only.values()):
        given = ", ".join(name for name, is_given in flow_only.items() if is_given)
        raise ValueError(f"pi0-FAST writes tokens until its chunk is complete, without flow steps: leave out {given}")
    return TokenSampler(policy, temperature=openpi.temperature)


def _tokenize(openpi: OpenPIOptions, model: Pi0Config | Pi0FastConfig) -> Transform:
    text = PromptTokenizer(openpi.tokenizer, max_length=model.max_token_len, vocab_size=model.vocab_size)
    has_own_vocabulary = isinstance(model, Pi0FastConfig) and model.vocab_size != paligemma.VOCAB_SIZE
    if not has_own_vocabulary:  # a small pi0-FAST has room for action tokens after the text's
        text.check_trained(model.vocab_size)
    if isinstance(model, Pi0Config):
        return TokenizePrompt(text, model.discrete_state_input)
    assert openpi.fast_tokenizer is not None  # else the model would not have been recognized
    return TokenizeFast(
        FastPromptTokenizer(
            FastTokenizer.load(openpi.fast_tokenizer),
            openpi.tokenizer,
            action_horizon=model.action_horizon,
            action_dim=model.action_dim,
            max_length=model.max_token_len,
            vocab_size=model.vocab_size,
        )
    )


def _recognized(path: Path, arrays: Mapping[str, Any], openpi: OpenPIOptions) -> Pi0Config | Pi0FastConfig:
    found = recognize(arrays)
    kind = found.get("model")
    if kind is None:
        raise ValueError(f"{path} holds no model that is known here; pi0, pi0.5 and pi0-FAST are served")
    if kind == "paligemma" and openpi.fast_tokenizer is None:
        raise ValueError(
            f"{path} has no action expert; if it is pi0-FAST, name the folder with the files of "
            "physical-intelligence/fast: --fast_tokenizer"
        )
    if kind != "paligemma" and openpi.fast_tokenizer is not None:
        raise ValueError(f"{path} holds {kind}, which writes no action tokens: leave out --fast_tokenizer")
    if problems := unsized(arrays, kind):
        raise ValueError(
            f"{path} looks like {kind}, but it is incomplete: arrays that tell the model's sizes are not as expected. "
            "Copy it anew.\n  " + "\n  ".join(problems)
        )
    assert openpi.robot is not None  # openpi_policy has checked it
    sizes: dict[str, Any] = {
        "action_horizon": openpi.action_horizon,
        "paligemma_variant": found["paligemma_variant"],
        "vision_variant": found["vision_variant"],
        "vocab_size": int(found["vocab_size"]),
        "dtype": openpi.dtype,
        "param_dtype": openpi.dtype,
        "remat": False,
    }
    if openpi.max_token_len is not None:
        sizes["max_token_len"] = openpi.max_token_len
    if kind == "paligemma":
        action_dim, cameras = ROBOTS[openpi.robot].action_dim, fast_cameras(openpi.robot)
        return Pi0FastConfig(**sizes, action_dim=action_dim, cameras=cameras)
    return Pi0Config(
        **sizes,
        pi05=kind == "pi05",
        action_dim=int(found["action_dim"]),
        discrete_state_input=openpi.discrete_state_input,  # type: ignore[arg-type]  # None: the model's default
        action_expert_variant=found["action_expert_variant"],
    )


def _stats(assets: Path, robot: Robot, asset_id: str | None) -> dict[str, NormStats]:
    """Read the statistics in ``assets``, which must have at least as many dimensions as the robot."""
    if not assets.is_dir():
        raise ValueError(f"{assets}: expected a folder of normalization statistics beside the parameters")
    stats = read_norm_stats(assets, asset_id)
    for key, dim in (("state", ROBOTS[robot].state_dim), ("actions", ROBOTS[robot].action_dim)):
        known = len(stats[key].mean) if key in stats else 0
        if known < dim:
            raise ValueError(
                f"{assets}: statistics of {known} dimensions of {key}, but {robot} has {dim}: name another --robot, or "
                "--asset_id if there are several"
            )
    return stats
