"""A run on several data sets: what it says, how it resumes, what is refused; and statistics that are not the data's."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tests.training.conftest import make_episode

from acrlpd.cli.main import main
from acrlpd.config import DataConfig, TrainConfig, from_dict, to_dict
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.options import DataSource
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.view import normalize
from acrlpd.data.view.normalize import NormStats
from acrlpd.training import loading, prefixes, prior_data, report, setup
from acrlpd.types import Episode


def write(folder, lengths=(9, 12), seed=5, state_dim=4, action_dim=2, scale=1.0, **changes):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number, length in enumerate(lengths):
        episode = make_episode(rng, length, success=True)
        state = (scale * rng.normal(size=(length, state_dim))).astype(np.float32)
        actions = rng.uniform(-1, 1, size=(length, action_dim)).astype(np.float32)
        episode = dataclasses.replace(episode, state=state, actions=actions, **changes)
        hdf5.write_episode(hdf5.episode_path(folder, number), episode, {"fps": 10})
    return str(folder)


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


@pytest.fixture
def other(tmp_path):
    return write(tmp_path / "other")


@pytest.fixture
def mixed(tiny_config, other):
    return with_data(tiny_config, path=(tiny_config.data.path, other), weights=(0.7, 0.3))


def test_a_mixed_run_resumes_bit_for_bit_and_says_its_shares(mixed, other):
    straight = setup.make_trainer(mixed)
    summary = straight.train()
    stopped = setup.make_trainer(dataclasses.replace(mixed, name="stopped", offline_steps=4))
    stopped.train()
    config = dataclasses.replace(mixed, name="stopped")
    resumed = setup.make_trainer(config, resume=True, override=["offline_steps"])
    assert int(resumed.agent.step) == 4
    resumed.train()
    for one, two in zip(jax.tree.leaves(straight.agent.params), jax.tree.leaves(resumed.agent.params), strict=True):
        np.testing.assert_array_equal(one, two)

    shares = [(each["name"], each["share"], each["episodes"]) for each in summary["data"]["sets"]]
    assert shares == [(mixed.data.path[0], 0.7, 4), (other, 0.3, 2)]
    files = setup.run_files(mixed)
    (stored,) = (files.checkpoints / "8").rglob("run/metadata")
    assert json.loads(stored.read_text())["sets"] == summary["data"]["sets"]
    page = report.write_report(files.directory).read_text(encoding="utf-8")
    assert "70.0% of the batches; 4 episodes" in page
    assert "30.0% of the batches; 2 episodes, 21 steps" in page
    assert summary["task"] == f"{mixed.data.path[0]} + {other}"
    assert loading.load_checkpoint(files.directory).config == mixed.with_critic_horizon(mixed.critic_horizon)


def test_each_set_has_its_own_options_where_they_differ(tiny_config, tmp_path):
    silent = write(tmp_path / "silent", task="", success=None, rewards=np.zeros(9, np.float32), lengths=(9,))
    one = DataSource(path=tiny_config.data.path, weight=2.0)
    two = DataSource(path=silent, weight=1.0, default_task="lift", rewards=RewardConfig(success=False))
    config = with_data(tiny_config, path=None, sources=(one, two), default_task="anything")
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    prior = setup.open_mixture(config, setup.open_sets(config))
    assert [store.tasks for store in prior.stores] == [["push the button"], ["lift"]]
    assert [store.terminals.sum() for store in prior.stores] == [2, 1]
    np.testing.assert_allclose(prior.shares, (2 / 3, 1 / 3))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"path": ("a", "b"), "weights": (1.0,)}, "one for each: got 1 for 2"),
        ({"path": "a", "weights": (1.0,)}, "one for each: got 1 for 1"),
        ({"weights": (1.0, 2.0)}, "one for each: got 2 for 0"),
        ({"path": ("a", "b"), "weights": (1.0, 0.0)}, r"weights\[1\] must be a number above 0, got 0"),
        ({"path": ("a", "b"), "weights": (1.0, float("nan"))}, r"weights\[1\] must be a number above 0, got nan"),
        ({"path": ()}, "a data set needs a path"),
        ({"path": ("a", "")}, "a data set needs a path"),
        ({"sources": (DataSource(weight=1.0),)}, "a data set needs a path"),
        ({"path": "a", "sources": (DataSource(path="b"),)}, "exclude data.path"),
        ({"sources": (DataSource(path="a", weight=1.0), DataSource(path="b"))}, "one for each: got 1 for 2"),
        ({"path": ("a", "b"), "frame_cache": "c"}, "holds the pictures of one data set"),
        ({"path": "a", "fps": -1.0}, "fps must be a number above 0 or None, got -1"),
    ],
)
def test_what_names_no_sets_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        DataConfig(**changes)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"tolerance_s": -1.0}, "tolerance_s must be a number of at least 0 or None, got -1.0"),
        ({"fps": 0.0}, "fps must be a number above 0 or None, got 0.0"),
        ({"episodes": (3, -1)}, r"episodes\[1\] must be a whole number of at least 0, got -1"),
    ],
)
def test_what_a_set_cannot_have_is_refused(option, told):
    with pytest.raises(ValueError, match=told):
        DataSource(path="a", **option)


DISAGREEMENTS = {
    "state": ({"state_dim": 5}, "state dimensions: 4 and 5"),
    "actions": ({"action_dim": 3}, "action dimensions: 2 and 3"),
    "cameras": ({"images": {"top": np.zeros((9, 8, 8, 3), np.uint8)}, "lengths": (9,)}, "cameras: none and top"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_train_and_inspect_refuse_the_same(tiny_config, tmp_path, capsys, case):
    changes, told = DISAGREEMENTS[case]
    first, second = tiny_config.data.path, write(tmp_path / "second", **changes)
    message = f"{first} and {second} cannot be trained on together: {told}"
    with pytest.raises(ValueError, match=message):
        setup.make_trainer(with_data(tiny_config, path=(first, second)))
    for command in ("inspect", "validate"):
        assert main(["data", command, first, second]) == 1
        shown = capsys.readouterr().out
        assert f"error: {message}" in shown
        assert f"{first}: acrlpd, 4 episodes" in shown
        assert f"{second}: acrlpd" in shown
        assert main(["data", command, first, second, "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert [each["path"] for each in found["sets"]] == [first, second]
        assert (found["usable"], message in found["problems"][0]["text"]) == (False, True)
    if case != "cameras":
        assert main(["norm-stats", first, second]) == 2
        assert message in capsys.readouterr().err


def test_sets_that_go_together_are_usable(tiny_config, other, capsys):
    assert main(["data", "inspect", tiny_config.data.path, other]) == 0
    assert "all of them together\nproblems  none" in capsys.readouterr().out


def test_statistics_made_before_are_those_that_the_run_makes(mixed, tmp_path, capsys):
    out = tmp_path / "stats"
    flags = ["--weights", "0.7", "0.3", "--min_std", str(mixed.data.min_std), "--out", str(out)]
    assert main(["norm-stats", *mixed.data.path, *flags]) == 0
    made, found = normalize.load(out), setup.make_trainer(mixed).norm_stats
    for key in ("state", "actions"):
        for name in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(made[key], name), getattr(found[key], name))


def test_units_that_differ_between_sets_are_told(tiny_config, tmp_path, caplog):
    degrees = write(tmp_path / "degrees", scale=57.3)
    setup.make_trainer(with_data(tiny_config, path=(tiny_config.data.path, degrees), weights=(0.5, 0.5)))
    told = "state: under these statistics 4 of 4 dimensions (0-3) of {} cover almost nothing of the range"
    assert told.format(tiny_config.data.path) in caplog.text


def judged(caplog, config, tmp_path, change):
    """What a run says of statistics that are those of its data, changed."""
    trainer = setup.make_trainer(dataclasses.replace(config, name="own"))
    trainer.loader.close()
    own = trainer.norm_stats.items()
    given = {key: NormStats(*(change(key, value) for value in vars(each).values())) for key, each in own}
    normalize.save(tmp_path / "given" / normalize.FILE_NAME, given)
    caplog.clear()
    setup.make_trainer(with_data(config, norm_stats=str(tmp_path / "given"))).loader.close()
    return [record.message for record in caplog.records if "under these statistics" in record.message]


@pytest.mark.parametrize("normalization", ["z_score", "quantile"])
@pytest.mark.parametrize(
    ("factor", "told"),
    [
        (1.0, None),
        (2.0, None),
        (0.5, None),
        (180 / np.pi, "cover almost nothing of the range"),
        (1000.0, "cover almost nothing of the range"),
        (np.pi / 180, "lie far outside"),
        (0.0, "lie far outside"),
    ],
)
def test_statistics_of_others_are_judged(tiny_config, tmp_path, caplog, normalization, factor, told):
    """Of the second state dimension and no other: in another unit, or without any spread though it moves."""
    config = with_data(tiny_config, action_normalization=normalization)

    def change(key, value):
        return value * np.array([1, factor, 1, 1]) if key == "state" else value

    messages = judged(caplog, config, tmp_path, change)
    assert len(messages) == (told is not None)
    for message in messages:
        assert f"state: under these statistics 1 of 4 dimensions (1) of {config.data.path} {told}" in message
        assert message.startswith(str(tmp_path / "given"))


@pytest.mark.parametrize("normalization", ["z_score", "quantile"])
def test_statistics_of_another_place_are_told(tiny_config, tmp_path, caplog, normalization):
    config = with_data(tiny_config, action_normalization=normalization)
    shifted = iter([20.0, 0.0, 20.0, 20.0])  # mean, std, q01, q99 of the state

    def change(key, value):
        return value + np.array([0, 0, 0, next(shifted)]) if key == "state" else value

    (message,) = judged(caplog, config, tmp_path, change)
    assert "1 of 4 dimensions (3)" in message
    assert "lie far outside" in message


@pytest.mark.parametrize("normalization", ["z_score", "quantile"])
def test_statistics_that_were_widened_fit_what_they_were_made_from(tiny_config, tmp_path, caplog, normalization):
    """Of a dimension that stands still but for noise, and one that rarely moves."""
    rng = np.random.default_rng(0)
    rarely = (np.arange(400) > 396).astype(np.float32)
    state = np.stack([1e-5 * rng.normal(size=400), rarely, np.zeros(400), rng.normal(size=400)], axis=1)
    path = write(tmp_path / "still", lengths=(400,))
    episode = dataclasses.replace(hdf5.read_episode(hdf5.episode_path(path, 0)), state=state.astype(np.float32))
    hdf5.write_episode(hdf5.episode_path(path, 0), episode)
    config = with_data(tiny_config, path=path, action_normalization=normalization)
    assert judged(caplog, config, tmp_path, lambda key, value: value) == []


def test_prefixes_of_several_sets_are_stored_side_by_side(tmp_path, monkeypatch):
    """The same files twice, of which one reading sees no picture of its own: rows must not be mixed up."""
    stores = []
    monkeypatch.setattr(prefixes, "_computed", lambda *arguments: iter([[arguments[3].state]]))
    monkeypatch.setattr(prefixes, "_encoder", lambda agent, alone: (lambda policy, seen: seen.state, None))
    monkeypatch.setattr(prefixes, "key", lambda *args: f"{args[3].name}-{args[5]}")
    for seed in (1, 2):
        episode = Episode(
            state=np.full((3 + seed, 2), seed, np.float32),
            actions=np.zeros((3 + seed, 2), np.float32),
            rewards=np.zeros(3 + seed, np.float32),
            terminals=np.zeros(3 + seed, bool),
            task="",
        )
        stores.append(setup.EpisodeStore.from_episodes([episode]))
    prior = setup.Mixture(tuple(stores), ("a", "a"))
    config = TrainConfig(data=DataConfig(path=("a", "a"), prefix_bytes=9 * 8))
    one, two = prefixes.open_rows(
        config, None, prior, lambda raw: raw, {}, data=[tmp_path / "a", tmp_path / "a"], folder=tmp_path
    )
    assert one.take(np.array([3])).tolist() == [[1, 1]]
    assert two.take(np.array([0, 4])).tolist() == [[2, 2], [2, 2]]
    small = with_data(config, prefix_bytes=9 * 8 - 1)  # enough for either alone
    assert prefixes.open_rows(small, None, prior, lambda raw: raw, {}, data=[tmp_path] * 2, folder=tmp_path) is None


def test_sets_of_two_robots_are_refused(tiny_config, tmp_path, capsys):
    """LeRobot says which robot recorded a set; the user's word for all of them wins."""
    pytest.importorskip("pyarrow")
    sets = {name: str(tmp_path / name) for name in ("arm", "leg", "unknown")}
    for name, path in sets.items():
        words = ["data", "convert", tiny_config.data.path, path, "--fps", "10", "--robot-type", name]
        assert main(words) == 0
    with pytest.raises(ValueError, match=r"robots \(a run normalizes by the statistics of one\): arm and leg"):
        setup.make_trainer(with_data(tiny_config, path=(sets["arm"], sets["leg"])))
    assert main(["data", "inspect", sets["arm"], sets["leg"]]) == 1
    assert "robots (a run normalizes by the statistics of one): arm and leg" in capsys.readouterr().out
    assert main(["data", "inspect", sets["arm"], sets["unknown"]]) == 0


OPTIONS = {
    "cameras": ("a",),
    "state_keys": ("a",),
    "action_keys": ("a",),
    "default_task": "lift",
    "fps": 7.0,
    "filter_key": "f",
    "episodes": (2,),
    "tolerance_s": 0.5,
    "check_images": True,
    "align_observations": True,
    "jpeg_bgr": True,
    "drop_idle": True,
    "clip_actions": True,
    "cube_goal": ((1.0, 2.0, 3.0),),
    "button_goal": (1,),
    "frame_cache": "frames",
    "rewards": RewardConfig(success=True),
}


@pytest.mark.parametrize("name", sorted({field.name for field in dataclasses.fields(DataSource)} - {"path", "weight"}))
def test_an_option_of_a_set_is_its_own_or_that_of_the_run(tiny_config, monkeypatch, name):
    """As the reader is asked for it."""
    asked = []
    monkeypatch.setattr(prior_data, "open_episodes", lambda path, **options: asked.append((path, options)))
    sets = {
        "of the set": with_data(tiny_config, path=None, sources=(DataSource(path="a", **{name: OPTIONS[name]}),)),
        "of the run": with_data(tiny_config, path=None, sources=(DataSource(path="a"),), **{name: OPTIONS[name]}),
        "of a run with one set": with_data(tiny_config, path="a", **{name: OPTIONS[name]}),
        "without it": with_data(tiny_config, path="a"),
    }
    for config in sets.values():
        prior_data.open_prior(config)
    assert asked[0] == asked[1] == asked[2] != asked[3]
    assert len({path for path, _ in asked}) == 1
