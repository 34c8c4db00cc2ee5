"""Every question about data and checkpoint: good where they belong together, wrong where data is broken on purpose."""

import dataclasses

import numpy as np
import pytest

from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.tokenizer import PromptTokenizer
from acrlpd.training import findings
from acrlpd.training.findings import Replay, Rows, summary
from acrlpd.training.offline_evaluation import Errors, OfflineEvaluation

RNG = np.random.default_rng(0)
STATE = np.array([0.5, -1.0, 0.0]) + RNG.normal(size=(400, 3)) * [0.3, 0.5, 0.4]
MOTION = RNG.normal(size=(400, 2)) * 0.02
GRIPPER = np.where(RNG.random(400) < 0.8, 1.0, -1.0)[:, None]
ABSOLUTE = np.concatenate([STATE[:, :2] + MOTION, GRIPPER], axis=1)  # two joints and a gripper
RELATIVE = np.concatenate([MOTION, GRIPPER], axis=1)
MASK = (True, True)


def rows(actions, model_actions=None, state=STATE):
    there = actions if model_actions is None else model_actions
    return Rows(state, actions, state, there, there)


def stats_of(actions, state=STATE):
    return {"state": summary(state), "actions": summary(actions)}


def convention(data, stats, mask=()):
    return findings.of_convention(data, stats, by_bounds=False, delta_mask=mask)


def subtracted(actions):
    return actions - np.concatenate([STATE[:, :2], np.zeros((400, 1))], axis=1)


def test_statistics_of_the_same_data_are_good():
    found = findings.of_statistics("state", STATE, summary(STATE), quantiles=False)
    assert (found.verdict, found.advice) == ("good", "")
    assert "32% of the normalized values lie outside" in found.text or "3" in found.text[:2]
    assert findings.of_statistics("state", STATE, summary(STATE), quantiles=True).verdict == "good"


@pytest.mark.parametrize("quantiles", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        np.degrees(STATE),  # other units
        STATE + 5,  # another robot
        STATE * [1, 1, 1000],  # one dimension in mm
    ],
)
def test_statistics_of_another_robot_are_wrong(quantiles, other):
    found = findings.of_statistics("state", other, summary(STATE), quantiles=quantiles)
    assert found.verdict == "wrong"
    assert "another robot" in found.advice
    assert found.details


def test_a_dimension_without_spread_is_looked_at_and_one_that_moves_under_it_is_wrong():
    still = STATE * [1, 1, 0]
    assert findings.of_statistics("state", still, summary(still), quantiles=False).verdict == "look"
    found = findings.of_statistics("state", STATE, summary(still), quantiles=False)
    assert found.verdict == "wrong"
    assert "no spread in dimension 2" in found.text


@pytest.mark.parametrize(
    ("data", "stats", "mask"),
    [
        (rows(ABSOLUTE), stats_of(ABSOLUTE), ()),
        (rows(RELATIVE), stats_of(RELATIVE), ()),
        (rows(ABSOLUTE, subtracted(ABSOLUTE)), stats_of(RELATIVE), MASK),
        # openpi's LIBERO: relative actions from which the state is subtracted once more, in training, too
        (rows(RELATIVE, subtracted(RELATIVE)), stats_of(subtracted(RELATIVE)), MASK),
    ],
)
def test_the_convention_of_training_is_good(data, stats, mask):
    assert convention(data, stats, mask).verdict == "good"


@pytest.mark.parametrize(
    ("data", "stats", "mask", "advice"),
    [
        (rows(RELATIVE), stats_of(ABSOLUTE), (), "relative here, absolute in training"),
        (rows(ABSOLUTE), stats_of(RELATIVE), (), "absolute here, relative in training"),
        (rows(RELATIVE, subtracted(RELATIVE)), stats_of(RELATIVE), MASK, "subtracted once more"),
    ],
)
def test_actions_made_relative_or_absolute_are_wrong(data, stats, mask, advice):
    found = convention(data, stats, mask)
    assert found.verdict == "wrong"
    assert advice in found.advice
    assert "dimensions 0-1" in found.advice
    assert len(found.details) == 2


def test_another_scale_alone_is_to_be_looked_at_and_actions_beyond_the_space_are_wrong():
    assert convention(rows(RELATIVE * [3, 3, 1]), stats_of(RELATIVE)).verdict == "good"
    assert convention(rows(RELATIVE * [10, 10, 1]), stats_of(RELATIVE)).verdict == "look"
    bounds = {"state": summary(STATE), "actions": NormStats(np.zeros(3), np.ones(3))}
    for scale, verdict in ((1.0, "good"), (100.0, "wrong")):
        data = rows(RELATIVE * [scale, scale, 1])
        assert findings.of_convention(data, bounds, by_bounds=True, delta_mask=()).verdict == verdict


def test_a_gripper_as_in_training_is_good():
    found = findings.of_grippers(RELATIVE, summary(RELATIVE))
    assert found.verdict == "good"
    assert "dimension 2 switches between -1 and 1" in found.text
    assert "no dimension" in findings.of_grippers(MOTION, summary(MOTION)).text


@pytest.mark.parametrize("has_quantiles", [True, False])
@pytest.mark.parametrize(
    ("gripper", "reason"),
    [
        (-GRIPPER, "open and closed are swapped"),
        ((GRIPPER + 1) / 2, "another range"),
        ((GRIPPER + 1) * 50, "another range"),
    ],
)
def test_a_flipped_or_scaled_gripper_is_wrong(has_quantiles, gripper, reason):
    stats = summary(RELATIVE)
    if not has_quantiles:
        stats = NormStats(stats.mean, stats.std)
    found = findings.of_grippers(np.concatenate([MOTION, gripper], axis=1), stats)
    if not has_quantiles and gripper.max() == 1 and gripper.min() == 0:
        return  # a mean of 0.6 is as likely between 0 and 1 as between -1 and 1
    assert found.verdict == "wrong"
    assert reason in found.details[0]


def test_a_gripper_of_negative_numbers_has_its_sign_turned_around():
    known = np.concatenate([MOTION, (GRIPPER + 1) / 2], axis=1)
    found = findings.of_grippers(known * [1, 1, -1], summary(known))
    assert "its sign is turned around" in found.details[0]


def pictures(kind):
    found = RNG.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    return {"black": np.zeros_like(found), "grey": np.full_like(found, 90), "frozen": found[[0] * 5], "live": found}[
        kind
    ]


@pytest.mark.parametrize(
    ("read", "missing", "verdict", "told"),
    [
        ({"top": "live"}, None, "good", "not read: side"),
        ({"top": "live", "wrist": "black"}, None, "wrong", "wrist: 8x8, brightness 0 of 255, contrast 0: black"),
        ({"top": "grey"}, None, "wrong", "one colour everywhere"),
        ({"top": "frozen"}, None, "look", "it never changes"),
        ({"wrist": "black", "top": "frozen"}, None, "wrong", "black"),
        ({"top": "live"}, "the policy reads the cameras top, wrist, and the data has top", "wrong", "has top"),
        ({}, None, "good", "reads no pictures"),
    ],
)
def test_cameras(read, missing, verdict, told):
    found = findings.of_cameras(missing, {name: pictures(kind) for name, kind in read.items()}, ["side"])
    assert found.verdict == verdict
    assert told in " ".join([found.text, *found.details])


@pytest.mark.parametrize(
    ("prompts", "length", "verdict", "told"),
    [
        ({"open the drawer": 3}, 16, "good", "1 instructions"),
        ({"open the drawer and close it again": 3, "open": 1}, 4, "wrong", "tokens of 4 ('open the drawer and"),
        ({"": 2}, 16, "wrong", "2 of 2 episodes have none"),
        ({"": 1, "open the drawer": 3}, 16, "look", "1 of 4 episodes have none"),
        ({"打开抽屉": 1}, 64, "wrong", "are unknown"),
    ],
)
def test_prompts(prompts, length, verdict, told):
    found = findings.of_prompts(PromptTokenizer(max_length=length), prompts, None)
    assert (found.verdict, told in found.text) == (verdict, True), found.text


def test_the_text_of_the_state_counts_among_the_tokens():
    tokenizer = PromptTokenizer(max_length=16)
    assert findings.of_prompts(tokenizer, {"go": 1}, None).verdict == "good"
    assert findings.of_prompts(tokenizer, {"go": 1}, np.zeros((1, 32))).verdict == "wrong"


@pytest.mark.parametrize(
    ("known", "fps", "lengths", "verdict"),
    [
        (10, 10, [50], "good"),
        (10, 10.5, [50], "good"),
        (10, 20, [50], "wrong"),
        (None, 20, [50], "look"),
        (10, None, [50], "look"),
        (10, 10, [3, 4, 50], "look"),
    ],
)
def test_rates(known, fps, lengths, verdict):
    found = findings.of_rate(known, fps, horizon=10, executed=5, lengths=lengths)
    assert found.verdict == verdict
    if verdict == "wrong":
        assert "moves 2 times as fast" in found.advice


def evaluation(score, *, correlation=(0.9,)):
    def errors(value):
        return Errors((value,), value, (value, value))

    found = {"sample": errors(score), "repeat": errors(0.5), "mean": errors(0.8)}
    counts = {"episodes": 1, "judged_episodes": 1, "chunks": 9, "executed": 2, "num_samples": 1}
    rest = {"flow_loss": None, "telling": None, "has_critics": False, "courses": ()}
    return OfflineEvaluation(**counts, spread=(1.0,), errors=found, correlation=correlation, **rest)


@pytest.mark.parametrize(
    ("found", "verdict", "told"),
    [
        (evaluation(0.3), "good", ""),
        (evaluation(0.6), "look", "worse than holding still"),
        (evaluation(0.9), "wrong", "has not learned these actions"),
        (evaluation(0.3, correlation=(0.9, -0.8)), "wrong", "A sign is turned around"),
        (evaluation(0.3, correlation=(None,)), "good", ""),
    ],
)
def test_errors(found, verdict, told):
    judged = findings.of_errors(found)
    assert judged.verdict == verdict
    assert told in judged.advice
    assert "step 2: policy" in judged.details[1]


@pytest.mark.parametrize(
    ("replays", "verdict"),
    [
        ([Replay(True, True, 0.0)] * 5, "good"),
        ([Replay(True, True, 0.0), Replay(False, False, 0.0)], "good"),
        ([Replay(True, False, 0.0)] * 3 + [Replay(True, True, 0.0)], "wrong"),
        ([Replay(True, False, 0.4)] * 3, "look"),
        ([Replay(False, False, 0.0)], "look"),
    ],
)
def test_replays(replays, verdict):
    assert findings.of_replay(replays).verdict == verdict


def test_a_finding_that_is_not_good_says_what_to_do():
    bad = [
        findings.of_rate(None, None, horizon=2, executed=1, lengths=[9]),
        findings.of_replay([Replay(False, False, 0.0)]),
        findings.of_statistics("state", STATE + 5, summary(STATE), quantiles=False),
    ]
    assert all(each.advice for each in bad)
    assert {each.verdict for each in bad} == {"look", "wrong"}
    assert dataclasses.asdict(bad[0])["name"] == "rate and horizon"
