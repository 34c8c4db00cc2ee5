"""A checkpoint of openpi as a policy that answers requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from acrlpd.data.view.fast_tokenizer import FastPromptTokenizer, FastTokenizer, TokenizeFast
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.robots import mapping
from acrlpd.data.view.robots.mapping import ROBOTS, Robot, before_normalization, fast_cameras
from acrlpd.data.view.tokenizer import PromptTokenizer
from acrlpd.data.view.transforms import Compose, TokenizePrompt, Transform, make_bool_mask, to_model
from acrlpd.deploy.options import ActingOptions, OpenPIOptions, default_prompt_transforms, observation_spec
from acrlpd.models import paligemma, weights
from acrlpd.models.pi0 import Pi0, Pi0Config
from acrlpd.models.pi0_fast import Pi0Fast, Pi0FastConfig
from acrlpd.models.recognize import recognize, unsized
from acrlpd.serving.policy import Draws, FlowSampler, Policy, Sampler, TokenSampler
from acrlpd.training.checkpoint import read_norm_stats
from acrlpd.training.measuring import Measured, Subject, subject_of_flow
from acrlpd.types import Observation

FLOW_STEPS = 10  # Euler steps, as openpi samples


@dataclasses.dataclass(frozen=True)
class OpenPIModel:
    """The model of an openpi checkpoint with its parameters, and what stands between it and the robot."""

    policy: Pi0 | Pi0Fast
    config: Pi0Config | Pi0FastConfig
    transform: Compose


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
    loaded = load_openpi(path, openpi, options, model=model)
    found = loaded.config
    assert openpi.robot is not None  # it was loaded as that of a robot
    state_dim = ROBOTS[openpi.robot].state_dim if isinstance(found, Pi0FastConfig) else found.action_dim
    return Policy(
        _sampler(loaded.policy, openpi, options),
        loaded.transform,
        spec=observation_spec(state_dim, found.cameras, found.image_size, found.max_token_len),
        real_time=options.real_time,
        budget_s=options.budget_s,
        rng=jax.random.key(options.seed),
    )


def openpi_subject(loaded: OpenPIModel, openpi: OpenPIOptions, *, executed: int | None = None) -> Subject:
    """Return the model as something to compare with recorded actions; pi0-FAST has no flow loss."""
    executed = executed or loaded.config.action_horizon
    if isinstance(loaded.policy, Pi0):
        return subject_of_flow(loaded.policy, loaded.transform, num_steps=FLOW_STEPS, executed=executed)
    sampler = TokenSampler(loaded.policy, temperature=openpi.temperature)

    def measure(seen: Observation, actions: Any, valid: Any, keys: Any) -> Measured:
        return Measured(sampler(seen, Draws(jax.random.key_data(keys)), sampler.plan)[0])

    return Subject(measure, loaded.transform, loaded.config.action_horizon, executed, reads_actions=False)


def load_openpi(
    path: str | Path,
    openpi: OpenPIOptions,
    options: ActingOptions,
    *,
    model: Pi0Config | Pi0FastConfig | None = None,
) -> OpenPIModel:
    """Load the model of an openpi checkpoint; arguments and errors as in ``openpi_policy``."""
    if openpi.robot is None:
        raise ValueError(
            f"{path} is no run or checkpoint of this project; if it is one of openpi's, say whose: --robot "
            + " | ".join(ROBOTS)
        )
    if options.num_samples not in (None, 1):
        raise ValueError(f"{path} has no critic to choose among num_samples={options.num_samples}: leave it out")
    for name in ("extraction", "guidance_weights"):
        if (value := getattr(options, name)) is not None:
            raise ValueError(f"{path} has no critic that {name}={value!r} could use: leave it out")
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
        [*default_prompt_transforms(options.default_prompt, needed=True), *before],
        stats,
        tokenize,
        quantiles=is_fast or pi05 if openpi.quantiles is None else openpi.quantiles,
        image_size=model.image_size,
        action_dim=None if is_fast else model.action_dim,
        cameras=model.cameras,
    )
    return OpenPIModel(policy, model, transform)


def _sampler(policy: Pi0 | Pi0Fast, openpi: OpenPIOptions, options: ActingOptions) -> Sampler:
    if isinstance(policy, Pi0):
        return FlowSampler(policy, num_steps=options.num_steps or FLOW_STEPS)
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
    if "image_size" in found:
        sizes["image_size"] = int(found["image_size"])
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
