import numpy as np
import pytest

from acrlpd.data.formats.rewards import Labeller, RewardConfig


def f32(*values):
    return np.array(values, np.float32)


def label(config, length, *, threshold=None, **facts):
    return Labeller(config, threshold, True).label(length, **facts)


STORED = f32(0, 0, 0, 1, 1)  # the task is done at step 3, the recorder runs on


@pytest.mark.parametrize(
    ("config", "expected", "terminals"),
    [
        (RewardConfig("stored", "0/1"), [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]),
        (RewardConfig("stored", "-1/0"), [-1, -1, -1, 0, 0], [0, 0, 0, 1, 1]),
        (RewardConfig("sparse", "0/1"), [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]),
        (RewardConfig("sparse", "-1/0"), [-1, -1, -1, -1, 0], [0, 0, 0, 0, 1]),
        (None, [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]),
    ],
)
def test_a_success(config, expected, terminals):
    found, done = label(config, 5, success=True, stored=STORED, threshold=1.0, where="demo_0")
    assert (found.tolist(), done.tolist()) == (expected, [bool(flag) for flag in terminals])
    assert (found.dtype, done.dtype) == (np.float32, bool)


@pytest.mark.parametrize("source", ["stored", "sparse"])
@pytest.mark.parametrize(("terminal_on_failure", "last"), [(False, False), (True, True)])
def test_a_failure_costs_at_every_step_and_ends_the_task_only_on_request(source, terminal_on_failure, last):
    config = RewardConfig(source, terminal_on_failure=terminal_on_failure)
    found, done = label(config, 3, success=False, stored=f32(0, 0, 0), threshold=1.0, where="demo_0")
    assert (found.tolist(), done.tolist()) == ([-1, -1, -1], [False, False, last])


def test_terminal_on_failure_leaves_a_success_alone():
    config = RewardConfig(terminal_on_failure=True)
    _, done = label(config, 4, success=True, stored=f32(0, 1, 0, 0), threshold=1.0, where="demo_0")
    assert done.tolist() == [False, True, False, False]


@pytest.mark.parametrize("length", [1, 7])
def test_an_undiscounted_success_returns_its_length_minus_one(length):
    found, done = label(RewardConfig(), length, success=True, where="episode_0")
    assert found.sum() == -(length - 1)
    assert done.tolist() == [False] * (length - 1) + [True]


def test_unknown_success_is_an_error_only_when_rewards_are_asked_for():
    with pytest.raises(ValueError, match=r"episode_3\.hdf5: success: .*--data\.rewards\.success True if all"):
        label(RewardConfig(), 2, success=None, where="episode_3.hdf5")
    with pytest.raises(
        ValueError, match=r"episode_3\.hdf5: rewards: convention .as_stored. needs rewards .*found none"
    ):
        label(RewardConfig(convention="as_stored"), 2, success=True, where="episode_3.hdf5")
    found, done = label(None, 2, success=None, where="episode_3.hdf5")
    assert (found.tolist(), done.tolist()) == ([0, 0], [False, False])


def test_staged_rewards_need_the_users_word():
    staged = f32(0, 1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"episode_0: rewards: .* up to 4\. .*success_reward 4, .*as_stored"):
        label(RewardConfig(), 5, success=None, stored=staged, threshold=None, where="episode_0")
    config = RewardConfig(success_reward=4.0)
    threshold = Labeller.of(config, [staged]).threshold
    found, done = label(config, 5, success=True, stored=staged, threshold=threshold, where="episode_0")
    assert (found.tolist(), done.tolist()) == ([-1, -1, -1, 0, 0], [False, False, False, True, True])
    found, done = label(None, 5, success=True, stored=staged, threshold=None, where="episode_0")
    assert (found.tolist(), done.tolist()) == ([0, 1, 2, 4, 4], [False, False, False, False, True])


DENSE = f32(0.25, 1.5, 3, -7)


@pytest.mark.parametrize(
    ("options", "success", "own", "terminals"),
    [
        ({}, True, None, [0, 0, 0, 1]),
        ({}, False, None, [0, 0, 0, 0]),  # a time limit
        ({"terminal_on_failure": True}, False, None, [0, 0, 0, 1]),
        ({"success_reward": 3.0}, None, None, [0, 0, 1, 0]),
        ({}, None, [0, 1, 0, 0], [0, 1, 0, 0]),  # the file says it
        ({"success_reward": 3.0}, None, [0, 1, 0, 0], [0, 0, 1, 0]),  # the user says otherwise
    ],
)
def test_dense_rewards_are_kept_as_stored(options, success, own, terminals):
    config = RewardConfig(convention="as_stored", **options)
    threshold = Labeller.of(config, [DENSE]).threshold
    own = None if own is None else np.array(own, bool)
    told = {"success": success, "stored": DENSE, "terminals": own, "threshold": threshold}
    found, done = label(config, 4, **told, where="demo_0")
    assert (found.tolist(), done.tolist()) == (DENSE.tolist(), [bool(flag) for flag in terminals])


def test_dense_rewards_do_not_say_how_the_episode_ended():
    with pytest.raises(ValueError, match=r"demo_0: success: .*--data\.rewards\.success"):
        label(RewardConfig(convention="as_stored"), 4, success=None, stored=DENSE, where="demo_0")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([f32(0, 0), f32(0, 1)], 1.0),
        ([f32(0, 0)], 1.0),  # nobody succeeded
        ([f32(-1, 0), f32(-1, -1)], 0.0),
        ([f32(0, 1), f32(0, 2)], None),  # staged: the first episode alone would look like 0 and 1
        ([f32(0, 0.5)], None),
        ([f32(-1, 1)], None),
        ([], 1.0),
    ],
)
def test_which_stored_reward_means_success(stored, expected):
    assert Labeller.of(RewardConfig(), stored).threshold == expected
    assert Labeller.of(RewardConfig(success_reward=2.0), stored).threshold == 2.0


def test_the_first_source_that_knows_decides_on_success():
    yes = RewardConfig(success=True)
    assert Labeller(yes, None, True).success(False) is False
    assert Labeller(yes, 1.0, True).success(None, f32(0, 0)) is False
    assert Labeller(None, 1.0, True).success(None, f32(0, 1, 0)) is True
    assert Labeller(yes, None, True).success(None, f32(0, 3)) is True
    assert Labeller(yes, None, True).success(None) is True
    assert Labeller(RewardConfig(), None, True).success(None) is None
    assert Labeller(None, None, True).success(None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "dense"}, "source must be .* got 'dense'"),
        ({"convention": "1/0"}, "convention must be .* got '1/0'"),
        ({"source": "sparse", "convention": "as_stored"}, "'sparse' makes rewards; the convention 'as_stored' keeps"),
    ],
)
def test_words_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**options)


def test_zeros_throughout_say_nothing():
    """As converters write them where there were none: success decides, and must be known."""
    assert not Labeller.of(RewardConfig(), [f32(0, 0), f32(0)]).are_known
    assert Labeller.of(RewardConfig(), [f32(0, 0), f32(1)]).are_known
    assert Labeller.of(RewardConfig(convention="as_stored"), [f32(0, 0)]).are_known


@pytest.mark.parametrize(
    ("success", "own", "expected", "terminals"),
    [
        (True, [0, 0, 1], [0, 0, 1], [0, 0, 1]),
        (True, [0, 0, 0], [0, 0, 1], [0, 0, 1]),  # a success without a terminal ends with the recording
        (False, [0, 0, 1], [0, 0, 0], [0, 0, 1]),  # failing ended the task
        (False, [0, 0, 0], [0, 0, 0], [0, 0, 0]),
    ],
)
def test_terminals_of_episodes_without_rewards_are_kept(success, own, expected, terminals):
    config, own = RewardConfig(convention="0/1"), np.array(own, bool)
    found, done = label(config, 3, success=success, terminals=own, where="episode_0")
    assert (found.tolist(), done.tolist()) == (expected, [bool(flag) for flag in terminals])


def test_a_stage_reached_in_a_failure_is_not_its_end():
    """Rewards of 0 and 1 are taken for successes; where one is a recorded failure, they mean something else."""
    touched = {"success": False, "stored": f32(0, 1, 1), "threshold": 1.0, "where": "episode_2"}
    with pytest.raises(ValueError, match=r"episode_2: rewards: .* up to 1 in an episode that did not succeed"):
        label(RewardConfig(), 3, **touched)
    _, done = label(None, 3, **touched)
    assert not done.any()
    found, done = label(RewardConfig(convention="0/1", success_reward=1.0), 3, **touched)
    assert (found.tolist(), done.tolist()) == ([0, 1, 1], [False, True, True])
