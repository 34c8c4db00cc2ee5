"""The whole update: against NumPy, against the table of gradients, against what it may cost."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import optax
import pytest
from flax import nnx
from jax.extend import core

from acrlpd.agents import acrlpd, candidates, implicit, sampling, td
from acrlpd.agents import agent as agent_module
from acrlpd.agents.config import AgentConfig, ImplicitConfig, TemperatureConfig
from acrlpd.agents.draws import Draws
from acrlpd.agents.losses import LossWeights
from acrlpd.models import flow
from acrlpd.models.mlp_flow import MLPFlow, MLPFlowConfig
from acrlpd.models.pi0 import Pi0, Pi0Config, is_suffix_param
from acrlpd.types import Observation

ADAM = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.95, "eps": 1e-2, "weight_decay": 0.1}
MAX_NORM = 0.5
WEIGHTS = LossWeights(critic_weight=0.7, actor_weight=1.3, bc_weight=0.9, alpha_weight=0.6)

IMPLICIT = {"target": "implicit", "temperature": TemperatureConfig(adaptive=False)}

# Every choice of the loss occurs once; a compiled update is shared by all tests of a case.
CASES = {
    "min": {},
    "mean": {"critic": {"q_aggregation": "mean"}, "bc_weighting": "importance"},
    "weighted": {"critic": {"q_aggregation": "weighted"}, "action_clip": 0.5},
    "subset": {"critic": {"q_aggregation": "subset"}, "huber_delta": 0.5, "bc_weighting": "difficulty"},
    "short": {"critic": {"q_aggregation": "mean_minus_std", "horizon": 2}},
    "q_gradient": {"extraction": "q_gradient", "action_clip": 2.0},
    "distill": {"extraction": "distill", "action_clip": 1.0, "distill_weight": 3.0},
    "implicit": {**IMPLICIT, "bc_weighting": "importance"},
    "long": {**IMPLICIT, "critic": {"horizon": 1, "backup_horizon": 3, "q_aggregation": "subset"}},
    "quantile": {
        **IMPLICIT,
        "implicit": ImplicitConfig("quantile", 0.7),
        "critic": {"q_aggregation": "subset"},
        "huber_delta": 0.5,
    },
}
# the others take a compilation each for no other test
QUICK = ("min", "short", "q_gradient", "distill", "implicit", "long")
MODEL_WIDTH = {"q_gradient": 3}  # wider than the robot's two action dimensions: the third is padding


@pytest.fixture(scope="module")
def agents(toys):
    """One agent a case, made once: its structure is what a compiled update is stored under."""
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adamw(**ADAM))
    return {
        name: toys.agent(
            toys.config(**changes),
            policy=toys.policy(MODEL_WIDTH.get(name, 2)),
            optimizer=optimizer,
            action_dim=2,
        )
        for name, changes in CASES.items()
    }


# -- against NumPy -----------------------------------------------------------------------------------------------------


def draws(agent, rng) -> reference.Draws:
    """What one update draws: its key is split in six, the last is dropout's."""
    config, shape = agent.config, (6, *agent.nets.action_shape)
    target_rng, subset_rng, noise_rng, time_rng, actor_rng, _ = jax.random.split(rng, 6)
    actor_samples = 2 if config.extraction == "q_gradient" else 1
    drawn = reference.Draws(
        candidate_noise=jax.random.normal(target_rng, (config.candidates_in_target, *shape)),
        pair=jax.random.choice(subset_rng, config.critic.num_critics, (2,), replace=False),
        flow_noise=jax.random.normal(noise_rng, shape),
        flow_time=flow.sample_time(time_rng, (6,)),
        actor_noise=jax.random.normal(actor_rng, (actor_samples, *shape)),
    )
    return reference.Draws(**{name: np.asarray(x) for name, x in vars(drawn).items()})


def reference_batch(batch) -> reference.Batch:
    fields = ("actions", "rewards", "valid", "bootstrap_mask", "sequence_mask")
    arrays = {name: np.asarray(getattr(batch, name), np.float64) for name in fields}
    state, next_state = (np.asarray(x.state, np.float64) for x in (batch.observations, batch.next_observations))
    return reference.Batch(state=state, next_state=next_state, **arrays)


def settings(agent) -> reference.Settings:
    config = agent.config
    return reference.Settings(
        extraction=config.extraction,
        target=config.target,
        statistic=config.implicit.statistic,
        level=config.implicit.level,
        aggregation=config.critic.q_aggregation,
        judged=(agent.nets.critic_horizon, 2),
        backup=agent.nets.backup_horizon,
        distill_level=config.critic.distill_level,
        pessimism=config.critic.pessimism,
        discount=config.discount,
        tau=config.target_update_tau,
        num_steps=config.flow_steps,
        action_clip=config.action_clip,
        huber_delta=config.huber_delta,
        distill_weight=config.distill_weight,
        bc_weighting=config.bc_weighting,
        bc_bound=config.bc_weighting_bound,
        entropy_multiplier=config.temperature.target_entropy_multiplier,
        max_norm=MAX_NORM,
        **ADAM,
    )


@pytest.mark.parametrize(
    ("case", "rows"),
    [
        *(("min", (kind,)) for kind in ("whole", "time_limit", "terminal_inside", "padded")),
        ("implicit", ("time_limit", "terminal_last")),
        *((case, ()) for case in QUICK),  # a batch of all kinds of rows
        *(pytest.param(case, (), marks=pytest.mark.slow) for case in CASES if case not in QUICK),
    ],
)
def test_update_equals_numpy(case, rows, agents, toys, flat):
    """Every loss and, after two updates, every parameter: two, so that moments and the moving target count."""
    agent = agents[case]
    state = reference.initial_state(
        {name: flat(tree) for name, tree in agent.params.items()}, flat(agent.target_critic)
    )
    weights = {"critic": 0.7, "actor": 1.3, "bc": 0.9, "alpha": 0.6}
    for seed in range(2):
        batch = toys.batch(*rows, action_dim=agent.nets.action_shape[1], seed=seed)
        state, losses = reference.update(
            state, reference_batch(batch), draws(agent, toys.key(seed)), settings(agent), weights
        )
        agent, metrics = toys.update(agent, batch, toys.key(seed), WEIGHTS)
        for name, expected in losses.items():
            np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    for group, expected in {**state.params, "target_critic": state.target_critic}.items():
        actual = flat(agent.target_critic if group == "target_critic" else agent.params[group])
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name], value, rtol=0, atol=1e-5, err_msg=f"{group}/{name}")


@pytest.mark.parametrize("case", ["min", "short", "weighted"])
def test_critics_alone_learn_the_value_of_what_the_data_goes_on_with(case, agents, toys, flat):
    agent, rng = agents[case], np.random.default_rng(0)
    batch = toys.batch(action_dim=agent.nets.action_shape[1])
    batch = dataclasses.replace(batch, next_actions=jnp.asarray(rng.uniform(-1, 1, batch.actions.shape), jnp.float32))
    after, metrics = toys.jit(agent_module._update_critic.__wrapped__)(agent, batch, toys.key(0))

    online, slow, facts = flat(agent.params["critic"]), flat(agent.target_critic), reference_batch(batch)
    judged = settings(agent).judged
    next_q = reference.member_values(slow, facts.next_state, np.asarray(batch.next_actions, np.float64), judged)
    next_q = reference.aggregate(slow, next_q, settings(agent))
    powers = agent.config.discount ** np.arange(judged[0])
    target = (powers * (facts.valid * facts.rewards)[:, : judged[0]]).sum(axis=1)
    target += agent.config.discount ** len(powers) * facts.bootstrap_mask * next_q
    q = reference.member_values(online, facts.state, facts.actions, judged)
    np.testing.assert_allclose(metrics["target_q_mean"], target.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["td_error_mean"], np.abs(q - target).mean(), rtol=1e-5)
    for group in ("policy", "temperature"):
        jax.tree.map(np.testing.assert_array_equal, after.params[group], agent.params[group])
        jax.tree.map(np.testing.assert_array_equal, after.opt_state[group], agent.opt_state[group])
    assert not same(after.params["critic"], agent.params["critic"])
    assert not same(after.target_critic, agent.target_critic)
    assert after.step == agent.step + 1


def test_critics_alone_learn_with_v_if_the_target_is_implicit(agents, toys, flat):
    """No next chunk is needed, and the target is that of the whole update; V does not act."""
    agent, batch = agents["implicit"], toys.batch()
    assert batch.next_actions is None
    after, metrics = toys.jit(agent_module._update_critic.__wrapped__)(agent, batch, toys.key(0))
    facts = reference_batch(batch)
    v, next_v = (reference.state_value(flat(agent.params["value"]), x) for x in (facts.state, facts.next_state))
    target = reference.returns_and(next_v, settings(agent), facts)
    np.testing.assert_allclose(metrics["target_q_mean"], target.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["v_mean"], v.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["total_loss"], metrics["critic_loss"] + metrics["value_loss"], rtol=1e-6)
    for group in ("policy", "temperature"):
        jax.tree.map(np.testing.assert_array_equal, after.params[group], agent.params[group])
    for group in ("critic", "value"):
        assert not same(after.params[group], agent.params[group])
    assert "value" not in agent.acting_only().params


def test_long_critics_learn_with_the_critics_alone_and_do_not_act(agents, toys):
    agent = agents["long"]
    after, _ = toys.jit(agent_module._update_critic.__wrapped__)(agent, toys.batch(), toys.key(0))
    assert {group for group in agent.params if not same(after.params[group], agent.params[group])} == {
        *("critic", "value", "long_critic")
    }
    assert agent.params.keys() - agent.acting_only().params.keys() == {"value", "long_critic"}


def same(one, other) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.all(x == y)), one, other)))


def test_critics_alone_need_the_next_chunk(agents, toys):
    with pytest.raises(ValueError, match="critic_alone=True"):
        agents["min"].update_critic(toys.batch(action_dim=agents["min"].nets.action_shape[1]), toys.key(0))


# -- section 7: gradients ----------------------------------------------------------------------------------------------


class FeatureFlow(MLPFlow):
    """Gives the critic features that come out of trainable parameters, as pi0 does."""

    def __init__(self, config, rngs):
        super().__init__(config, rngs)
        self.feature_dim = config.hidden_dims[0]

    def encode(self, observation):
        prefix = super().encode(observation)
        return prefix.replace(features=prefix.cache)


TERMS = ("critic_weight", "bc_weight", "actor_weight", "alpha_weight")
TABLE = {  # for each extraction, and for an implicit target, which parameters the four terms may move
    "best_of_n": ({"critic"}, {"policy"}, set(), {"temperature"}),
    "q_gradient": ({"critic"}, {"policy"}, {"policy"}, {"temperature"}),
    "distill": ({"critic"}, {"policy"}, {"student"}, {"temperature"}),
    "implicit": ({"critic", "value"}, {"policy"}, set(), set()),
    "long": ({"critic", "value", "long_critic"}, {"policy"}, set(), set()),
}


@pytest.mark.parametrize("case", TABLE)
def test_a_loss_moves_its_own_parameters_alone(case, toys, flat):
    """The table of section 7: exactly zero where it says no, in every array; not zero, in every array, where it says
    yes. All four terms at once, each weighing 1 in its own copy of the gradient."""
    choice = IMPLICIT if case in ("implicit", "long") else {"extraction": case}
    critic = {"num_critics": 2, "q_aggregation": "weighted"}
    critic |= {"horizon": 1, "backup_horizon": 3} if case == "long" else {}
    config = toys.config(**choice, best_of_n_samples=2, flow_steps=2, critic=critic)
    policy = FeatureFlow(MLPFlowConfig(4, 2, 3, (8,)), nnx.Rngs(params=toys.key(0)))
    agent = toys.agent(config, policy=policy)
    one_hot = LossWeights(**{term: jnp.eye(len(TERMS))[i] for i, term in enumerate(TERMS)})

    def gradients(weights):
        return agent_module._gradients(agent, toys.batch(), toys.key(0), weights)[0]

    grads = toys.jit(jax.vmap(gradients))(one_hot)
    assert grads.keys() == agent.params.keys()
    for group, tree in grads.items():
        for name, values in flat(tree).items():
            assert np.isfinite(values).all()
            for term, moved, value in zip(TERMS, TABLE[case], values, strict=True):
                # a distilled teacher's prefix is shared, so its own parameters are the policy's alone
                assert (np.abs(value).max() > 0) == (group in moved), f"{term}: {group}/{name}"


def test_the_td_loss_does_not_reach_v_and_its_regression_reaches_nothing_else(toys, flat):
    """V's gradient is that of its own loss alone; without that loss, the critics' gradient is the same."""
    policy = FeatureFlow(MLPFlowConfig(4, 2, 3, (8,)), nnx.Rngs(params=toys.key(0)))
    agent, batch = toys.agent(toys.config(**IMPLICIT), policy=policy), toys.batch()
    draws = Draws.of_update(toys.key(0), agent.config, (6, *agent.nets.action_shape))
    prefix, next_prefix = (
        agent.nets.modules(agent.params, agent.frozen).policy.encode(seen)
        for seen in (batch.observations, batch.next_observations)
    )

    def parts(params):
        """The TD loss and V's, each by itself."""
        modules = agent.nets.modules(agent.params | params, agent.frozen)
        next_value, value_loss, _ = implicit.next_value_and_loss(
            modules.value, agent, batch, draws, prefix, next_prefix
        )
        return td.loss_and_values(modules, agent, batch, draws, prefix, next_value)[0], value_loss

    by_td, by_v = toys.jit(jax.jacrev(parts))({group: agent.params[group] for group in ("critic", "value")})
    assert not any(values.any() for values in flat((by_td["value"], by_v["critic"])).values())
    assert all(values.any() for values in flat((by_td["critic"], by_v["value"])).values())


def test_aggregation_weights_learn_and_members_are_held_by_their_term(agents, toys, flat):
    """The weights follow the aggregate's TD error; the members' gradient is the one they have without it."""

    def gradient(agent):
        only = LossWeights(critic_weight=1.0, actor_weight=0.0, bc_weight=0.0, alpha_weight=0.0)
        return agent_module._gradients(agent, batch, toys.key(0), only)[0]["critic"]

    agent, batch = agents["weighted"], toys.batch()
    unweighted = dataclasses.replace(agent.config.critic, q_aggregation="mean")  # as equal logits weigh, without a term
    config = dataclasses.replace(agent.config, critic=unweighted)
    plain = dataclasses.replace(agent, nets=dataclasses.replace(agent.nets, config=config))
    grads, expected = (flat(toys.jit(gradient)(each)) for each in (agent, plain))
    logits = grads.pop("aggregation_logits")
    assert np.abs(logits).min() > 0
    assert not expected.pop("aggregation_logits").any()
    assert grads.keys() == expected.keys()
    for name in grads:
        np.testing.assert_allclose(grads[name], expected[name], atol=1e-6, err_msg=name)


def test_target_moves_after_the_critic(agents, toys):
    """Polyak's average is of the critic after its step; nothing else moves the target."""
    before = agents["min"]
    after, _ = toys.update(before, toys.batch(), toys.key(0), WEIGHTS)
    expected = jax.tree.map(lambda new, slow: 0.1 * new + 0.9 * slow, after.params["critic"], before.target_critic)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.target_critic, expected)
    assert after.step == before.step + 1


# -- section 6: cost ---------------------------------------------------------------------------------------------------


class ProbedFlow(MLPFlow):
    """Notes each ``encode`` that is traced and each backward pass into one; names its velocity for ``evaluations``."""

    trace: list[str]

    def encode(self, observation):
        ProbedFlow.trace.append("encode")
        prefix = super().encode(observation)
        return prefix.replace(cache=_probe(prefix.cache))

    def velocity(self, prefix, x_t, time):
        @jax.jit
        def velocity_evaluation(x_t, time):
            return super(ProbedFlow, self).velocity(prefix, x_t, time)

        return velocity_evaluation(x_t, time)


@jax.custom_vjp
def _probe(x):
    return x


def _probe_backward(_, cotangent):
    ProbedFlow.trace.append("backward")
    return (cotangent,)


_probe.defvjp(lambda x: (x, None), _probe_backward)


def evaluations(jaxpr) -> int:
    """Velocities of single chunks that a program computes for one observation: loops and candidates multiplied."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.params.get("name") == "velocity_evaluation":
            total += equation.outvars[0].aval.shape[0]
            continue
        inner = [x for x in equation.params.values() if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]
        times = equation.params.get("length", 1)
        total += sum(times * evaluations(getattr(each, "jaxpr", each)) for each in inner)
    return total


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("best_of_n", 5 * 2 + 1),  # N * K for the target, one for imitation
        ("q_gradient", 5 * 2 + 1 + 2 * 3),  # and K for each of the actor's two samples
        ("distill", 5 * 1 + 1 + 3 + 1),  # N jumps for the target; a flow and a jump for the student
    ],
)
@pytest.mark.parametrize("strategy", ["parallel", "chunked", "sequential"])
def test_cost_of_an_update(name, expected, strategy, toys):
    """Two prefix passes, one of them backward, and the velocities of section 6: N = 5, K = 3, 2 in the target."""
    config = toys.config(
        extraction=name, best_of_n_samples=5, target_flow_steps=2, best_of_n_strategy=strategy, best_of_n_block=2
    )
    agent, batch = toys.agent(config, policy=toys.policy(kind=ProbedFlow)), toys.batch()
    ProbedFlow.trace = []
    draws = Draws.of_update(toys.key(0), config, (6, *agent.nets.action_shape))
    jaxpr = jax.make_jaxpr(acrlpd.joint_loss)(agent.params, agent, batch, draws, WEIGHTS).jaxpr
    assert ProbedFlow.trace == ["encode", "encode"]
    assert evaluations(jaxpr) == expected

    ProbedFlow.trace = []
    jax.make_jaxpr(agent_module._gradients)(agent, batch, toys.key(0), WEIGHTS)
    assert ProbedFlow.trace == ["encode", "encode", "backward"]


@pytest.mark.parametrize(
    ("extraction", "expected"), [("best_of_n", 1), ("q_gradient", 1 + 2 * 3), ("distill", 1 + 3 + 1)]
)
def test_an_implicit_target_samples_nothing(extraction, expected, toys):
    """What is left is imitation, and the actor's own samples at s. Of s' nothing is read but state and features: those
    may be stored, and then nothing encodes it."""
    config = toys.config(**IMPLICIT, extraction=extraction, best_of_n_samples=5, target_flow_steps=2)
    agent, batch = toys.agent(config, policy=toys.policy(kind=ProbedFlow)), toys.batch()
    ProbedFlow.trace = []
    gradients = jax.make_jaxpr(agent_module._gradients)
    gradients(agent, batch, toys.key(0), WEIGHTS)
    assert ProbedFlow.trace == ["encode", "encode", "backward"]
    stored = batch.next_observations.replace(prefix=(jnp.zeros((6, 0)), None, None))
    ProbedFlow.trace = []
    gradients(agent, batch.replace(next_observations=stored), toys.key(0), WEIGHTS)
    assert ProbedFlow.trace == ["encode", "backward"]

    draws = Draws.of_update(toys.key(0), config, (6, *agent.nets.action_shape))
    assert draws.candidates.size == 0
    jaxpr = jax.make_jaxpr(acrlpd.joint_loss)(agent.params, agent, batch, draws, WEIGHTS).jaxpr
    assert evaluations(jaxpr) == expected


# -- frozen parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best_of_n", "q_gradient", "distill"])
def test_nothing_runs_back_into_a_frozen_prefix(name, toys):
    agent = toys.agent(
        toys.config(extraction=name), policy=toys.policy(kind=ProbedFlow), trainable=MLPFlow.is_suffix_param
    )
    ProbedFlow.trace = []
    jax.make_jaxpr(agent_module._gradients)(agent, toys.batch(), toys.key(0), WEIGHTS)
    assert ProbedFlow.trace == ["encode", "encode"]


def test_frozen_parameters_stay_and_have_no_optimizer_state(toys, flat):
    """One frozen layer in the prefix and one in the suffix; the student shares what is frozen."""

    def trainable(path):
        return not path.startswith(("state_in/", "out/"))

    agent = toys.agent(toys.config(extraction="distill"), trainable=trainable)
    frozen = {"state_in/kernel", "state_in/bias", "out/kernel", "out/bias"}
    assert flat(agent.frozen).keys() == frozen
    for group in ("policy", "student"):
        assert flat(agent.params[group]).keys() == {"chunk_time_in/kernel", "chunk_time_in/bias"}
        assert len(jax.tree.leaves(agent.opt_state[group])) == 1 + 2 * 2  # a count and two moments each
    after, _ = toys.update(agent, toys.batch(), toys.key(0), WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, flat(after.frozen), flat(agent.frozen))
    for group in ("policy", "student"):
        changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), flat(after.params[group]), flat(agent.params[group]))
        assert min(changed.values()) > 0


def test_a_fixed_temperature_stays(toys):
    """Weight decay would pull log alpha to zero."""
    config = toys.config(temperature=TemperatureConfig(initial_temp=0.5, adaptive=False))
    agent = toys.agent(config, optimizer=optax.adamw(1e-2, weight_decay=0.1))
    assert jax.tree.leaves(agent.opt_state["temperature"]) == []
    after, metrics = toys.update(agent, toys.batch(), toys.key(0), WEIGHTS)
    assert after.temperature == agent.temperature
    assert metrics["alpha_loss"] == 0


# -- learning ----------------------------------------------------------------------------------------------------------


def test_overfits_one_batch_with_one_compilation(toys):
    """Both losses fall far on one batch; other batches, weights and steps do not compile again; buffers are reused."""
    config = toys.config(
        critic={"hidden_dims": (64,), "num_critics": 2}, target_update_tau=1e-6, best_of_n_samples=2, discount=0.3
    )
    policy = MLPFlowConfig(4, 2, 3, (128, 128)).create(nnx.Rngs(0))
    agent = toys.agent(config, policy=policy, optimizer=optax.adam(3e-3))
    compiled = agent_module._update._cache_size()
    history = []
    for step in range(300):
        consumed = agent
        agent, metrics = agent.update(toys.batch("whole"), toys.key(step))
        history.append((metrics["bc_loss"], metrics["td_error_mean"]))
    bc, td = np.array(history).T
    assert bc[-50:].mean() < 0.2 * bc[:5].mean()
    assert td[-50:].mean() < 0.2 * td[:5].mean()

    agent, _ = agent.update(toys.batch("padded", seed=1), toys.key(0), LossWeights(0.1, 0.2, 0.3, 0.4))
    assert agent.step == 301
    assert agent_module._update._cache_size() == compiled + 1
    if jax.default_backend() in ("cpu", "gpu", "tpu"):
        assert all(x.is_deleted() for x in jax.tree.leaves((consumed.params, consumed.opt_state)))


# -- acting ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def actor(agents):
    agent = agents["min"]
    return lambda rng, temperature=None, **options: (
        agent if temperature is None else with_temperature(agent, temperature)
    ).sample_actions(Observation(state=jnp.ones((6, 4)) * jnp.arange(6.0)[:, None]), rng, **options)


def with_temperature(agent, temperature):
    log_temperature = jnp.log(jnp.float32(temperature))
    return dataclasses.replace(agent, params=agent.params | {"temperature": {"log_temperature": log_temperature}})


def test_greedy_is_the_best_of_n(agents, actor, toys):
    """The choice of a search in NumPy, among the candidates of the same noise."""
    agent, rng = agents["min"], toys.key(3)
    state = np.ones((6, 4)) * np.arange(6.0)[:, None]
    modules = agent.nets.modules(agent.params, agent.frozen)
    prefix = modules.policy.encode(Observation(state=jnp.asarray(state, jnp.float32)))
    noise = jax.random.normal(jax.random.split(rng)[0], (4, 6, 3, 2))
    candidates = np.asarray(flow.sample(modules.policy, prefix, noise, num_steps=3))
    q = np.asarray(modules.critic(prefix.features, prefix.state, jnp.asarray(candidates)))  # [e n b]
    best = [max(range(4), key=lambda n: min(q[e, n, b] for e in range(3))) for b in range(6)]
    assert len(set(best)) > 1
    np.testing.assert_allclose(actor(rng), candidates[best, np.arange(6)], atol=1e-5)


def test_one_candidate_is_plain_sampling(actor, toys):
    np.testing.assert_allclose(actor(toys.key(0), num_samples=1), actor(toys.key(0), mode="bc"), atol=1e-6)


def test_explore(actor, toys):
    """Two keys differ; cold exploration is greedy."""
    first, second = actor(toys.key(0), mode="explore"), actor(toys.key(1), mode="explore")
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(actor(toys.key(0), temperature=1e-9, mode="explore"), actor(toys.key(0)))


@pytest.mark.parametrize("by_target", [True, False])
def test_which_critics_choose_while_acting(by_target, toys):
    """The moving averages, unless asked for the newest; an agent that only acts keeps those and no others."""
    agent = toys.agent(toys.config(act_by_target_critic=by_target))
    critics = {True: agent.target_critic, False: agent.params["critic"]}
    plain = toys.agent(toys.config(act_by_target_critic=False))
    expected, other = (
        dataclasses.replace(plain, params=agent.params | {"critic": critics[which]})
        for which in (by_target, not by_target)
    )
    act = toys.jit(
        lambda agent: agent_module.choose_chunks.__wrapped__(agent, Observation(state=jnp.ones((5, 4))), toys.key(2))
    )
    (chunks, values), (also, their_values) = act(agent), act(expected)
    np.testing.assert_array_equal(chunks, also)
    np.testing.assert_array_equal(values["q"], their_values["q"])
    assert np.abs(act(other)[1]["q"] - values["q"]).max() > 1e-3
    assert agent.acting_only().target_critic == {}
    np.testing.assert_array_equal(act(agent.acting_only())[0], chunks)


@pytest.mark.parametrize("mode", ["greedy", "explore", "bc"])
def test_with_a_key_each_observations_draw_what_they_draw_alone(mode, agents):
    agent, state = agents["min"], jnp.ones((6, 4)) * jnp.arange(6.0)[:, None]
    keys = jax.random.split(jax.random.key(4), 6)  # threefry: the bits of others depend on what is beside them
    together = agent_module.choose_chunks(agent, Observation(state=state), keys, mode=mode)[0]
    for row in range(6):
        alone = agent.sample_actions(Observation(state=state[row : row + 1]), keys[row], mode=mode)
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)


def test_exploration_does_not_reward_spread_in_the_padding(toys):
    """Candidates that differ in a padded dimension alone have the same bonus: Q decides."""
    agent = toys.agent(toys.config(diversity_bonus=1e4), policy=toys.policy(3), action_dim=2)
    agent = with_temperature(agent, 1e-3)
    still = jax.tree.map(jnp.zeros_like, agent.params["policy"])  # no velocity: a chunk is its noise
    agent = dataclasses.replace(agent, params=agent.params | {"policy": still})
    noise = jax.random.normal(jax.random.split(toys.key(0))[0], (4, 6, 3, 3))
    chunk = agent.sample_actions(Observation(state=jnp.zeros((6, 4))), toys.key(0), mode="explore")
    widest = sampling.mean_distance(noise[..., :2]).argmax(axis=0)
    np.testing.assert_array_equal(chunk, sampling.take(noise, widest))
    assert (widest != sampling.mean_distance(noise).argmax(axis=0)).any()


@pytest.mark.parametrize("mode", ["greedy", "explore"])
def test_the_critic_chooses_among_typical_candidates(toys, mode):
    """A fourth of four candidates is one: the nearest to their mean, whatever the critic says. In targets all count."""
    agent = with_temperature(toys.agent(toys.config(typical_share=0.25), policy=toys.policy(3), action_dim=2), 1e-3)
    still = jax.tree.map(jnp.zeros_like, agent.params["policy"])  # no velocity: a chunk is its noise
    agent = dataclasses.replace(agent, params=agent.params | {"policy": still})
    noise = jax.random.normal(jax.random.split(toys.key(0))[0], (4, 6, 3, 3))
    chunk = agent.sample_actions(Observation(state=jnp.zeros((6, 4))), toys.key(0), mode=mode)
    judged = np.asarray(noise[..., :2])
    nearest = np.linalg.norm((judged - judged.mean(axis=0)).reshape(4, 6, -1), axis=2).argmin(axis=0)
    np.testing.assert_array_equal(chunk, sampling.take(noise, jnp.asarray(nearest)))
    assert agent.config.in_target.typical_share == 1.0


def test_bc_is_the_flow_and_ignores_the_critic(agents, actor, toys):
    agent, rng = agents["min"], toys.key(2)
    modules = agent.nets.modules(agent.params, agent.frozen)
    observations = Observation(state=jnp.ones((6, 4)) * jnp.arange(6.0)[:, None])
    noise = jax.random.normal(jax.random.split(rng)[0], (1, 6, 3, 2))
    expected = flow.sample(modules.policy, modules.policy.encode(observations), noise, num_steps=3)[0]
    np.testing.assert_allclose(actor(rng, mode="bc"), expected, atol=1e-5)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), agent.params["critic"])
    blind = dataclasses.replace(agent, params=agent.params | {"critic": nan})
    np.testing.assert_array_equal(blind.sample_actions(observations, rng, mode="bc"), actor(rng, mode="bc"))


@pytest.mark.parametrize(("strategy", "block"), [("chunked", 3), ("chunked", 4), ("sequential", 8)])
def test_strategies_choose_alike(strategy, block, agents, toys):
    """Blocks of 3, 3 and 1, of 4 and 3, and single ones, against all seven at once."""
    agent = agents["min"]
    config = dataclasses.replace(agent.config, best_of_n_strategy=strategy, best_of_n_block=block)

    def proposed(config):
        modules = agent.nets.modules(agent.params, agent.frozen)
        prefix = modules.policy.encode(toys.batch().observations)
        noise = jax.random.normal(toys.key(5), (7, 6, 3, 2))
        return candidates.propose(modules, config, prefix, noise, 3)

    chunks, scores = toys.jit(lambda: proposed(agent.config))()
    in_blocks, block_scores = toys.jit(lambda: proposed(config))()
    np.testing.assert_allclose(in_blocks, chunks, atol=1e-6)
    np.testing.assert_allclose(block_scores, scores, atol=1e-5)
    expected, actual = sampling.select(chunks, scores)[1], sampling.select(in_blocks, block_scores)[1]
    np.testing.assert_array_equal(actual, expected)


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extraction": "best"}, "extraction must be one of"),
        ({"discount": 1.5}, "discount"),
        ({"target_update_tau": 0.0}, "target_update_tau"),
        ({"target_samples": 0}, "target_samples must be a whole number of at least 1"),
        ({"target_flow_steps": 0}, "target_flow_steps must be a whole number of at least 1"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1"),
        ({"target_samples": 1}, "raise agent.target_samples"),
        ({"target": "implicits"}, "target must be 'best_of_n' or 'implicit'"),
        ({"target": "implicit"}, "draws none: set agent.temperature.adaptive to False"),
        ({**IMPLICIT, "algorithm": "rlpd_ac"}, "does not go with agent.algorithm='rlpd_ac': its target is a sample"),
        ({**IMPLICIT, "algorithm": "bc"}, "does not go with agent.algorithm='bc': it trains no critics"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        AgentConfig(**changes)


@pytest.mark.parametrize("changes", [{"level": 0.0}, {"level": 1.0}, {"statistic": "mean"}])
def test_an_implicit_target_refuses(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must"):
        ImplicitConfig(**changes)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="initial_temp must be a number above 0, got 0"):
        TemperatureConfig(initial_temp=0.0)


def test_target_entropy_counts_the_robots_dimensions(toys):
    agent = toys.agent(policy=toys.policy(3), action_dim=2)
    assert agent.nets.target_entropy == -0.5 * 3 * 2


# -- pi0 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best_of_n", "q_gradient", "distill"])
def test_pi0_with_a_frozen_backbone(name, toys, flat):
    """Only the action expert and the projections move; features of the prefix reach the critic."""
    config = Pi0Config(
        action_dim=3,
        state_dim=4,
        action_horizon=3,
        max_token_len=4,
        paligemma_variant="nano",
        action_expert_variant="nano_expert",
        vision_variant="nano",
        vocab_size=16,
        image_size=16,
        cameras=("base_0_rgb",),
        dtype="float32",
        remat=False,
    )
    agent = toys.agent(
        toys.config(extraction=name, best_of_n_samples=2, flow_steps=2),
        policy=config.create(nnx.Rngs(0)),
        action_dim=2,
        trainable=Pi0.is_suffix_param,
    )
    assert not any(Pi0.is_suffix_param(path) for path in flat(agent.frozen))
    assert all(Pi0.is_suffix_param(path) for path in flat(agent.params["policy"]))
    batch = toys.batch(action_dim=3)
    seen = {
        "images": {"base_0_rgb": jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)), jnp.uint8)},
        "tokenized_prompt": jnp.tile(jnp.array([[1, 5, 7, 0]]), (6, 1)),
        "tokenized_prompt_mask": jnp.tile(jnp.array([[True, True, True, False]]), (6, 1)),
    }
    batch = batch.replace(
        observations=batch.observations.replace(**seen), next_observations=batch.next_observations.replace(**seen)
    )
    after, metrics = toys.update(agent, batch, toys.key(0), WEIGHTS)
    assert all(np.isfinite(value) for value in metrics.values())
    jax.tree.map(np.testing.assert_array_equal, flat(after.frozen), flat(agent.frozen))
    for group in agent.params:
        changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), flat(after.params[group]), flat(agent.params[group]))
        assert max(changes.values()) > 0
        still = {path for path, change in changes.items() if change == 0}
        assert not still, f"{group}: no gradient reached {still}"


@pytest.mark.parametrize("name", ["best_of_n", "distill"])
@pytest.mark.parametrize("unroll", [False, True])
def test_what_only_acts_acts_the_same(name, unroll, toys):
    """Of a policy in part frozen, by its moving average."""
    config = toys.config(extraction=name, policy_ema_decay=0.5)
    sizes = {"paligemma_variant": "nano", "action_expert_variant": "nano_expert", "vocab_size": 7, "cameras": ()}
    make = Pi0Config(
        action_dim=3, action_horizon=4, max_token_len=2, dtype="float32", remat=False, unroll=unroll, **sizes
    ).create
    agent = toys.agent(config, policy=make(nnx.Rngs(params=toys.key(0))), trainable=is_suffix_param, state_dim=3)
    observation = Observation(
        state=jnp.ones((2, 3)),
        tokenized_prompt=jnp.array([[1, 2], [3, 4]]),
        tokenized_prompt_mask=jnp.ones((2, 2), bool),
    )
    act = toys.jit(lambda agent: agent_module.choose_chunks.__wrapped__(agent, observation, toys.key(1)))
    before, after = act(agent), act(agent.acting_only())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), before, after)
    moved = dataclasses.replace(agent, ema=jax.tree.map(jnp.zeros_like, agent.ema))
    assert np.abs(act(moved.acting_only())[0] - after[0]).max() > 1e-3
    assert ("attn" in agent.acting_only().params["policy"]["PaliGemma"]["llm"]["layers"]) != unroll
