"""Which episodes are held out: the same for everybody, whatever the format and wherever the files are."""

import dataclasses
import shutil

import numpy as np
import pytest

from acrlpd.agents.config import AgentConfig
from acrlpd.config import DataConfig, PolicyConfig, TrainConfig
from acrlpd.data import held_out
from acrlpd.data.formats import hdf5
from acrlpd.data.sources import open_episodes
from acrlpd.data.store import windows
from acrlpd.data.store.episodes import EpisodeSource
from acrlpd.models.critic import CriticConfig
from acrlpd.training import prior_data, setup
from acrlpd.types import Episode, FinalObservation

NAMES = [f"episode_{number}.hdf5" for number in range(40)]


def write(folder, count, *, camera=False):
    for number in range(count):
        length = 5 + number
        episode = Episode(
            state=np.full((length, 2), number, np.float32) + np.arange(length, dtype=np.float32)[:, None] / 100,
            actions=np.full((length, 1), number, np.float32),
            rewards=np.zeros(length, np.float32),
            terminals=np.zeros(length, bool),
            task="wave",
            images={"top": np.full((length, 4, 4, 3), number, np.uint8)} if camera else {},
            success=number % 2 == 0,
            final=FinalObservation(np.full(2, 100 + number, np.float32), {"top": np.zeros((4, 4, 3), np.uint8)})
            if camera and number % 3 == 0
            else None,
        )
        hdf5.write_episode(hdf5.episode_path(folder, number), episode)
    return folder


def test_the_split_of_one_kind_depends_on_names_and_seed_alone():
    chosen = held_out.split(NAMES, 0.25, 0)
    assert chosen.sum() == 10
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(held_out.split([NAMES[k] for k in order], 0.25, 0), chosen[order])
    assert (held_out.split(NAMES, 0.25, 1) != chosen).any()
    assert not held_out.split(NAMES, 0.0, 0).any()
    assert held_out.split(NAMES[:3], 0.01, 0).sum() == 1  # asked for, so there is one


def test_the_split_has_successes_and_failures_in_proportion():
    outcomes = [True] * 10 + [False] * 20 + [None]
    chosen = held_out.split(NAMES[:31], 0.2, 3, outcomes)
    assert (chosen[:10].sum(), chosen[10:30].sum(), chosen[30]) == (2, 4, False)  # the only one of a kind is trained on
    few = held_out.split(NAMES[:20], 0.1, 3, [True] * 2 + [False] * 18)
    assert (few[:2].sum(), few[2:].sum()) == (1, 1)


def test_an_episode_that_is_added_moves_at_most_one_other():
    before = held_out.split(NAMES[:-1], 0.25, 0)
    assert (held_out.split(NAMES, 0.25, 0)[:-1] != before).sum() <= 1


def test_the_place_of_the_files_does_not_matter(tmp_path):
    (tmp_path / "one").mkdir()
    write(tmp_path / "one", 9)
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "two")
    parts = [
        held_out.divide(open_episodes(path), path, 0.4, 3) for path in (tmp_path / "one", tmp_path / "elsewhere/two")
    ]
    assert parts[0].lengths.tolist() == parts[1].lengths.tolist()
    assert held_out.names_within(open_episodes(tmp_path / "one"), tmp_path / "one")[4] == "episode_000004.hdf5"


def test_a_part_reads_its_own_episodes(tmp_path):
    """Through the store of training, too, with pictures that are read on demand and final observations."""
    (tmp_path / "data").mkdir()
    whole = open_episodes(write(tmp_path / "data", 7, camera=True))
    part = held_out.divide(whole, tmp_path / "data", 0.3, 0)
    assert isinstance(part, EpisodeSource)
    numbers = [[int(each.episode(k).actions[0, 0]) for k in range(each.num_episodes)] for each in (part, part.rest)]
    assert sorted(numbers[0] + numbers[1]) == list(range(7))
    assert len(numbers[1]) == 2
    store = windows.open_store(part, memory_bytes=0)
    np.testing.assert_array_equal(store.lengths, [5 + number for number in numbers[0]])
    for place, number in enumerate(numbers[0]):
        assert store.info(place).success == (number % 2 == 0)
        assert (store.take("images/top", store.starts[[place]]) == number).all()
        assert store.has_final[place] == (number % 3 == 0)
        if number % 3 == 0:
            assert store.final(place, "state").tolist() == [100 + number] * 2
    with pytest.raises(IndexError, match=r"not in 0\.\.1"):
        part.rest.info(2)


@pytest.mark.reference
@pytest.mark.parametrize(
    "name",
    [
        "lerobot-v3.0/aloha_image",
        "lerobot-v2.1/libero_image",
        "h5-robomimic/low_dim.hdf5",
        "h5-droid",
        "h5-aloha/sim_raw",
    ],
)
def test_every_format_can_be_divided(shared, name):
    path = shared / "data" / name
    whole = open_episodes(path)
    part = held_out.divide(whole, path, 0.34, 0)
    assert part.num_episodes + part.rest.num_episodes == whole.num_episodes
    assert part.rest.num_episodes == max(1, round(0.34 * whole.num_episodes))
    assert len(set(held_out.names_within(whole, path))) == whole.num_episodes
    first = part.rest.episode(0)
    np.testing.assert_array_equal(windows.open_store(part.rest).actions[: len(first)], first.actions)
    assert part.fps == whole.fps
    assert part.cameras == whole.cameras


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (3, 0.9)])
def test_no_episode_to_train_on_is_refused(tmp_path, count, fraction):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=rf"data: validation_fraction=.* hold out {count} of {count} episodes"):
        held_out.divide(open_episodes(write(tmp_path / "data", count)), tmp_path / "data", fraction, 0)


def test_a_run_trains_on_the_others_alone(tmp_path):
    """Batches, statistics and the record of the data are of the training part, of each of several sets."""
    sets = [tmp_path / "a", tmp_path / "b"]
    for folder, count in zip(sets, (4, 10), strict=True):
        folder.mkdir()
        write(folder, count)
    config = two_sets(tmp_path, sets)
    sources = prior_data.open_sets(config)
    kept = prior_data.held_out_of(sources)
    assert [each.num_episodes for each in sources] == [3, 7]
    assert [each.num_episodes for each in kept] == [1, 3]
    trainer = setup.make_trainer(config)
    assert trainer.loader.contents()["episodes"] == 10
    unseen = {
        (place, float(each.episode(k).actions[0, 0]))
        for place, each in enumerate(kept)
        for k in range(each.num_episodes)
    }
    mixture = prior_data.open_mixture(config, sources)
    rows = np.concatenate([store.actions[:, 0] for store in mixture.stores])
    np.testing.assert_allclose(trainer.norm_stats["actions"].mean, rows.mean(), rtol=1e-5)
    seen = {(place, float(value)) for place, store in enumerate(mixture.stores) for value in np.unique(store.actions)}
    assert not seen & unseen
    assert len(seen | unseen) == 14
    trainer.parts.lock.release()
    everything = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=0.0))
    assert not prior_data.held_out_of(prior_data.open_sets(everything))
    others = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_seed=1))
    assert [each.lengths.tolist() for each in prior_data.open_sets(others)] != [
        each.lengths.tolist() for each in sources
    ]


def two_sets(tmp_path, sets):
    return TrainConfig(
        run_dir=str(tmp_path / "runs"),
        policy=PolicyConfig(kind="mlp_flow", action_horizon=3, hidden_dims=(16,)),
        agent=AgentConfig(critic=CriticConfig(num_critics=2, hidden_dims=(16,)), best_of_n_samples=3, flow_steps=2),
        data=DataConfig(
            path=tuple(map(str, sets)), batch_size=8, action_normalization="z_score", validation_fraction=0.3
        ),
        offline_steps=2,
        online_steps=0,
    )
