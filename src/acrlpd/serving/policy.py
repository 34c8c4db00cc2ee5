"""A policy call: observations in the robot's words to chunks of actions in its units, as openpi answers them.

``Policy.infer`` answers one observation. A server calls the two halves itself: ``prepare`` for each request, in any
thread, and ``infer_batch`` for those that arrived together, which is one compiled call.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from acrlpd.agents import acrlpd, sampling
from acrlpd.agents.acrlpd import ACRLPDAgent
from acrlpd.data.transforms import Data, Transform, to_observation
from acrlpd.models import flow
from acrlpd.models.flow import FlowPolicy
from acrlpd.types import AnyArray, Metrics, Observation

MISTAKES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)  # of transforms, about strange data
OPTIONS_KEY = "acrlpd"  # of an observation: options of ours, which openpi's clients never send


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is computed for an answer."""

    num_samples: int  # candidates
    num_steps: int  # Euler steps of the flow

    def __post_init__(self):
        if self.num_samples < 1 or self.num_steps < 1:
            raise ValueError(f"an answer needs at least one candidate and one flow step, got {self}")


@struct.dataclass
class Draws:
    """Where each request's chunks come from: its own key, so that company in the batch changes nothing; or its noise.

    A key is the two words of a threefry key.
    """

    keys: UInt32[AnyArray, "b 2"]
    noise: Float[AnyArray, "b h a"] | None = None


class Sampler(Protocol):
    """What draws chunks: a flow policy alone, or an agent that chooses among them."""

    plan: Plan  # of an answer that nobody hurries

    def __call__(
        self, observation: Observation, draws: Draws, plan: Plan
    ) -> tuple[Float[AnyArray, "b h a"], Mapping[str, AnyArray]]:
        """Normalized chunks, and numbers about each request's choice, which lead with b."""
        ...


class FlowSampler:
    """One chunk of a flow policy, in openpi's draws for a key."""

    def __init__(self, policy: FlowPolicy, *, num_steps: int = 10):
        self.plan = Plan(1, num_steps)
        self._shape = shape = (policy.action_horizon, policy.action_dim)
        graphdef, self._state = nnx.split(policy)

        def sample(state: nnx.State, observation: Observation, draws: Draws, num_steps: int) -> Float[Array, "b h a"]:
            policy = nnx.merge(graphdef, state)
            noise = draws.noise
            if noise is None:
                noise = jax.vmap(lambda key: jax.random.normal(key, shape))(_keys(draws))
            return flow.sample(policy, policy.encode(observation), noise[None], num_steps=num_steps)[0]

        self._sample = jax.jit(sample, static_argnames="num_steps")

    def __call__(self, observation: Observation, draws: Draws, plan: Plan) -> tuple[Float[Array, "b h a"], Metrics]:
        shape = (len(observation.state), *self._shape)
        if draws.noise is not None and draws.noise.shape != shape:
            raise ValueError(f"noise must have the shape {shape} of the model's chunks, got {draws.noise.shape}")
        return self._sample(self._state, observation, draws, num_steps=plan.num_steps), {}


class AgentSampler:
    """The chunk that an agent chooses: ``greedy`` the best of N by the critic, ``bc`` one sample of the flow.

    The draws for a key are those of ``ACRLPDAgent.sample_actions`` for one observation. Optimiser state and target
    critics are let go.
    """

    def __init__(
        self,
        agent: ACRLPDAgent,
        *,
        mode: Literal["greedy", "bc"] = "greedy",
        num_samples: int | None = None,
        num_steps: int | None = None,
    ):
        config = agent.config
        wanted = num_samples or config.best_of_n_samples
        self._alone = mode == "bc" or not agent.chooses
        self.plan = Plan(1 if self._alone else wanted, num_steps or config.flow_steps)
        self._agent = dataclasses.replace(agent, opt_state={}, target_critic=nnx.State({}))

    def __call__(self, observation: Observation, draws: Draws, plan: Plan) -> tuple[Float[Array, "b h a"], Metrics]:
        if draws.noise is not None:
            raise ValueError("an agent draws many chunks and takes no noise of one; serve its flow alone for that")
        return _best_chunk(self._agent, observation, draws, plan=plan, alone=self._alone)


@functools.partial(jax.jit, static_argnames=("plan", "alone"))
def _best_chunk(
    agent: ACRLPDAgent, observation: Observation, draws: Draws, *, plan: Plan, alone: bool
) -> tuple[Float[Array, "b h a"], Metrics]:
    config = agent.config
    modules = agent.acting_modules()
    prefix = modules.policy.encode(observation)
    shape = (plan.num_samples, *agent.nets.action_shape)

    def draw(key: PRNGKeyArray) -> Float[Array, "n h a"]:
        noise_rng, _ = jax.random.split(key)
        return jax.random.normal(noise_rng, shape)

    noise = jax.vmap(draw, out_axes=1)(_keys(draws))  # [n b h a]
    if alone:
        return acrlpd.unchosen(modules, config, prefix, noise[:1], plan.num_steps), {}
    candidates, scores = acrlpd.propose(modules, config, prefix, noise, plan.num_steps)
    _, best = sampling.select(candidates, scores)
    values = {
        "q": sampling.take(scores, best),
        "q_mean": scores.mean(axis=0),
        "q_std": scores.std(axis=0),
        "q_candidates": scores.T,
        "chosen": best,
    }
    return acrlpd.finish(modules, config, prefix, noise, candidates, best, plan.num_steps), values


def _keys(draws: Draws) -> PRNGKeyArray:
    return jax.random.wrap_key_data(jnp.asarray(draws.keys), impl="threefry2x32")


@dataclasses.dataclass(frozen=True)
class Request:
    """One observation on its way into the model, without a batch axis, and what its sender wants of the answer."""

    observation: Observation
    key: UInt32[np.ndarray, " 2"]
    noise: Float[np.ndarray, "h a"] | None = None
    options: Options = dataclasses.field(default_factory=lambda: Options())


@dataclasses.dataclass(frozen=True)
class Options:
    """What a client may ask for under the key ``acrlpd`` of an observation; every entry is optional."""

    seed: int | None = None  # the same seed and observation give the same answer; None: each answer draws anew
    statistics: bool = False  # the answer tells what the critic thought

    def __post_init__(self):
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 2**32):
            raise ValueError(f"{OPTIONS_KEY}.seed must be a whole number from 0 below 2**32, got {self.seed!r:.100}")
        if not isinstance(self.statistics, bool):
            raise ValueError(f"{OPTIONS_KEY}.statistics must be true or false, got {self.statistics!r:.100}")

    @classmethod
    def parse(cls, values: Any) -> Options:
        """From a client's dictionary; an unknown entry is refused."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{OPTIONS_KEY} must be a dictionary of options, got {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise ValueError(f"unknown option {OPTIONS_KEY}.{name!s:.100}: {hint}")
        return cls(**{name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()})


class Policy:
    """A sampler behind one list of transforms.

    Args:
        sampler: a ``FlowPolicy`` stands for a ``FlowSampler`` of ten steps.
        transform: from the robot's observation to the model's, and its inverse for the answer.
        spec: shapes and dtypes of the model's observation, without a batch axis; other observations are refused
            before they reach the model. None: not known.
        rng: openpi's default is key 0; it is split once a call, and the second half draws.
        metadata: what a server tells each client that connects.
    """

    def __init__(
        self,
        sampler: Sampler | FlowPolicy,
        transform: Transform,
        *,
        spec: Observation | None = None,
        rng: PRNGKeyArray | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        self._sampler: Sampler = FlowSampler(sampler) if isinstance(sampler, FlowPolicy) else sampler
        self._transform = transform
        self._spec = spec
        self._rng = jax.random.key(0) if rng is None else rng
        self._rng_lock = threading.Lock()
        self.metadata = dict(metadata or {})

    @property
    def plan(self) -> Plan:
        return self._sampler.plan

    def infer(self, obs: Data, *, noise: Float[np.ndarray, "*b h a"] | None = None) -> Data:
        """The answer to one observation, which has no batch axis; ``noise`` may have one of 1.

        ``actions`` [h a] in the robot's units; ``state`` unless the robot's transform drops it, as openpi's three do;
        ``policy_timing`` with ``infer_ms``, the time of the model alone; ``policy_statistics`` if asked for.
        """
        request = self.prepare(obs)
        if noise is not None:
            noise = np.asarray(noise if noise.ndim == 2 else noise[0], np.float32)
            request = dataclasses.replace(request, noise=noise)
        return self.infer_batch([request])[0]

    def prepare(self, obs: Data) -> Request:
        """Everything before the model, for one observation; ``obs`` is left as it is.

        Raises:
            ValueError: it is not what the model takes: a shape, a dtype, a number that is not finite, an option.
        """
        data = dict(obs)
        options = Options.parse(data.pop(OPTIONS_KEY, {}))
        try:
            observation = to_observation(self._transform(data))
        except MISTAKES as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
            raise ValueError(f"the observation is not one of this robot: {reason}. It has {_outline(data)}") from error
        if self._spec is not None:
            observation = conform(observation, self._spec)
        if options.seed is None:
            with self._rng_lock:
                self._rng, sample_rng = jax.random.split(self._rng)
            key = np.asarray(jax.random.key_data(sample_rng))
        else:
            key = np.array([0, options.seed], np.uint32)  # as jax.random.key
        return Request(observation, key, options=options)

    def infer_batch(
        self, requests: Sequence[Request], *, size: int | None = None, plan: Plan | None = None
    ) -> list[Data]:
        """The answers to requests that are computed together, padded to ``size`` so that few shapes are compiled."""
        plan = plan or self.plan
        padding = [requests[-1]] * ((size or 0) - len(requests))
        start = time.monotonic()
        chunks, values = jax.device_get(self._sampler(*_stacked([*requests, *padding]), plan))
        infer_ms = (time.monotonic() - start) * 1000
        if not np.isfinite(chunks[: len(requests)]).all():
            raise FloatingPointError("the policy returned actions that are not finite; none of them is sent to a robot")
        answers = []
        for row, request in enumerate(requests):
            answer = self._transform.inverse({"state": request.observation.state, "actions": np.asarray(chunks[row])})
            answer = answer | {"policy_timing": {"infer_ms": infer_ms}}
            if request.options.statistics:  # plain numbers: a client's chunk broker would cut arrays into steps
                chosen = {name: np.asarray(value[row]).tolist() for name, value in values.items()}
                answer["policy_statistics"] = chosen | dataclasses.asdict(plan)
            answers.append(answer)
        return answers

    def warm_up(self, sizes: Sequence[int]) -> None:
        """Compiles the model for batches of these sizes, so that no request waits for it."""
        if self._spec is None:
            raise ValueError("a policy without a spec does not know which shapes to compile")
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._spec)
        request = Request(zeros, np.zeros(2, np.uint32))
        for size in sizes:
            jax.block_until_ready(self._sampler(*_stacked([request] * size), self.plan))


def _stacked(requests: Sequence[Request]) -> tuple[Observation, Draws]:
    observation = jax.tree.map(lambda *leaves: np.stack(leaves), *[request.observation for request in requests])
    noise = [request.noise for request in requests if request.noise is not None]
    return observation, Draws(np.stack([request.key for request in requests]), np.stack(noise) if noise else None)


def _outline(data: Mapping[str, Any], path: str = "") -> str:
    """The keys of an observation, with the shapes of its arrays."""
    parts = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            parts.append(_outline(value, f"{path}{key!s:.50}/"))
        else:
            shape = f" {value.dtype} {value.shape}" if isinstance(value, np.ndarray) else ""
            parts.append(f"{path}{key!s:.50}{shape}")
    return ", ".join(parts) or "nothing"


def conform(observation: Observation, spec: Observation) -> Observation:
    """The observation with exactly the spec's entries; cameras beyond them are dropped, as openpi's models do.

    Raises:
        ValueError: an entry is missing, has another shape or dtype, or a state that is not finite.
    """
    missing = spec.images.keys() - observation.images.keys()
    if missing:
        raise ValueError(f"the observation lacks the cameras {sorted(missing)}; it has {sorted(observation.images)}")
    chosen = dataclasses.replace(
        observation,
        images={camera: observation.images[camera] for camera in spec.images},
        image_masks={camera: np.asarray(observation.image_masks[camera], bool) for camera in spec.image_masks},
    )
    for field in dataclasses.fields(Observation):
        name, given, wanted = field.name, getattr(chosen, field.name), getattr(spec, field.name)
        if isinstance(wanted, dict):
            for camera in wanted:
                _check(f"{name}/{camera}", given[camera], wanted[camera])
        elif wanted is None:
            nothing: dict[str, Any] = {name: None}
            chosen = dataclasses.replace(chosen, **nothing)
        else:
            _check(name, given, wanted)
    if not np.isfinite(chosen.state).all():
        raise ValueError(f"the state has numbers that are not finite: {chosen.state}")
    return chosen


def _check(name: str, array: np.ndarray | None, wanted: jax.ShapeDtypeStruct) -> None:
    if array is None:
        raise ValueError(f"the observation lacks {name}")
    if array.shape != wanted.shape or array.dtype != wanted.dtype:
        raise ValueError(
            f"{name} must be {wanted.dtype} of shape {wanted.shape} where the model reads it, got {array.dtype} of "
            f"shape {array.shape}. An observation has no batch axis."
        )
