"""A policy call: from observations in the robot's format to action chunks in its units, with openpi's answers.

``Policy.infer`` answers one observation. A server calls its two halves itself: ``prepare`` for each request, in any
thread, and ``infer_batch`` for requests that arrived together, which is one compiled call.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from acrlpd.agents.agent import ACRLPDAgent, choose_chunks
from acrlpd.data.view.transforms import Data, Transform, to_observation
from acrlpd.models import flow, stacked
from acrlpd.models.flow import FlowPolicy, Guidance
from acrlpd.models.pi0_fast import Pi0Fast
from acrlpd.serving.budget import Budget, Plan, smaller_plans
from acrlpd.serving.request import OPTIONS_KEY, Options, Request, conform, outline
from acrlpd.types import AnyArray, Metrics, Observation

logger = logging.getLogger(__name__)

KEYS_AT_A_TIME = 256  # one split alone costs as much as all other work for a small observation
MISTAKES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)  # raised by transforms on bad data


class NotFiniteError(FloatingPointError):
    """Some actions are not finite. ``answers`` holds the batch's answers, with None for those that cannot be sent."""

    def __init__(self, answers: Sequence[Data | None]):
        super().__init__("the policy returned actions that are not finite; none of them is sent to a robot")
        self.answers = answers


@struct.dataclass
class Draws:
    """The randomness of each request: its own key, so results do not depend on what else is in the batch; or noise.

    A key is the two words of a threefry key. Noise comes from the caller. With guidance, chunks continue current ones.
    """

    keys: UInt32[AnyArray, "b 2"]
    noise: Float[AnyArray, "b h a"] | None = None
    guidance: Guidance | None = None


class Sampler(Protocol):
    """A sampler of chunks: a policy alone, or an agent that chooses among its samples."""

    plan: Plan  # of an answer without a deadline
    action_shape: tuple[int, int]  # horizon and width of the model's chunks

    def __call__(
        self, observation: Observation, draws: Draws, plan: Plan
    ) -> tuple[Float[AnyArray, "b h a"] | Int[AnyArray, "b steps"], Mapping[str, AnyArray]]:
        """Return normalized chunks, or their tokens; and statistics of each choice, whose first axis is b."""
        ...


class FlowSampler:
    """A sampler of one chunk of a flow policy, with openpi's random numbers for a key."""

    def __init__(self, policy: FlowPolicy, *, num_steps: int = 10):
        self.plan = Plan(1, num_steps)
        self.action_shape = shape = (policy.action_horizon, policy.action_dim)
        graphdef, self._state = nnx.split(stacked.unrolled(policy))

        def sample(state: nnx.State, observation: Observation, draws: Draws, num_steps: int) -> Float[Array, "b h a"]:
            policy = nnx.merge(graphdef, state)
            noise = draws.noise
            if noise is None:
                noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_of(draws.keys))
            prefix = policy.encode(observation)
            return flow.sample(_guided(policy, draws), prefix, noise[None], num_steps=num_steps)[0]

        self._sample = jax.jit(sample, static_argnames="num_steps")

    def __call__(self, observation: Observation, draws: Draws, plan: Plan) -> tuple[Float[Array, "b h a"], Metrics]:
        shape = (len(observation.state), *self.action_shape)
        if draws.noise is not None and draws.noise.shape != shape:
            raise ValueError(f"noise must have the shape {shape} of the model's chunks, got {draws.noise.shape}")
        return self._sample(self._state, observation, draws, num_steps=plan.num_steps), {}


class TokenSampler:
    """A sampler of the tokens that pi0-FAST generates; ``TokenizeFast.inverse`` decodes the chunk from them.

    Each request is decoded to its own end with openpi's random numbers for its key, independently of its batch.
    """

    def __init__(self, policy: Pi0Fast, *, temperature: float = 0.0, max_decoding_steps: int = 256):
        self.plan = Plan(1, max_decoding_steps)
        self.action_shape = (policy.action_horizon, policy.action_dim)
        graphdef, self._state = nnx.split(stacked.unrolled(policy))

        def sample(
            state: nnx.State, observation: Observation, draws: Draws, max_decoding_steps: int
        ) -> Int[Array, "b steps"]:
            def one(observation: Observation, key: PRNGKeyArray) -> Int[Array, " steps"]:
                policy, alone = nnx.merge(graphdef, state), jax.tree.map(lambda x: x[None], observation)
                return policy.sample_actions(
                    key, alone, max_decoding_steps=max_decoding_steps, temperature=temperature
                )[0]

            return jax.vmap(one)(observation, keys_of(draws.keys))

        self._sample = jax.jit(sample, static_argnames="max_decoding_steps")

    def __call__(self, observation: Observation, draws: Draws, plan: Plan) -> tuple[Int[Array, "b steps"], Metrics]:
        if draws.noise is not None or draws.guidance is not None:
            raise ValueError("pi0-FAST writes tokens one after the other: it takes no noise and continues no chunk")
        return self._sample(self._state, observation, draws, max_decoding_steps=plan.num_steps), {}


class AgentSampler:
    """A sampler of an agent's chunk: with ``greedy``, the critic's best of N; with ``bc``, one sample of the flow.

    The random numbers for a key are those of ``ACRLPDAgent.sample_actions`` for one observation. What training alone
    needs is not kept (``ACRLPDAgent.acting_only``).
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
        if not self._alone:
            config.make_extraction(config.flow_steps)  # code of one's own that cannot be used is refused here
        guided = not self._alone and config.extraction == "guided" and any(config.guidance_weights)
        self.plan = Plan(1 if self._alone else wanted, num_steps or config.flow_steps, guided)
        self.action_shape = agent.nets.action_shape
        self._agent = agent.acting_only()
        self._plain = self._agent.with_extraction("best_of_n") if guided else self._agent

    def __call__(self, observation: Observation, draws: Draws, plan: Plan) -> tuple[Float[Array, "b h a"], Metrics]:
        if draws.noise is not None:
            raise ValueError(
                "an agent takes no noise from a request: it draws each candidate's itself. To choose the noise, serve "
                "the flow policy alone (FlowSampler)"
            )
        return choose_chunks(
            self._agent if plan.guided else self._plain,
            observation,
            keys_of(draws.keys),
            mode="bc" if self._alone else "greedy",
            num_samples=plan.num_samples,
            num_steps=plan.num_steps,
            guidance=draws.guidance,
        )


def _guided(policy: FlowPolicy, draws: Draws) -> FlowPolicy:
    return policy if draws.guidance is None else cast(FlowPolicy, flow.Guided(policy, draws.guidance))


def _drawing_keys(rng: PRNGKeyArray) -> Iterator[UInt32[np.ndarray, " 2"]]:
    """Yield the second key of each split, whose first key is split again; a block of splits is one compiled call."""
    while True:
        rng, block = _split_often(rng)
        yield from np.asarray(block)


@jax.jit
def _split_often(rng: PRNGKeyArray) -> tuple[PRNGKeyArray, UInt32[Array, "n 2"]]:
    def split(rng: PRNGKeyArray, _: None) -> tuple[PRNGKeyArray, UInt32[Array, " 2"]]:
        rng, sample_rng = jax.random.split(rng)
        return rng, jax.random.key_data(sample_rng)

    return jax.lax.scan(split, rng, length=KEYS_AT_A_TIME)


@jax.jit
def keys_of(words: UInt32[AnyArray, "b 2"]) -> PRNGKeyArray:
    """Return the threefry keys that consist of these words."""
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


class Policy:
    """A sampler with its transforms.

    Args:
        sampler: a ``FlowPolicy`` is wrapped in a ``FlowSampler`` of ten steps.
        transform: maps the robot's observation to the model's; its inverse maps the answer back.
        spec: shapes and dtypes of the model's observation, without a batch axis; other observations are refused
            before they reach the model. None: not known.
        real_time: chunks may continue the one being executed, which needs another compiled program.
        budget_s: how long an answer may take; as many candidates and flow steps are computed as fit. None: always all.
        rng: by default key 0, as in openpi; each call splits it once and uses the second key.
        metadata: sent by a server to each client that connects.
    """

    def __init__(
        self,
        sampler: Sampler | FlowPolicy,
        transform: Transform,
        *,
        spec: Observation | None = None,
        real_time: bool = False,
        budget_s: float | None = None,
        rng: PRNGKeyArray | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        self._sampler: Sampler = FlowSampler(sampler) if isinstance(sampler, FlowPolicy) else sampler
        self._transform = transform
        self._spec = spec
        self._real_time = real_time
        self._budget_s = budget_s
        self._budget = None if budget_s is None else Budget(smaller_plans(self._sampler.plan))
        self._keys = _drawing_keys(jax.random.key(0) if rng is None else rng)
        self._keys_lock = threading.Lock()
        self._sizes: tuple[int, ...] = ()  # of the compiled batches
        self._told_unguided = False
        self.metadata = dict(metadata or {})

    @property
    def plan(self) -> Plan:
        return self._sampler.plan

    def infer(self, obs: Data, *, noise: Float[np.ndarray, "*b h a"] | None = None) -> Data:
        """Return the answer to one observation, which has no batch axis; ``noise`` may have one of size 1.

        It holds ``actions`` [h a] in the robot's units; ``state`` unless the robot's transform drops it, as openpi's
        three do; ``policy_timing`` with ``infer_ms``, the time of the model alone; ``policy_statistics`` on request;
        ``real_time`` with the reason if the chunk could not continue the ``previous_actions`` that were sent.
        """
        request = self.prepare(obs)
        if noise is not None:
            noise = np.asarray(noise if noise.ndim == 2 else noise[0], np.float32)
            request = dataclasses.replace(request, noise=noise)
        return self.infer_batch([request])[0]

    def prepare(self, obs: Data) -> Request:
        """Do everything before the model for one observation; ``obs`` is not changed, its ``actions`` are not read.

        Raises:
            ValueError: a shape, a dtype or an option is wrong, or a number is not finite.
        """
        start = time.monotonic()
        data = {key: value for key, value in obs.items() if key != "actions"}  # recorded rows have actions
        options = Options.parse(data.pop(OPTIONS_KEY, {}))
        guided = self._continues(options)
        if guided and options.previous_actions is not None:
            data["actions"] = self._whole_chunk(options.previous_actions)
        try:
            transformed = self._transform(data)
            observation = to_observation(transformed)
        except MISTAKES as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
            raise ValueError(f"the observation is not one of this robot: {reason}. It has {outline(data)}") from error
        if self._spec is not None:
            observation = conform(observation, self._spec)
        if options.seed is None:
            with self._keys_lock:
                key = next(self._keys)
        else:
            key = np.array([0, options.seed], np.uint32)  # as jax.random.key
        seconds = self._seconds_for(options)
        return Request(
            observation,
            key,
            guidance=self._guidance(transformed["actions"], options) if guided else None,
            options=options,
            deadline=None if seconds is None else start + seconds,
            plan=None if seconds is None or self._budget is None else self._budget.alone(seconds),
        )

    def _continues(self, options: Options) -> bool:
        """Return whether the chunk continues another; the reason if it cannot is logged once."""
        if options.previous_actions is None:
            return False
        if not self._real_time:
            raise ValueError(f"{OPTIONS_KEY}.previous_actions needs real-time chunking, which is off (--real_time)")
        if options.unguided and not self._told_unguided:
            self._told_unguided = True
            logger.warning("a chunk of a client is %s; further ones are reported to clients only", options.unguided)
        return options.unguided is None

    def _whole_chunk(self, previous: Float[np.ndarray, "t a"]) -> Float[np.ndarray, "h a"]:
        """Extend the rest of a chunk to the horizon by repeating its last action; the weights there are zero."""
        horizon = self._sampler.action_shape[0]
        if len(previous) > horizon:
            raise ValueError(f"{OPTIONS_KEY}.previous_actions has {len(previous)} steps, a chunk has {horizon}")
        if not np.isfinite(previous).all():
            raise ValueError(f"{OPTIONS_KEY}.previous_actions has numbers that are not finite")
        return np.concatenate([previous, np.repeat(previous[-1:], horizon - len(previous), axis=0)])

    def _guidance(self, actions: np.ndarray, options: Options) -> Guidance:
        assert options.previous_actions is not None  # otherwise there is nothing to continue
        horizon, width = self._sampler.action_shape
        if actions.shape != (horizon, width):
            raise ValueError(
                f"{OPTIONS_KEY}.previous_actions becomes {actions.shape} where the model has {(horizon, width)}: send "
                "actions as the policy gave them"
            )
        weights = flow.prefix_weights(options.delay, len(options.previous_actions), horizon)
        return Guidance(np.asarray(actions, np.float32), weights)

    def _seconds_for(self, options: Options) -> float | None:
        """Return how long the answer may take; None: without limit."""
        if self._budget_s is None and options.deadline_ms is not None:
            raise ValueError(f"{OPTIONS_KEY}.deadline_ms needs a policy with a latency budget (--latency_budget_ms)")
        return self._budget_s if options.deadline_ms is None else options.deadline_ms / 1000

    def infer_batch(
        self, requests: Sequence[Request], *, size: int | None = None, plan: Plan | None = None
    ) -> list[Data]:
        """Return the answers to requests that arrived together; each is the same as if it had arrived alone.

        Requests of one kind share a call, padded to ``size``; if there are several kinds, each is padded to the next
        compiled size.

        Raises:
            NotFiniteError: some actions are not finite; the error holds the other answers.
        """
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(request.kind, []).append(index)
        answers: list[Data | None] = [None] * len(requests)
        for members in kinds.values():
            padded = size if len(kinds) == 1 else self._compiled_size(len(members), size)
            group = [requests[index] for index in members]
            for index, answer in zip(members, self._call(group, padded, plan), strict=True):
                answers[index] = answer
        sound = [answer for answer in answers if answer is not None]
        if len(sound) < len(answers):
            raise NotFiniteError(answers)
        return sound

    def _compiled_size(self, count: int, size: int | None) -> int:
        return next((each for each in self._sizes if each >= count), max(count, size or 0))

    def _call(self, requests: Sequence[Request], size: int | None, plan: Plan | None) -> list[Data | None]:
        """Return the answers to requests of one kind, in one call; None where the actions are not finite."""
        rows = [*requests, *[requests[-1]] * ((size or 0) - len(requests))]
        start = time.monotonic()
        plan = plan or self._plan_for(rows, start)
        chunks, values = self._sampler(*_stacked(rows), plan)
        if not any(request.options.statistics for request in requests):
            values = {}  # not worth the transfer from the device
        chunks, values = jax.device_get((chunks, values))
        infer_s = time.monotonic() - start
        if self._budget is not None:
            self._budget.took(plan, len(rows), infer_s)
        chunks = chunks[: len(requests)]
        finite = np.isfinite(chunks).all(axis=tuple(range(1, chunks.ndim)))
        states = np.stack([request.observation.state for request in requests])
        batch = self._transform.inverse({"state": states, "actions": chunks})
        actions = batch["actions"]  # a tokenizer's come from the transform
        finite &= np.isfinite(actions).all(axis=tuple(range(1, actions.ndim)))
        return [
            _answer(request, row, batch, values, infer_s, plan) if finite[row] else None
            for row, request in enumerate(requests)
        ]

    def _plan_for(self, rows: Sequence[Request], now: float) -> Plan:
        deadlines = [row.deadline for row in rows if row.deadline is not None]
        if self._budget is None or not deadlines:
            return self.plan
        return self._budget.choose(len(rows), min(deadlines) - now)

    def warm_up(self, sizes: Sequence[int]) -> None:
        """Compile the model for batches of these sizes, so that no request waits; with a budget, also measure it."""
        if self._spec is None:
            raise ValueError("a policy without a spec does not know which shapes to compile")
        self._sizes = tuple(sorted(sizes))
        jax.block_until_ready(_split_often(jax.random.key(0)))
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._spec)
        plain = Request(zeros, np.zeros(2, np.uint32))
        for request in (
            (plain, dataclasses.replace(plain, guidance=self._no_guidance())) if self._real_time else (plain,)
        ):
            for size in sizes:
                for plan in self._budget.plans if self._budget else (self.plan,):
                    seconds = self._measure([request] * size, plan)
                    if self._budget is not None:  # the last measurement counts: with guidance, which is slower
                        self._budget.measured(plan, size, seconds)

    def _measure(self, rows: Sequence[Request], plan: Plan) -> float:
        """Return the seconds of a compiled call, the fastest of a few; without a budget, call only once."""
        seconds = []
        for _ in range(1 + MEASUREMENTS if self._budget else 1):
            start = time.monotonic()
            jax.device_get(self._sampler(*_stacked(rows), plan))
            seconds.append(time.monotonic() - start)
        return min(seconds)

    def _no_guidance(self) -> Guidance:
        shape = self._sampler.action_shape
        return Guidance(np.zeros(shape, np.float32), np.zeros(shape[:1], np.float32))


MEASUREMENTS = 5


def _answer(
    request: Request, row: int, batch: Data, values: Mapping[str, AnyArray], infer_s: float, plan: Plan
) -> Data:
    """Return the answer in one row of a call."""
    answer = {name: value[row] for name, value in batch.items()}
    answer["policy_timing"] = {"infer_ms": infer_s * 1000}
    if request.options.unguided:
        answer["real_time"] = request.options.unguided
    if request.options.statistics:  # plain numbers, because a client's chunk broker would split arrays into steps
        chosen = {name: np.asarray(value[row]).tolist() for name, value in values.items()}
        answer["policy_statistics"] = chosen | dataclasses.asdict(plan)
    return answer


def _stacked(rows: Sequence[Request]) -> tuple[Observation, Draws]:
    """Stack requests of one kind into a batch."""
    observation = _stack([row.observation for row in rows])
    noise = [row.noise for row in rows if row.noise is not None]
    guidance = [row.guidance for row in rows if row.guidance is not None]
    keys = np.stack([row.key for row in rows])
    return observation, Draws(keys, np.stack(noise) if noise else None, _stack(guidance) if guidance else None)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
