"""Measure the cost of one update: passes through the policy, and its time compared with a supervised step, the literal
recipe, stored prefixes, the implicit target, and the critic alone.

    python benchmarks/update.py [--size mid|nano] [--batch 4] [--candidates 8] [--steps 10] [--critics 2 10] [--json]

Passes: the FLOPs of the whole traced update, with all loop iterations, are compared with those of the passes that the
table in ``docs/algorithm.md``, section 6, allows; an extra pass shows as a difference. The compiler's own count is
given for one candidate and one Euler step with unrolled layers, where its program has no loop, because it counts a loop
only once.

The literal recipe is the founding design's step as written: it is not compiled as a whole, so each call of the policy
is a separate program, which is compiled here. The critic encodes s and s' and takes the best of N at s', with one call
per candidate; imitation encodes s again, and so does the entropy, with N samples of its own. (Its actor term is left
out, as best of N has none.) A more favourable reading is measured, too: N samples are one vmapped call that encodes
once. The critic alone learns as in the first ``critic_alone_steps`` of a run, from stored features.

The implicit target samples nothing at s': its update is the supervised step and a forward pass of the prefix at s', or
with a frozen backbone and stored features of s', the supervised step of what is not frozen.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flops
import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax
import sampling
from flax import nnx

from acrlpd.agents import agent as agent_module
from acrlpd.agents import losses
from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.agents.config import AgentConfig, TemperatureConfig
from acrlpd.agents.draws import Draws
from acrlpd.agents.sampling import select
from acrlpd.models import flow, parameters
from acrlpd.models.critic import CriticConfig
from acrlpd.models.pi0 import Pi0, Pi0Config
from acrlpd.types import ChunkBatch, Observation

ROBOT_DIM = 7
ENTROPY_STEPS = 5  # Euler steps of the samples from which the founding design estimates the entropy
MID = dataclasses.replace(sampling.CONFIG, unroll=False)  # layers in a loop, which is the default
NANO = dataclasses.replace(
    MID,
    action_dim=8,
    state_dim=8,
    action_horizon=5,
    paligemma_variant="nano",
    action_expert_variant="nano_expert",
    vision_variant="nano",
    image_size=32,
    max_token_len=8,
    cameras=("base_0_rgb",),
)
SIZES = {"mid": MID, "nano": NANO}
IMPLICIT: dict[str, Any] = {"target": "implicit", "temperature": TemperatureConfig(adaptive=False)}
Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--critics", type=int, nargs=2, default=[2, 10], help="compared with each other")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only_passes", action="store_true", help="no timing")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    setting = Setting(SIZES[arguments.size], arguments.batch, arguments.candidates, arguments.steps)
    result: dict[str, Any] = {**about, "setting": str(setting), "passes": passes(setting)}
    if not arguments.only_passes:
        result["rows"] = timings(setting, arguments)
        result["ratios"] = ratios({row["name"]: row["wall_s"]["median"] for row in result["rows"]}, arguments.critics)
    machine.show(result, as_json=arguments.json, table=table(result))


@dataclasses.dataclass(frozen=True)
class Setting:
    policy: Pi0Config
    batch: int
    candidates: int
    steps: int

    def agent(self, *, critics: int = 10, frozen: bool = False, **changes: Any) -> ACRLPDAgent:
        config = AgentConfig(
            critic=CriticConfig(num_critics=critics, q_aggregation="mean"),
            best_of_n_samples=self.candidates,
            flow_steps=self.steps,
            **changes,
        )
        return ACRLPDAgent.create(
            config,
            self.policy.create(nnx.Rngs(0)),
            dict.fromkeys(("policy", "critic", "temperature"), optax.adamw(1e-4)),
            state_dim=self.policy.state_dim,
            action_dim=ROBOT_DIM,
            rng=jax.random.key(0),
            trainable=Pi0.is_suffix_param if frozen else lambda path: True,
        )

    def observation(self, seed: int) -> Observation:
        rng, config = np.random.default_rng(seed), self.policy
        side, tokens = config.image_size, (self.batch, config.max_token_len)
        images = {name: rng.integers(0, 256, (self.batch, side, side, 3), np.uint8) for name in config.cameras}
        return Observation(
            state=rng.normal(size=(self.batch, config.state_dim)).astype(np.float32),
            images=images,
            image_masks={name: np.ones(self.batch, bool) for name in images},
            tokenized_prompt=rng.integers(0, config.vocab_size, tokens).astype(np.int32),
            tokenized_prompt_mask=np.ones(tokens, bool),
        )

    def data(self) -> ChunkBatch:
        rng, shape = np.random.default_rng(2), (self.batch, self.policy.action_horizon)
        ones = np.ones(self.batch, np.float32)
        made = ChunkBatch(
            observations=self.observation(0),
            next_observations=self.observation(1),
            actions=rng.uniform(-1, 1, (*shape, self.policy.action_dim)).astype(np.float32),
            rewards=-np.ones(shape, np.float32),
            terminals=np.zeros(shape, np.float32),
            valid=np.ones(shape, np.float32),
            bootstrap_mask=ones,
            sequence_mask=ones,
            episode_id=np.zeros(self.batch, np.int32),
            step_id=np.zeros(self.batch, np.int32),
        )
        return jax.tree.map(jnp.asarray, made)


# ---- passes


def passes(setting: Setting) -> dict[str, Any]:
    """Return FLOPs of an update and of the allowed passes for each extraction, and the compiler's where possible."""
    found = {name: accounts(setting, name, flops.of) for name in ("best_of_n", "q_gradient", "distill")}
    small = dataclasses.replace(setting, policy=dataclasses.replace(setting.policy, unroll=True), candidates=1, steps=1)
    found["implicit target"] = accounts(setting, "best_of_n", flops.of, **IMPLICIT)
    found["best_of_n, N=K=1, compiled"] = accounts(small, "best_of_n", flops.of_compiled)
    return found


def accounts(setting: Setting, extraction: str, count: Callable[..., float], **changes: Any) -> dict[str, float]:
    changes = {"extraction": extraction, "temperature": TemperatureConfig(adaptive=setting.candidates > 1), **changes}
    agent, batch, rng = setting.agent(**changes), setting.data(), jax.random.key(0)
    nets, weights = agent.nets, agent.config.loss_weights
    draws = Draws.of_update(rng, agent.config, (setting.batch, *nets.action_shape))
    modules = nets.modules(agent.params, agent.frozen)
    prefix = jax.eval_shape(lambda seen: modules.policy.encode(seen), batch.observations)
    features = jnp.zeros((setting.batch, modules.policy.feature_dim))
    time = jnp.ones((1, setting.batch))

    def imitation(params: Any) -> Any:
        policy = nets.modules(agent.params | {"policy": params}, agent.frozen).policy
        seen = policy.encode(batch.observations)
        return flow.flow_loss(policy, seen, batch.actions, draws.flow_noise, draws.flow_time).mean()

    def critic(params: Any) -> Any:
        q = nets.modules(agent.params | {"critic": params}, agent.frozen).critic
        return jnp.square(q(features, batch.observations.state, batch.actions[None])).mean()

    def state_value(params: Any) -> Any:
        v = nets.modules(agent.params | {"value": params}, agent.frozen).value
        assert v is not None, "only an agent with an implicit target has parameters of V"
        return jnp.square(v(features, batch.observations.state)).mean()

    def climb(params: Any, prefix: Any) -> Any:
        both = {group: params.get(group, value) for group, value in agent.params.items()}
        merged = nets.modules(both, agent.frozen)
        choice = agent.config.make_extraction(setting.steps)
        return choice.actor_loss(merged, prefix, draws.actor, jnp.float32(1.0))[0]

    encode = count(lambda seen: modules.policy.encode(seen), batch.next_observations)
    step = count(lambda prefix: modules.policy.velocity(prefix, draws.flow_noise[None], time), prefix)
    value = count(lambda chunk: modules.critic(features, batch.observations.state, chunk), draws.flow_noise[None])
    candidates = agent.config.candidates_in_target
    steps = 1 if extraction == "distill" else setting.steps
    table = {
        "prefix(s), suffix(s), forward and backward": count(jax.grad(imitation), agent.params["policy"]),
        "prefix(s') forward": encode,
        "N K suffix steps at s'": candidates * steps * step,
        "critics": count(jax.grad(critic), agent.params["critic"]) + (candidates + 1) * value,
    }
    if "value" in agent.params:
        table["V"] = count(jax.grad(state_value), agent.params["value"]) + count(state_value, agent.params["value"])
    if extraction != "best_of_n":
        moved = {group: agent.params[group] for group in (("student",) if extraction == "distill" else ("policy",))}
        table["actor"] = count(jax.grad(climb), moved, prefix)
    whole = count(lambda agent: agent_module._gradients(agent, batch, rng, weights), agent)
    allowed = sum(table.values())
    return {name: value / 1e9 for name, value in table.items()} | {
        "allowed_gflop": allowed / 1e9,
        "update_gflop": whole / 1e9,
        "update_over_allowed": whole / allowed,
        "prefix_passes": whole / encode,
    }


# ---- time


def timings(setting: Setting, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    timer, (few, many) = sampling.Timer(arguments.repeats), arguments.critics
    calls: dict[str, Call] = {
        "supervised step": supervised(setting),
        "update": update(setting.agent(), setting.data()),
        "literal recipe": literal(setting),
        "literal recipe, samples by vmap": literal(setting, one_by_one=False),
        "frozen": update(setting.agent(frozen=True), setting.data()),
        "frozen, stored prefixes": update(setting.agent(frozen=True), with_prefixes(setting)),
        "implicit": update(setting.agent(**IMPLICIT), setting.data()),
        "supervised step, frozen": supervised(setting, frozen=True),
        "implicit, frozen, stored features": update(setting.agent(frozen=True, **IMPLICIT), with_features(setting)),
        "critic alone, stored features": critic_alone(setting),
        f"update, {few} critics": update(setting.agent(critics=few), setting.data()),
        f"update, {many} critics": update(setting.agent(critics=many), setting.data()),
    }
    return [timer.row(name, call, 0.0) for name, call in calls.items()]


def update(agent: ACRLPDAgent, batch: ChunkBatch) -> Call:
    def call() -> Any:
        nonlocal agent
        agent, metrics = agent.update(batch, jax.random.key(0))
        return metrics

    return call


def with_prefixes(setting: Setting) -> ChunkBatch:
    """Return the batch as a run with a frozen backbone reads it."""
    batch = setting.data()
    policy = setting.policy.create(nnx.Rngs(0))

    def stored(seen: Observation) -> Observation:
        return Observation(state=seen.state, prefix=flow.portable(policy, policy.encode(seen)))

    return dataclasses.replace(
        batch, observations=stored(batch.observations), next_observations=stored(batch.next_observations)
    )


def with_features(setting: Setting) -> ChunkBatch:
    """Return the batch as a run with a frozen backbone and an implicit target reads it, if the caches are too large."""
    batch, stored = setting.data(), with_prefixes(setting).next_observations
    alone = dataclasses.replace(stored, prefix=(stored.prefix[0], None, None))
    return dataclasses.replace(batch, next_observations=alone)


def supervised(setting: Setting, *, frozen: bool = False) -> Call:
    """Make openpi's training step: only the flow loss, its gradient and AdamW; ``frozen``: without the backbone."""
    graph, params = parameters.split(setting.policy.create(nnx.Rngs(0)))
    params, held = parameters.divide(params, Pi0.is_suffix_param if frozen else lambda path: True)
    optimizer, batch = optax.adamw(1e-4), setting.data()
    state = (params, optimizer.init(params))

    def loss(params: Any) -> Any:
        policy = nnx.merge(graph, parameters.join(params, held))
        return policy.compute_loss(jax.random.key(0), batch.observations, batch.actions).mean()

    def step(state: Any) -> Any:
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return _stateful(step, state)


def literal(setting: Setting, *, one_by_one: bool = True) -> Call:
    """Make a step that computes each term separately, like the founding design's four loss computers."""
    agent, batch = setting.agent(), setting.data()
    nets, config, weights = agent.nets, agent.config, agent.config.loss_weights
    rngs = jax.random.split(jax.random.key(0), setting.candidates)

    def modules(params: Any) -> Any:
        return nets.modules(params, agent.frozen)

    @jax.jit
    def features(params: Any, seen: Observation) -> Any:
        return modules(params).policy.encode(seen).features

    @functools.partial(jax.jit, static_argnames="steps")
    def sample(params: Any, seen: Observation, rng: Any, *, steps: int) -> Any:
        return modules(params).policy.sample_actions(rng, seen, num_steps=steps)

    @functools.partial(jax.jit, static_argnames="steps")
    def sample_all(params: Any, seen: Observation, *, steps: int) -> Any:
        return jax.vmap(lambda rng: modules(params).policy.sample_actions(rng, seen, num_steps=steps))(rngs)

    def drawn(params: Any, seen: Observation, steps: int) -> Any:
        if one_by_one:
            return jnp.stack([sample(params, seen, rng, steps=steps) for rng in rngs])
        return sample_all(params, seen, steps=steps)

    @jax.jit
    def target(params: Any, slow: Any, encoded: Any, to_score: Any, candidates: Any) -> Any:
        state = batch.next_observations.state
        chosen, _ = select(candidates, modules(params).critic(to_score, state, candidates).mean(axis=0))
        q = nnx.merge(nets.critic_def, slow)(encoded, state, chosen[None])[:, 0].mean(axis=0)
        return losses.td_target(batch.rewards, batch.valid, batch.bootstrap_mask, q, discount=config.discount)

    def critic_loss(critic: Any, params: Any, encoded: Any, target: Any) -> Any:
        now = modules(params | {"critic": critic}).critic(encoded, batch.observations.state, batch.actions[None])
        return weights.critic_weight * losses.critic_loss(now[:, 0], target, batch.sequence_mask)

    def bc_loss(policy: Any, params: Any) -> Any:
        moved = modules(params | {"policy": policy}).policy
        return weights.bc_weight * moved.compute_loss(rngs[0], batch.observations, batch.actions).mean()

    def temperature_loss(temperature: Any, chunks: Any) -> Any:
        entropy = losses.gaussian_entropy(chunks)
        return losses.temperature_loss(temperature["log_temperature"], entropy, target_entropy=nets.target_entropy)

    grads_of = {
        "critic": jax.jit(jax.grad(critic_loss)),
        "policy": jax.jit(jax.grad(bc_loss)),
        "temperature": jax.jit(jax.grad(temperature_loss)),
    }

    @functools.partial(jax.jit, donate_argnums=(1, 2, 3))
    def apply(grads: Any, params: Any, opt_state: Any, slow: Any) -> Any:
        moved = {}
        for group, optimizer in nets.optimizers.items():
            updates, opt_state[group] = optimizer.update(grads[group], opt_state[group], params[group])
            moved[group] = optax.apply_updates(params[group], updates)
        return moved, opt_state, optax.incremental_update(moved["critic"], slow, config.target_update_tau)

    state = (agent.params, dict(agent.opt_state), agent.target_critic)

    def call() -> Any:
        nonlocal state
        params, _, slow = state
        now, after = batch.observations, batch.next_observations
        encoded, encoded_after = features(params, now), features(params, after)
        candidates = drawn(params, after, setting.steps)
        y = target(params, slow, encoded_after, features(params, after), candidates)
        grads = {
            "critic": grads_of["critic"](params["critic"], params, encoded, y),
            "policy": grads_of["policy"](params["policy"], params),
            "temperature": grads_of["temperature"](params["temperature"], drawn(params, now, ENTROPY_STEPS)),
        }
        state = apply(grads, *state)
        return state

    return call


def critic_alone(setting: Setting) -> Call:
    """Make the critics' own update on stored features, without any pass through the policy."""
    agent, batch = setting.agent(), with_prefixes(setting)
    batch = dataclasses.replace(batch, next_actions=batch.actions)  # any chunk costs the same

    def call() -> Any:
        nonlocal agent
        agent, metrics = agent.update_critic(batch, jax.random.key(0))
        return metrics

    return call


def _stateful(step: Callable[[Any], Any], state: Any) -> Call:
    compiled = jax.jit(step, donate_argnums=0)

    def call() -> Any:
        nonlocal state
        state, value = compiled(state)
        return value

    return call


def ratios(wall: dict[str, float], critics: list[int]) -> dict[str, float]:
    few, many = (wall[f"update, {count} critics"] for count in critics)
    return {
        "update_over_supervised_step": wall["update"] / wall["supervised step"],
        "implicit_over_supervised_step": wall["implicit"] / wall["supervised step"],
        "implicit_over_supervised_step_frozen": (
            wall["implicit, frozen, stored features"] / wall["supervised step, frozen"]
        ),
        "update_over_implicit": wall["update"] / wall["implicit"],
        "literal_over_update": wall["literal recipe"] / wall["update"],
        "literal_by_vmap_over_update": wall["literal recipe, samples by vmap"] / wall["update"],
        "update_over_stored_prefixes": wall["update"] / wall["frozen, stored prefixes"],
        "update_over_critic_alone": wall["update"] / wall["critic alone, stored features"],
        "many_critics_over_few": many / few,
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['command']} on {result['processor']}, load {result['load_average']}", ""]
    for name, each in result["passes"].items():
        lines.append(
            f"{name:28} {each['update_gflop']:9.2f} GFLOP, {each['update_over_allowed']:.3f} of what section 6 allows"
        )
    for row in result.get("rows", ()):
        lines.append(
            f"{row['name']:36}{row['wall_s']['median'] * 1e3:10.1f} ms{row['cpu_s']['median'] * 1e3:10.1f} cpu ms"
        )
    lines += [f"{name:38}{value:10.2f}" for name, value in result.get("ratios", {}).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
