import numpy as np
import pytest

from acrlpd.envs.collect import collect
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.experts import RandomPolicy, SmoothNoise, make_expert
from acrlpd.envs.registry import make


def noise_of(strength, steps=20_000):
    noise = SmoothNoise(np.random.default_rng(0), 2, (strength, strength))
    return np.stack([noise() for _ in range(steps)])


def test_smooth_noise_has_its_strength_and_drifts():
    values = noise_of(0.5)
    np.testing.assert_allclose(values.std(axis=0), 0.5, rtol=0.1)
    one_step, ten_steps = (np.corrcoef(values[:-lag, 0], values[lag:, 0])[0, 1] for lag in (1, 10))
    np.testing.assert_allclose([one_step, ten_steps], [0.9, 0.9**10], atol=0.05)


def test_no_strength_no_noise():
    assert not noise_of(0.0, steps=10).any()


def test_strength_is_drawn_per_episode():
    rng = np.random.default_rng(0)
    strengths = [SmoothNoise(rng, 2, (0.2, 0.6)).strength for _ in range(200)]
    assert 0.2 <= min(strengths) < 0.25
    assert 0.55 < max(strengths) <= 0.6


@pytest.mark.parametrize("noise_range", [(-0.1, 1.0), (0.5, 0.2)])
def test_a_wrong_range_is_refused(noise_range):
    with pytest.raises(ValueError, match="noise_range"):
        SmoothNoise(np.random.default_rng(0), 2, noise_range)


def test_random_actions_fill_the_action_space(make_counting):
    environment = make_counting()
    policy = RandomPolicy(environment.spec, np.random.default_rng(0))
    actions = np.stack([policy(environment.reset(0)) for _ in range(500)])
    assert actions.dtype == np.float32
    assert (actions.min(axis=0) < -0.97).all()
    assert (actions.max(axis=0) > 0.97).all()


def test_no_expert_is_an_error_that_names_the_way_out(make_counting):
    with pytest.raises(ValueError, match=r"no scripted expert for counting: .*--policy random.*--data.path"):
        make_expert(make_counting(), "expert", np.random.default_rng(0))
    with pytest.raises(ValueError, match="must be 'expert' or 'random'"):
        make_expert(make_counting(), "scripted", np.random.default_rng(0))


def success_without_noise(config, episodes):
    results = []
    collect(config, range(episodes), noise_range=(0.0, 0.0), on_episode=results.append)
    return np.mean([result.success for result in results])


@pytest.mark.parametrize("task", ["drawer-open-v3", "pick-place-v3"])
def test_metaworld_experts_succeed_without_noise(task):
    pytest.importorskip("metaworld")
    assert success_without_noise(EnvConfig(f"metaworld/{task}", max_episode_steps=150), episodes=5) >= 0.8


def test_the_cube_expert_succeeds_without_noise():
    pytest.importorskip("ogbench")
    config = EnvConfig("ogbench/cube-single-play-singletask-task1-v0")
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert success_without_noise(config, episodes=3) == 1
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_a_scene_has_no_expert():
    pytest.importorskip("ogbench")
    environment = make(EnvConfig("ogbench/scene-play-singletask-v0"))
    environment.reset(0)
    with pytest.raises(ValueError, match="no scripted expert for ogbench/scene"):
        make_expert(environment, "expert", np.random.default_rng(0))
