"""Every field of ``DataConfig`` changes what a run is built from."""

import contextlib
import dataclasses
import inspect
import json
import shutil

import h5py
import numpy as np
import pytest

from acrlpd.cli import data, norm_stats
from acrlpd.config import DataConfig, TrainConfig, from_dict, to_dict
from acrlpd.data import chunks, sources
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.frame_cache import FrameCache
from acrlpd.data.formats.options import FORMATS
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.mixture import Mixture
from acrlpd.data.store import windows
from acrlpd.data.tools import inspection
from acrlpd.data.view import normalize
from acrlpd.data.view.normalize import NormStats
from acrlpd.envs.env import EnvSpec
from acrlpd.overrides import apply_config_overrides
from acrlpd.training import loading, prior_data, report, setup
from acrlpd.types import Episode

ELSEWHERE = {
    *("validation_fraction", "validation_seed"),  # tests/data/test_held_out.py
    "collect",
    "max_replay_bytes",
    "online_ratio",
    "online_ratio_episodes",
    "ends_in_chunks",
    "prefix_bytes",
    "robot",
    "delta_mask",
    "weights",
    "sources",
}  # tested with what they belong to
CUBE = (0.425, 0.1, 0.02)
STATE_DIM, ACTION_DIM = 4, 2  # of the tiny run


def with_data(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def loaded(config: TrainConfig):
    data, source = config.data, prior_data.open_prior(config)
    return windows.open_store(source, memory_bytes=data.memory_bytes, num_workers=data.num_workers)


@pytest.fixture
def robomimic(tmp_path):
    """Two demos with a camera, of which the filter key names the second."""
    path = tmp_path / "demos.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(2):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = 5
            for key, width in {"actions": 2, "actions_abs": 3, "obs/place": 4, "obs/speed": 1}.items():
                demo[key] = rng.normal(size=(5, width))
            demo["rewards"] = (np.arange(5) == 4).astype(float)
            for camera in ("left", "right"):
                demo[f"obs/{camera}_image"] = rng.integers(0, 256, (5, 8, 8, 3), np.uint8)
        file["mask/mine"] = np.array([b"demo_1"])
    return path


@pytest.fixture
def play(tmp_path):
    qpos = np.zeros((6, 21), np.float32)
    qpos[2, 14:17] = CUBE
    arrays = {"observations": np.zeros((6, 3)), "actions": np.zeros((6, 2)), "terminals": np.arange(6) == 5}
    np.savez(tmp_path / "play.npz", **arrays, qpos=qpos, button_states=np.tile(np.arange(6)[:, None] == 3, (1, 2)))
    return tmp_path / "play.npz"


COVERED = {
    *("path", "cameras", "state_keys", "action_keys", "default_task", "filter_key", "rewards", "cube_goal"),
    *("button_goal", "frame_cache", "on_bad_episode", "memory_bytes", "num_workers", "batch_size", "sequence_ratio"),
    *("min_std", "action_normalization", "action_dim", "norm_stats"),
    *("fps", "episodes", "tolerance_s", "check_images", "align_observations", "jpeg_bgr", "drop_idle", "clip_actions"),
}


def test_no_field_is_forgotten():
    assert {field.name for field in dataclasses.fields(DataConfig)} == COVERED | ELSEWHERE


def test_what_is_read(tiny_config, robomimic, tmp_path):
    config = with_data(tiny_config, path=str(robomimic), state_keys=("place",))
    store = loaded(config)
    assert (store.num_episodes, store.state.shape[1], store.actions.shape[1], store.tasks) == (2, 4, 2, [""])
    assert (store.cameras, store.rewards.min()) == (("left_image", "right_image"), -1)
    changed = with_data(
        config,
        state_keys=("place", "speed"),
        action_keys=("actions_abs",),
        cameras=("right_image",),
        filter_key="mine",
        default_task="lift it",
        rewards=RewardConfig(convention="0/1"),
        frame_cache=str(tmp_path / "frames"),
    )
    source = prior_data.open_prior(changed)
    size = changed.policy.image_size
    FrameCache(tmp_path / "frames", size, size).build(source)
    robomimic_frames = next((tmp_path / "frames").rglob("*.npy"))
    np.save(robomimic_frames, np.full((5, size, size, 3), 7, np.uint8))
    store = loaded(changed)
    assert (store.num_episodes, store.state.shape[1], store.actions.shape[1], store.tasks) == (1, 5, 3, ["lift it"])
    assert (store.cameras, store.rewards.tolist()) == (("right_image",), [0, 0, 0, 0, 1])
    assert (store.images["right_image"][np.arange(5)] == 7).all()  # it is the record that is read


def test_dense_rewards_are_used_as_they_are_by_the_flag_that_the_error_names(tiny_config, robomimic):
    with h5py.File(robomimic, "r+") as file:
        for demo in file["data"].values():
            demo["rewards"][...] = np.arange(5) * 0.25
    config = with_data(tiny_config, path=str(robomimic), state_keys=("place",))
    with pytest.raises(ValueError, match=r"data/demo_0: rewards: .*--data\.rewards\.convention as_stored"):
        prior_data.open_prior(config)
    flags = {"data.rewards.convention": "as_stored", "data.rewards.success": False}
    store = loaded(apply_config_overrides(config, flags))
    assert (store.rewards.tolist(), store.terminals.any()) == ([0, 0.25, 0.5, 0.75, 1] * 2, False)


@pytest.mark.parametrize(
    ("goal", "rewards"), [({"cube_goal": (CUBE,)}, [-1, -1, 0, -1, -1]), ({"button_goal": (1, 1)}, [-2, -2, -2, 0, -2])]
)
def test_play_data_needs_a_goal(tiny_config, play, goal, rewards):
    config = with_data(tiny_config, path=str(play))
    with pytest.raises(ValueError, match=r"play\.npz: .*--data\.cube_goal 0\.425"):
        prior_data.open_prior(config)
    assert loaded(with_data(config, **goal)).rewards.tolist() == rewards
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(with_data(config, **goal))))) == with_data(
        config, **goal
    )
    with pytest.raises(ValueError, match="goal means nothing to hdf5 data"):
        prior_data.open_prior(with_data(tiny_config, **goal))


@pytest.mark.parametrize("kind", sources.READERS)
def test_an_option_is_the_readers_or_refused(tiny_config, monkeypatch, kind):
    """By every way to say it: a field of a run, a flag of a command, an argument in Python."""
    options = {
        "fps": 7.0,
        "episodes": (2, 0),
        "tolerance_s": 0.5,
        "check_images": True,
        "align_observations": True,
        "jpeg_bgr": True,
        "drop_idle": True,
        "clip_actions": True,
        "cameras": ("a",),
        "state_keys": ("a",),
        "action_keys": ("a",),
        "default_task": "lift",
        "filter_key": "f",
        "cube_goal": (CUBE,),
        "button_goal": (1,),
    }
    assert options.keys() == FORMATS.keys()
    known = inspect.signature(sources.READERS[kind]).parameters
    told: list[dict] = []

    def reader(data, **given):
        told.append(given)
        raise ValueError("that was the reader")

    reader.__signature__ = inspect.signature(sources.READERS[kind])
    monkeypatch.setitem(sources.READERS, kind, reader)
    monkeypatch.setattr(sources, "identify", lambda data: kind)
    monkeypatch.setattr(norm_stats, "identify", lambda data: kind)
    for name, value in options.items():
        argument = "goal" if name.endswith("_goal") else name
        is_known = argument in known
        assert is_known == any((each if each in sources.READERS else "hdf5") == kind for each in FORMATS[name])
        words = [f"--{name}", *np.ravel(value).astype(str)] if not isinstance(value, bool) else [f"--{name}"]
        words += ["True"] if name == "check_images" else []
        for open_it in (
            lambda name=name, value=value: prior_data.open_prior(with_data(tiny_config, **{name: value})),
            lambda words=words: data.main(["convert", "there", "new", *words]),
            lambda words=words: norm_stats.main(["there", *words]),
        ):
            with pytest.raises(ValueError, match="that was the reader" if is_known else f"{argument} means nothing"):
                open_it()
            if is_known:
                said = told.pop()[argument]
                assert (getattr(said, "positions", None) or getattr(said, "states", said)) == value


def test_where_rows_are_held(tiny_config, tmp_path):
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    numbers = np.zeros((4, 2), np.float32)
    episode = Episode(numbers, numbers, numbers[:, 0], np.zeros(4, bool), task="", images={"top": frames}, success=True)
    hdf5.write_episode(hdf5.episode_path(tmp_path / "set", 0), episode, compression="gzip")
    config = with_data(tiny_config, path=str(tmp_path / "set"))
    assert loaded(config).reader is None
    reader = loaded(with_data(config, memory_bytes=100, num_workers=3)).reader
    assert reader._num_workers == 3


def test_batches_are_drawn_as_asked(tiny_config):
    with pytest.raises(ValueError, match=r"data\.action_dim is 3"):
        setup.make_trainer(with_data(tiny_config, action_dim=3))
    config = with_data(tiny_config, batch_size=6, sequence_ratio=1.0)
    trainer = setup.make_trainer(config)
    batch = trainer.loader.batch(3)
    trainer.loader.close()
    store = loaded(config)
    rows = chunks.start_rows(store, chunks.step_rng(config.seed, 3), 6, config.policy.action_horizon, 1.0)
    np.testing.assert_array_equal(batch.step_id, rows - store.starts[store.episode_index(rows)])


def test_how_numbers_are_normalised(tiny_config):
    source = prior_data.open_prior(tiny_config)
    store = loaded(tiny_config)

    def stats(**changes):
        return setup.make_norm_stats(with_data(tiny_config, **changes), Mixture.of(store), [source], None)

    assert (stats(min_std=50.0)["state"].std == 50).all()
    assert (stats()["state"].std < 50).all()
    with pytest.raises(ValueError, match=r"data\.action_normalization='bounds' needs an environment"):
        stats(action_normalization="bounds")


def test_skipped_episodes_are_counted_and_told(tiny_config):
    bad = hdf5.episode_path(tiny_config.data.path, 2)
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"episode_000002\.hdf5: expected a complete HDF5 file"):
        setup.make_trainer(tiny_config)
    config = with_data(tiny_config, on_bad_episode="skip")
    with pytest.warns(UserWarning, match="1 of 4 episodes were left out"):
        trainer = setup.make_trainer(dataclasses.replace(config, name="skips"))
    summary = trainer.train()
    assert summary["data"]["episodes"] == 3
    assert [name for name, _ in summary["data"]["skipped"]] == [str(bad)]
    run = report.read_run(setup.run_files(trainer.config).directory)
    assert {record["loader/skipped_episodes"] for record in run.training} == {1}
    assert {"loader/wait_s", "loader/batches_per_s", "loader/valid_ratio"} <= run.training[-1].keys()
    page = report.write_report(run.files.directory).read_text(encoding="utf-8")
    assert "1 of 4 episodes of the prior data could not be used" in page
    assert bad.name in page


def given_stats(state_dim, action_dim, *, padding=0, quantiles=True):
    """Of somebody's robot, unlike any that the data would give."""

    def one(dim):
        numbers = np.arange(1.0, dim + 1)
        padded = {
            name: np.append(values, np.zeros(padding))
            for name, values in {"mean": 10 * numbers, "std": numbers, "q01": -numbers, "q99": numbers}.items()
            if quantiles or name in ("mean", "std")
        }
        return NormStats(**padded)

    return {"state": one(state_dim), "actions": one(action_dim)}


@pytest.mark.parametrize("place", ["norm_stats.json", "", "checkpoint", "checkpoint/params", "checkpoint/assets"])
def test_a_run_takes_over_statistics(tiny_config, tmp_path, place):
    """From the file, its folder, or a checkpoint of openpi's by either of its usual paths; padding is cut off."""
    stats = given_stats(STATE_DIM, ACTION_DIM, padding=2)
    folder = tmp_path / "checkpoint/assets/lab/robot" if place.startswith("checkpoint") else tmp_path
    normalize.save(folder / normalize.FILE_NAME, stats)
    (tmp_path / "checkpoint/params").mkdir(parents=True, exist_ok=True)
    trainer = setup.make_trainer(with_data(tiny_config, norm_stats=str(tmp_path / place)))
    for key, dim in {"state": STATE_DIM, "actions": ACTION_DIM}.items():
        np.testing.assert_array_equal(trainer.norm_stats[key].mean, stats[key].mean[:dim])
        np.testing.assert_array_equal(trainer.norm_stats[key].q99, stats[key].q99[:dim])
    rows = np.array([0])
    raw = chunks.gather(loaded(tiny_config), rows, 3)
    transform = setup.make_transform(trainer.config, trainer.norm_stats, setup.Dims(STATE_DIM, ACTION_DIM))
    found = transform({key: raw[key] for key in ("state", "actions", "image", "prompt")})
    by_hand = (raw["state"][0] - 10 * np.arange(1.0, STATE_DIM + 1)) / (np.arange(1.0, STATE_DIM + 1) + 1e-6)
    np.testing.assert_allclose(found["state"][0], by_hand, rtol=1e-5)


def test_a_checkpoint_saves_the_statistics_it_was_given(tiny_config, tmp_path):
    stats = given_stats(STATE_DIM, ACTION_DIM)
    normalize.save(tmp_path / "stats" / normalize.FILE_NAME, stats)
    trainer = setup.make_trainer(with_data(tiny_config, norm_stats=str(tmp_path / "stats")))
    trainer.train()
    restored = loading.load_checkpoint(setup.run_files(tiny_config).directory)
    start = {"state": np.zeros(STATE_DIM), "actions": np.zeros((3, ACTION_DIM))}
    np.testing.assert_allclose(
        restored.transform.inverse(start)["actions"][0], stats["actions"].mean, rtol=1e-6
    )  # 0 is the mean


@pytest.mark.parametrize(
    ("stats", "changes", "error", "complaint"),
    [
        (None, {}, FileNotFoundError, "no normalization statistics at"),
        ({}, {}, ValueError, r"expected statistics of state and actions, found none"),
        (
            {"state": given_stats(4, 2)["state"]},
            {},
            ValueError,
            "expected statistics of state and actions, found state",
        ),
        (given_stats(30, 2), {}, ValueError, r"state: expected \d+ dimensions, as the data has, found 30\. These are"),
        (given_stats(1, 2), {}, ValueError, r"state: expected \d+ dimensions, as the data has, found 1\. These are"),
        (
            given_stats(STATE_DIM, ACTION_DIM, quantiles=False),
            {"action_normalization": "quantile"},
            ValueError,
            "state: expected q01 and q99, which quantile normalization",
        ),
    ],
)
def test_statistics_of_something_else_are_refused(tiny_config, tmp_path, stats, changes, error, complaint):
    file = tmp_path / "given" / normalize.FILE_NAME
    if stats is not None:
        normalize.save(file, stats)
    with pytest.raises(error, match=complaint) as caught:
        setup.make_trainer(with_data(tiny_config, norm_stats=str(file.parent), **changes))
    assert "given" in str(caught.value)


def test_one_of_several_statistics_must_be_named(tiny_config, tmp_path):
    """pi0_base has those of many robots."""
    for robot in ("droid", "trossen"):
        normalize.save(tmp_path / "base/assets" / robot / normalize.FILE_NAME, given_stats(STATE_DIM, ACTION_DIM))
    with pytest.raises(ValueError, match=r"found 2\. Name one of .*droid/norm_stats\.json, .*trossen/norm_stats\.json"):
        setup.make_trainer(with_data(tiny_config, norm_stats=str(tmp_path / "base")))


def test_statistics_exclude_bounds(tiny_config):
    with pytest.raises(ValueError, match=r"data\.norm_stats brings"):
        with_data(tiny_config, norm_stats="somewhere", action_normalization="bounds")


@pytest.mark.parametrize("kind", ["pi0", "pi05", "mlp_flow", "gaussian"])
def test_no_text_is_no_instruction_for_a_policy_that_reads_one(tiny_config, robomimic, tmp_path, caplog, kind):
    """What ``acrlpd data inspect`` says of the same data, and a refusal where several tasks would share the text."""

    def told(path, **changes):
        config = with_data(tiny_config, path=str(path), state_keys=("place",), **changes)
        algorithm = "rlpd_ac" if kind == "gaussian" else config.agent.algorithm
        config = dataclasses.replace(
            config,
            policy=dataclasses.replace(config.policy, kind=kind),
            agent=dataclasses.replace(config.agent, algorithm=algorithm),
            data=dataclasses.replace(config.data, action_normalization="quantile"),
        )
        opened = setup.open_sets(config)
        caplog.clear()
        setup.check_instructions(config, opened, None)
        return caplog.text

    reads = kind in ("pi0", "pi05")
    (problem,) = inspection.inspect(robomimic, state_keys=("place",)).problems
    assert (problem.text in told(robomimic)) == reads
    assert told(robomimic, default_task="lift it") == ""
    (tmp_path / "two").mkdir()
    for name in ("one.hdf5", "other.hdf5"):
        shutil.copy(robomimic, tmp_path / "two" / name)
    (problem,) = inspection.inspect(tmp_path / "two", state_keys=("place",)).problems
    assert "2 tasks (one.hdf5, other.hdf5)" in problem.text
    with pytest.raises(ValueError, match="not trained on them") if reads else contextlib.nullcontext() as refused:
        assert told(tmp_path / "two") == ""
    assert refused is None or problem.text in str(refused.value)
    assert told(tmp_path / "two", default_task="lift it") == ""


def test_an_environment_without_an_instruction_is_told(tiny_config, caplog):
    config = dataclasses.replace(tiny_config, policy=dataclasses.replace(tiny_config.policy, kind="pi0"))
    numbers = np.zeros(2, np.float32)
    spec = EnvSpec("robot/mine", " ", 4, 2, numbers, numbers, 10, (), 8, 10.0, -1.0)
    setup.check_instructions(config, setup.open_sets(config), spec)
    assert "robot/mine has no instruction, and the policy reads one: say it with --env.instruction" in caplog.text
