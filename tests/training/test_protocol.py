"""The full evaluation, with an untrained agent in an environment where luck decides."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import acrlpd
from acrlpd.agents.config import AgentConfig
from acrlpd.config import PolicyConfig, TrainConfig
from acrlpd.data.statistics import bounds_stats
from acrlpd.data.view.transforms import Compose, PadToModel
from acrlpd.envs.env import EnvConfig, Outcome, SimulatedEnvironment
from acrlpd.envs.vector import LocalVectorEnv
from acrlpd.models.critic import CriticConfig
from acrlpd.training import setup
from acrlpd.training.evaluate import (
    EpisodeDraws,
    ObservationNoise,
    chunk_policy,
    evaluate,
    with_observation_noise,
)
from acrlpd.training.protocol import ProtocolConfig


class Drift:
    """Solved once the first action numbers, of which few are large, add up to the threshold of the episode."""

    state_dim = 4
    action_low = -np.ones(2, np.float32)
    action_high = np.ones(2, np.float32)
    instruction = "push the button"
    time_limit = 12
    fps = 10.0
    cameras = ()
    default_camera = "front"

    def reset(self, seed):
        self.state = np.random.default_rng(seed).normal(size=4)
        self.threshold, self.sum = 1.0 + seed % 3, 0.0
        return self.state.copy()

    def step(self, action):
        self.sum += abs(float(action[0]))
        self.state = 0.9 * self.state + 0.1 * action[[0, 1, 0, 1]]
        return self.state.copy(), Outcome.solved_if(self.sum >= self.threshold)

    def render(self, camera, size):
        return np.zeros((size, size, 3), np.uint8)

    def close(self):
        pass


CONFIG = TrainConfig(
    policy=PolicyConfig(kind="mlp_flow", action_horizon=3, hidden_dims=(16,)),
    agent=AgentConfig(critic=CriticConfig(num_critics=2, hidden_dims=(16,)), best_of_n_samples=3, flow_steps=2),
    env=EnvConfig("drift"),
)


@pytest.fixture(scope="module")
def agent():
    return setup.make_agent(CONFIG, setup.Dims(state=4, action=2), ())


@pytest.fixture(scope="module")
def transform():
    stats = {"state": bounds_stats(-np.ones(4), np.ones(4)), "actions": bounds_stats(-np.ones(2), np.ones(2))}
    return setup.make_transform(CONFIG, stats, setup.Dims(state=4, action=2))


@pytest.fixture(scope="module")
def protocol(transform):
    return acrlpd.ACRLPDEvaluationProtocol(
        ProtocolConfig(observation_noise=(0.5,), action_noise=(0.5,), best_of_n=(1, 3)),
        LocalVectorEnv([SimulatedEnvironment(Drift(), EnvConfig("drift")) for _ in range(4)]),
        transform,
        range(100, 110),
        execute_horizon=2,
    )


@pytest.fixture(scope="module")
def findings(protocol, agent):
    return protocol.run(agent)


def test_every_trial_meets_every_seed(findings):
    trials = [
        findings.task,
        *findings.observation_noise.values(),
        *findings.action_noise.values(),
        *findings.best_of_n.values(),
    ]
    assert len(trials) == 5
    for trial in trials:
        assert [each.seed for each in trial.rollouts] == list(range(100, 110))


def test_noise_changes_what_is_done_and_the_same_candidates_do_not(findings):
    def actions(trial):
        return np.concatenate([each.episode.actions for each in trial.rollouts])

    undisturbed = actions(findings.task)
    for trial in (findings.observation_noise[0.5], findings.action_noise[0.5], findings.best_of_n[1]):
        disturbed = actions(trial)
        assert disturbed.shape != undisturbed.shape or np.abs(disturbed - undisturbed).max() > 1e-3
    np.testing.assert_array_equal(actions(findings.best_of_n[3]), undisturbed)  # 3 is what the agent takes anyway


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "greedy"},
        {"mode": "explore"},
        {"mode": "bc"},
        {"mode": "greedy", "observation_noise": 0.3},
        {"mode": "greedy", "action_noise": 0.3},
    ],
    ids=str,
)
def test_an_episode_is_a_function_of_its_seed(agent, transform, options):
    """Whatever runs beside it, in whatever order, and whichever other seeds there are."""

    def run(num_envs, seeds):
        environments = LocalVectorEnv([SimulatedEnvironment(Drift(), EnvConfig("drift")) for _ in range(num_envs)])
        rollouts = evaluate(agent, transform, environments, seeds, rng=jax.random.key(3), execute_horizon=2, **options)[
            1
        ]
        return {each.seed: each.episode.actions for each in rollouts}

    alone = run(1, range(100, 110))
    assert len({actions.tobytes() for actions in alone.values()}) > 5
    for num_envs, seeds in ((3, range(100, 110)), (4, range(109, 99, -1)), (2, [104, 2**40 + 1, 107])):
        beside = run(num_envs, seeds)
        for seed in alone.keys() & beside.keys():
            np.testing.assert_allclose(beside[seed], alone[seed], atol=1e-5)


def test_policies_of_one_episode_share_its_draws(agent, transform):
    """As online, where an update may come between two chunks: the second is not the first once more."""
    draws, observation = EpisodeDraws(jax.random.key(0)), {"state": np.zeros(4), "image": {}, "prompt": "go"}
    first, second, other = (
        chunk_policy(agent, transform, draws, mode="bc")([observation], np.array([number]))[0] for number in (7, 7, 8)
    )
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - other).max() > 1e-3
    again = chunk_policy(agent, transform, jax.random.key(0), mode="bc")([observation] * 2, np.array([8, 7]))
    np.testing.assert_allclose(again, [other, first], atol=1e-6)  # a resumed run draws the same


def test_every_executed_chunk_has_its_q(findings):
    lengths = [each.length for each in findings.task.rollouts]
    assert findings.agreement.chunks == sum(-(-length // 2) for length in lengths)
    assert findings.agreement.choice_gain > 0  # the best of three lies above their mean
    assert sum(each.count for each in findings.agreement.bins) == findings.agreement.chunks


def test_metrics_have_the_designs_names_and_the_history_keeps_them(protocol, agent, findings):
    metrics = protocol.run_comprehensive_evaluation(agent, step=7)
    assert metrics == findings.metrics()  # the same seeds, the same noise, the same numbers
    assert protocol.evaluation_history == [(7, metrics)]
    assert {"robustness/obs_noise_0.5", "robustness/action_noise_0.5", "robustness/best_of_3"} <= metrics.keys()
    assert metrics["robustness/best_of_3"] == metrics["eval/episode_reward_mean"]


def test_findings_are_json(findings):
    found = json.loads(json.dumps(findings.to_dict(), allow_nan=False))
    assert found["best_of_n"]["3"]["against_task"]["difference"] == 0
    assert len(found["episodes"]) == 10


def test_weights_of_guidance_are_swept_as_n_is(transform, agent, monkeypatch):
    """Each for all candidates; of a guided agent alone."""
    environments = LocalVectorEnv([SimulatedEnvironment(Drift(), EnvConfig("drift"))])
    config = ProtocolConfig(guidance_weights=(0.0, 2.0))
    protocol = acrlpd.ACRLPDEvaluationProtocol(config, environments, transform, range(2), execute_horizon=2)
    monkeypatch.setattr(protocol, "_trial", lambda agent, *, mode: agent.config.weights_of_candidates(3))
    assert protocol.analyze_guidance(agent) == {}
    guided = dataclasses.replace(agent, q_scale=agent.q_scale + 1).with_extraction("guided")
    assert protocol.analyze_guidance(guided) == {0.0: (0.0, 0.0, 0.0), 2.0: (2.0, 2.0, 2.0)}
    with pytest.raises(ValueError, match=r"guidance_weights.* must be a number of at least 0"):
        ProtocolConfig(guidance_weights=(-1.0,))


def test_noise_comes_right_behind_the_normalization(transform):
    noisy = with_observation_noise(transform, 0.1, [np.random.default_rng(0)])
    kinds = [type(step).__name__ for step in noisy.transforms]
    assert kinds[kinds.index("Normalize") + 1] == "ObservationNoise"
    with pytest.raises(ValueError, match="Compose with a Normalize"):
        with_observation_noise(Compose([PadToModel(8)]), 0.1, [])


def test_observation_noise_has_its_deviation_on_states_and_pictures():
    noise = ObservationNoise(0.1, [np.random.default_rng(seed) for seed in range(2)])
    data = noise({"state": np.zeros((2, 1000)), "image": {"top": np.full((2, 64, 64, 3), 100, np.uint8)}})
    assert np.std(data["state"]) == pytest.approx(0.1, rel=0.05)
    assert data["image"]["top"].dtype == np.uint8
    assert np.std(data["image"]["top"]) == pytest.approx(12.75, rel=0.05)
