"""The full evaluation, with an untrained agent in an environment where luck decides."""

import json

import numpy as np
import pytest

import acrlpd
from acrlpd.agents.acrlpd import AgentConfig
from acrlpd.config import PolicyConfig, TrainConfig
from acrlpd.data.normalize import bounds_stats
from acrlpd.data.transforms import Compose, PadToModel
from acrlpd.envs.env import EnvConfig, Outcome, SimulatedEnvironment
from acrlpd.envs.vector import LocalVectorEnv
from acrlpd.models.critic import CriticConfig
from acrlpd.training import setup
from acrlpd.training.evaluate import ObservationNoise, with_observation_noise
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


def test_noise_comes_right_behind_the_normalization(transform):
    noisy = with_observation_noise(transform, 0.1, seed=0)
    kinds = [type(step).__name__ for step in noisy.transforms]
    assert kinds[kinds.index("Normalize") + 1] == "ObservationNoise"
    with pytest.raises(ValueError, match="Compose with a Normalize"):
        with_observation_noise(Compose([PadToModel(8)]), 0.1, seed=0)


def test_observation_noise_has_its_deviation_on_states_and_pictures():
    noise = ObservationNoise(0.1, np.random.default_rng(0))
    data = noise({"state": np.zeros((500, 4)), "image": {"top": np.full((2, 64, 64, 3), 100, np.uint8)}})
    assert np.std(data["state"]) == pytest.approx(0.1, rel=0.05)
    assert data["image"]["top"].dtype == np.uint8
    assert np.std(data["image"]["top"]) == pytest.approx(12.75, rel=0.05)
