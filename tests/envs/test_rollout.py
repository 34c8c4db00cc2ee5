import dataclasses
import multiprocessing
import os
import signal

import numpy as np
import pytest
from tests.envs.test_custom import CAR

from acrlpd.envs.collect import collect
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.episodes import replay
from acrlpd.envs.rollout import OnlineCollector, Seconds, episode_seed, rollout
from acrlpd.envs.vector import LocalVectorEnv


def local(*environments):
    return LocalVectorEnv(environments)


class Recorder:
    """A policy that adds 1 a step and keeps what it was asked."""

    def __init__(self, horizon=4, step=1.0):
        self.calls = []
        self._horizon, self._step = horizon, step

    def __call__(self, observations, numbers):
        self.calls.append(([observation["state"].tolist() for observation in observations], numbers.tolist()))
        return np.full((len(observations), self._horizon, 2), [self._step, 0])


def test_every_seed_runs_once_and_in_order(make_counting):
    environments = [make_counting() for _ in range(3)]
    seen = []
    results = rollout(local(*environments), Recorder(), range(100, 107), execute_horizon=2, on_episode=seen.append)
    assert [result.seed for result in results] == list(range(100, 107))
    assert [result.number for result in results] == list(range(7))
    assert sorted(result.number for result in seen) == list(range(7))
    assert sorted(seed for each in environments for seed in each.simulator.seeds) == list(range(100, 107))
    for result in results:
        assert (result.success, result.length, result.returns, result.error) == (True, 3, -2.0, None)
        assert result.episode.state.tolist() == [[result.seed, 0], [result.seed, 1], [result.seed, 2]]
        assert result.episode.actions.tolist() == [[1, 0]] * 3
        assert result.episode.rewards.tolist() == [-1, -1, 0]
        assert result.episode.terminals.tolist() == [False, False, True]
        assert (result.episode.task, result.episode.success) == ("count to three", True)


def test_the_policy_always_sees_one_row_an_environment(make_counting):
    act = Recorder()
    rollout(local(*(make_counting() for _ in range(4))), act, [7, 8], execute_horizon=2)
    assert [numbers for _, numbers in act.calls] == [[0, 1, -1, -1]] * 2
    assert act.calls[0][0] == [[7, 0], [8, 0], [7, 0], [7, 0]]  # padding repeats the first active row
    assert act.calls[1][0] == [[7, 2], [8, 2], [7, 2], [7, 2]]


def test_a_chunk_is_executed_whole_and_what_remains_at_a_reset_is_dropped(make_counting):
    act = Recorder(horizon=4)
    results = rollout(local(make_counting()), act, [5, 6], execute_horizon=4)
    # Three of the four actions reach the goal; the fourth is not carried into the next episode.
    assert [states for states, _ in act.calls] == [[[5, 0]], [[6, 0]]]
    assert [result.length for result in results] == [3, 3]


def test_only_the_execute_horizon_is_executed(make_counting):
    act = Recorder(horizon=4)
    rollout(local(make_counting()), act, [5], execute_horizon=1)
    assert [states for states, _ in act.calls] == [[[5, 0]], [[5, 1]], [[5, 2]]]


def test_stored_actions_are_the_executed_ones(make_counting):
    result = rollout(local(make_counting()), Recorder(step=9.0), [0], execute_horizon=2)[0]
    assert result.episode.actions.tolist() == [[1, 0]] * 3


def test_a_time_limit_is_no_terminal(make_counting):
    result = rollout(local(make_counting(max_episode_steps=5)), Recorder(step=0.0), [0], execute_horizon=4)[0]
    assert (result.length, result.success, result.returns) == (5, False, -5.0)
    assert not result.episode.terminals.any()
    assert result.episode.success is False


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("record_images", [True, False])
def test_what_was_seen_after_the_last_action_is_kept(make_counting, record_images, horizon):
    """Whether the task or the time ends the episode, and wherever in a chunk."""
    for step, states in ((1.0, 3), (0.5, 4)):
        environment = make_counting(max_episode_steps=4, cameras=("front",))
        act = Recorder(horizon=horizon, step=step)
        (result,) = rollout(local(environment), act, [8], execute_horizon=horizon, record_images=record_images)
        assert result.length == states
        assert result.episode.final.state.tolist() == [8, step * states]
        pictures = {"front": np.full((4, 4, 3), int(step * states)).tolist()} if record_images else {}
        assert {name: picture.tolist() for name, picture in result.episode.final.images.items()} == pictures


def test_no_seeds_no_policy_calls(make_counting):
    act = Recorder()
    assert rollout(local(make_counting()), act, [], execute_horizon=1) == []
    assert act.calls == []


@pytest.mark.parametrize(("broken", "stored"), [(-1.0, -1.0), (np.nan, 0.0)])
def test_a_physics_error_is_a_failed_episode(make_counting, broken, stored):
    def act(observations, numbers):
        return np.array([[[0.5, 0], [broken if row["state"][0] == 1 else 0.5, 0]] for row in observations])

    results = rollout(local(make_counting()), act, [0, 1, 2], execute_horizon=2)
    assert [result.success for result in results] == [True, False, True]
    lost = results[1]
    assert lost.error
    assert (lost.length, lost.returns) == (2, -2.0)
    assert lost.episode.actions.tolist() == [[0.5, 0], [stored, 0]]
    assert not lost.episode.terminals.any()
    assert lost.episode.success is False
    assert np.isfinite(lost.episode.state).all()
    assert lost.episode.final is None  # nothing was seen


def break_resets(environment, broken):
    """Resets with these seeds end in a state that is not finite."""
    reset = environment.simulator.reset
    environment.simulator.reset = lambda seed: reset(seed) * (np.nan if broken(seed) else 1)
    return environment


@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_reset_that_fails_costs_its_episode(make_counting, num_envs, caplog):
    environments = local(*(break_resets(make_counting(), lambda seed: seed in (3, 4, 8)) for _ in range(num_envs)))
    results = rollout(environments, Recorder(), range(9), execute_horizon=2)
    assert [result.seed for result in results] == [0, 1, 2, 5, 6, 7]
    assert caplog.text.count("its reset failed") == 3
    assert rollout(environments, Recorder(), [3, 4], execute_horizon=2) == []


def test_a_reset_that_fails_online_is_counted_and_another_episode_begun(make_counting):
    broken = {episode_seed(0, number) for number in (0, 3)}
    environment = break_resets(make_counting(), lambda seed: seed in broken)
    collector = OnlineCollector(local(environment), seed=0, execute_horizon=4)
    collected = [collector.collect(Recorder()) for _ in range(3)]
    assert [[each.number for each in one.rollouts] for one in collected] == [[1], [2], [4]]
    assert [one.num_lost for one in collected] == [1, 1, 0]  # the first before anything was asked of the policy


def test_an_environment_that_can_never_begin_ends_the_run(make_counting):
    environment = break_resets(make_counting(), lambda seed: True)
    with pytest.raises(RuntimeError, match=r"10 episodes in a row could not begin in an environment, .*finite"):
        OnlineCollector(local(make_counting(), environment), seed=0, execute_horizon=4)


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 4, 3), (2, 1, 2), (2, 2)])
def test_actions_of_the_wrong_shape_are_refused(make_counting, shape):
    with pytest.raises(ValueError, match=r"expected \(2, h, 2\) with h at least execute_horizon \(2\)"):
        rollout(local(make_counting(), make_counting()), lambda *_: np.zeros(shape), [0, 1], execute_horizon=2)


def test_pictures_at_replanning_steps_alone_unless_recorded(make_counting):
    lazy = make_counting(cameras=("front",))
    result = rollout(local(lazy), Recorder(), [0], execute_horizon=2)[0]
    assert lazy.simulator.renders == 2  # at the reset and at step 2
    assert result.episode.images == {}
    eager = make_counting(cameras=("front",))
    result = rollout(local(eager), Recorder(), [0], execute_horizon=2, record_images=True)[0]
    assert result.episode.images["front"].shape == (3, 4, 4, 3)
    assert result.episode.images["front"][:, 0, 0, 0].tolist() == [0, 1, 2]


def test_replay_films_the_same_steps(make_counting):
    environment = make_counting()
    result = rollout(local(environment), Recorder(), [0], execute_horizon=2)[0]
    frames = replay(environment, result, size=8)
    assert frames.shape == (4, 8, 8, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_seconds_are_counted(make_counting):
    seconds = Seconds()
    rollout(local(make_counting()), Recorder(), [0], execute_horizon=2, seconds=seconds)
    assert seconds.simulator > 0
    assert seconds.act > 0


def run_online(collector, num_episodes):
    results = []
    while len(results) < num_episodes:
        results += collector.collect(Recorder()).rollouts
    return results


def test_online_collection_runs_one_chunk_when_asked(make_counting):
    collector = OnlineCollector(local(make_counting(), make_counting()), seed=3, execute_horizon=2)
    act = Recorder()
    first, second, third = (collector.collect(act) for _ in range(3))
    assert (first.rollouts, first.num_steps) == ([], 4)
    assert second.num_steps == 2  # each reaches the goal with the first action of its chunk
    assert [(result.number, result.seed) for result in second.rollouts] == [
        (0, episode_seed(3, 0)),
        (1, episode_seed(3, 1)),
    ]
    assert (third.rollouts, third.num_steps) == ([], 4)  # a new episode starts at a chunk of its own
    assert [state[1] for state in act.calls[2][0]] == [0, 0]
    assert collector.seconds.simulator > 0


def test_online_collection_resumes_at_an_episode(make_counting):
    collector = OnlineCollector(local(make_counting()), seed=3, execute_horizon=2)
    straight = run_online(collector, 4)
    assert collector.next_episode == 4
    stopped = OnlineCollector(local(make_counting()), seed=3, execute_horizon=2)
    run_online(stopped, 2)
    stopped.collect(Recorder())  # episode 2 is under way when the run stops
    resumed = run_online(
        OnlineCollector(local(make_counting()), seed=3, execute_horizon=2, first_episode=stopped.next_episode),
        2,
    )
    assert [(result.number, result.seed) for result in resumed] == [
        (result.number, result.seed) for result in straight[2:]
    ]


def test_online_collection_goes_on_when_every_step_fails(make_counting):
    collector = OnlineCollector(local(make_counting()), seed=0, execute_horizon=2)
    outcome = collector.collect(lambda *_: np.full((1, 2, 2), np.nan))
    assert outcome.num_steps == 1
    assert [result.error is not None for result in outcome.rollouts] == [True]
    assert collector.next_episode == 1


def test_episode_seeds_differ():
    seeds = {episode_seed(seed, number) for seed in range(20) for number in range(50)}
    assert len(seeds) == 1000


DRAWER = EnvConfig("metaworld/drawer-open-v3", max_episode_steps=30)


def collected(numbers, **options):
    results = []
    collect(DRAWER, numbers, on_episode=results.append, **options)
    return results


def assert_same(first, second):
    for left, right in zip(first, second, strict=True):
        assert (left.number, left.seed, left.success) == (right.number, right.seed, right.success)
        np.testing.assert_array_equal(left.episode.state, right.episode.state)
        np.testing.assert_array_equal(left.episode.actions, right.episode.actions)


@pytest.mark.parametrize("policy", ["expert", "random"])
def test_an_episode_depends_on_seed_and_number_alone(policy):
    pytest.importorskip("metaworld")
    whole = collected([0, 1, 2], policy=policy, seed=5)
    assert_same(whole[2:], collected([2], policy=policy, seed=5))
    other = collected([0], policy=policy, seed=6)[0]
    assert (other.episode.actions[0] != whole[0].episode.actions[0]).any()
    assert np.abs(np.concatenate([result.episode.actions for result in whole])).max() <= 1


@pytest.mark.slow
def test_workers_make_the_same_episodes():
    pytest.importorskip("metaworld")
    assert_same(collected(range(5), seed=1), collected(range(5), seed=1, num_workers=2))


@pytest.mark.slow
def test_a_killed_collecting_process_leaves_what_is_finished():
    car = EnvConfig(CAR, max_episode_steps=5)
    kept = []

    def keep(result):
        kept.append(result.number)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="the same command makes those that are missing"):
        collect(car, range(50), policy="random", num_workers=2, on_episode=keep)
    assert 1 <= len(kept) < 50
    assert kept == list(range(len(kept)))


@pytest.mark.slow
def test_noise_mixes_success_and_failure():
    pytest.importorskip("metaworld")
    results = []
    collect(dataclasses.replace(DRAWER, max_episode_steps=150), range(40), on_episode=results.append)
    successes = [result.success for result in results]
    assert 0.2 < np.mean(successes) < 0.7
    for result in results:
        assert result.episode.terminals[-1] == result.success
        assert result.returns == (1 - result.length if result.success else -150)
