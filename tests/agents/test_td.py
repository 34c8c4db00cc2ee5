"""The TD target over the critic's horizon, from episodes to values, against NumPy and against QGF's own code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from acrlpd.agents import agent as agent_module
from acrlpd.agents import candidates, losses, sampling, td
from acrlpd.agents.config import TemperatureConfig
from acrlpd.agents.losses import LossWeights
from acrlpd.data import chunks
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.types import ChunkBatch, Episode, FinalObservation, Observation

HORIZON = 3  # of the toy policy
EPISODES = {  # number of steps, terminals, and whether the state after the last action is known
    "time limit": (6, [], False),
    "time limit with a final observation": (6, [], True),
    "success": (6, [5], False),
    "play data that runs through a goal": (6, [2], True),
    "shorter than the horizon": (1, [], True),
    "success at once": (1, [0], False),
}


def make_episode(length, terminals, has_final, rng) -> Episode:
    return Episode(
        state=rng.normal(size=(length, 4)).astype(np.float32),
        actions=rng.uniform(-1, 1, (length, 2)).astype(np.float32),
        rewards=rng.normal(size=length).astype(np.float32),
        terminals=np.isin(np.arange(length), terminals),
        task="go",
        final=FinalObservation(rng.normal(size=4).astype(np.float32)) if has_final else None,
    )


@pytest.mark.parametrize("judged", [1, 2, 3])
def test_targets_of_whole_episodes(judged, toys, flat):
    """Every start of every kind of episode; where the data does not say what follows, there is no target."""
    rng = np.random.default_rng(0)
    episodes = [make_episode(*kind, rng) for kind in EPISODES.values()]
    store = EpisodeStore.from_episodes(episodes)
    raw = chunks.gather(store, np.arange(store.num_rows), HORIZON, backup_horizon=judged)
    names = ("actions", "rewards", "terminals", "valid", "bootstrap_mask", "sequence_mask", "episode_id", "step_id")
    batch = ChunkBatch(
        observations=Observation(state=jnp.asarray(raw["state"])),
        next_observations=Observation(state=jnp.asarray(raw["next_state"])),
        **{name: jnp.asarray(raw[name]) for name in names},
    )
    agent = toys.agent(toys.config(critic={"horizon": judged, "q_aggregation": "mean"}))
    next_chunk = jnp.asarray(rng.uniform(-1, 1, (store.num_rows, HORIZON, 2)), jnp.float32)
    prefix = toys.policy().encode(batch.next_observations)
    found = toys.jit(lambda: td.target_values(agent, batch, td.slow_value(agent, prefix, next_chunk, toys.key(0))))()

    slow = flat(agent.target_critic)
    for row in range(store.num_rows):
        episode = episodes[raw["episode_id"][row]]
        states = [*episode.state, *([episode.final.state] if episode.final else [])]

        def value(after, states=states, row=row):
            state, chunk = (np.float64(x)[None] for x in (states[after], next_chunk[row]))
            return reference.member_values(slow, state, chunk, (judged, 2)).mean()

        start = raw["step_id"][row]
        expected = reference.target_of_steps(
            episode.rewards, episode.terminals, episode.final is not None, start, judged, 0.9, value
        )
        assert (expected is not None) == batch.sequence_mask[row], (row, start)
        if expected is not None:
            np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)


def test_a_horizon_that_is_the_whole_chunk_changes_nothing(toys):
    """The programs are the same, so the numbers are, bit for bit."""
    agents = [toys.agent(toys.config(critic={"horizon": horizon})) for horizon in (None, HORIZON)]
    jax.tree.map(np.testing.assert_array_equal, *(agent.params for agent in agents))
    programs = [
        str(jax.make_jaxpr(agent_module._update.__wrapped__)(agent, toys.batch(), toys.key(0), LossWeights()))
        for agent in agents
    ]
    assert programs[0] == programs[1]
    with pytest.raises(ValueError, match=r"critic\.horizon \(4\) must lie between .* and policy\.action_horizon \(3\)"):
        toys.agent(toys.config(critic={"horizon": 4}))


@pytest.mark.parametrize(
    ("critic", "told"),
    [
        ({"horizon": 1, "backup_horizon": 4}, r"backup_horizon \(4\) must lie .* policy\.action_horizon \(3\)"),
        ({"backup_horizon": 3}, r"backup_horizon \(3\) must lie above the steps that critics judge \(3\)"),
        ({"horizon": 2, "backup_horizon": 2}, r"backup_horizon \(2\) must lie above .* \(2\)"),
    ],
)
def test_long_critics_judge_more_than_the_others_and_no_more_than_is_predicted(critic, told, toys):
    implicit = {"target": "implicit", "temperature": TemperatureConfig(adaptive=False)}
    with pytest.raises(ValueError, match=told):
        toys.agent(toys.config(**implicit, critic=critic))
    with pytest.raises(ValueError, match=r"backup_horizon .* needs agent\.target='implicit'"):
        toys.config(critic={"horizon": 1, "backup_horizon": 2})


def test_candidates_that_differ_later_are_equal(toys):
    """Neither their values nor their distances tell them apart, so the first is chosen; it is returned whole."""
    agent = toys.agent(toys.config(critic={"horizon": 1}, diversity_bonus=1.0))
    still = jax.tree.map(jnp.zeros_like, agent.params["policy"])  # no velocity: a chunk is its noise
    modules = agent.nets.modules(agent.params | {"policy": still}, agent.frozen)
    prefix = modules.policy.encode(toys.batch().observations)
    noise = jax.random.normal(toys.key(5), (4, 6, HORIZON, 2)).at[:, :, 0].set(0.5)
    chosen = toys.jit(lambda: candidates.choose(modules, agent.config, prefix, noise, 2))()
    np.testing.assert_allclose(np.ptp(chosen.scores, axis=0), np.zeros(6), atol=1e-6)
    np.testing.assert_array_equal(chosen.chunk, sampling.take(noise, chosen.index))
    np.testing.assert_array_equal(sampling.mean_distance(modules.critic.judged(chosen.candidates)), np.zeros((4, 6)))
    assert agent.nets.target_entropy == -0.5 * 1 * 2


@pytest.fixture(scope="session")
def qgf(shared):
    """Numbers that QGF's own code computed."""
    file = shared / "golden-improvement" / "qgf.npz"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with np.load(file) as arrays:
        return dict(arrays)


def test_critic_loss_of_qgf(qgf):
    """Their target is the one of section 2 with V(s') as the value after the chunk, of which every step is real."""
    target = losses.td_target(
        rewards=jnp.asarray(qgf["rewards"]),
        valid=jnp.ones(qgf["rewards"].shape),
        bootstrap_mask=jnp.asarray(qgf["bootstrap_mask"], jnp.float32),
        next_q=jnp.asarray(qgf["next_v"]),
        discount=float(qgf["discount"]),
    )
    mask = jnp.asarray(qgf["sequence_mask"], jnp.float32)
    assert 0 < mask.sum() < len(mask)
    loss = losses.critic_loss(jnp.asarray(qgf["q"]), target, mask)
    np.testing.assert_allclose(loss, qgf["critic_loss"], rtol=1e-5, atol=1e-5)
