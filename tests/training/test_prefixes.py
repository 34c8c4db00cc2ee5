"""A frozen backbone's prefixes, read back: the same numbers, computed once, within a budget."""

import dataclasses

import jax
import numpy as np
import pytest

from acrlpd.agents.config import AgentConfig, TemperatureConfig
from acrlpd.config import DataConfig, PolicyConfig, TrainConfig
from acrlpd.data.formats import hdf5
from acrlpd.models.critic import CriticConfig
from acrlpd.training import prefixes, setup
from acrlpd.training.metrics import read_jsonl
from acrlpd.types import Episode, FinalObservation


@pytest.fixture
def frozen(tmp_path):
    """A run of a tiny pi0 with one camera whose backbone does not change."""
    rng = np.random.default_rng(0)
    for number in range(2):
        path = hdf5.episode_path(tmp_path / "data", number)
        path.parent.mkdir(exist_ok=True)
        episode = Episode(
            state=rng.normal(size=(7, 4)).astype(np.float32),
            actions=rng.uniform(-1, 1, size=(7, 2)).astype(np.float32),
            rewards=np.where(np.arange(7) == 6, 0.0, -1.0).astype(np.float32),
            terminals=(np.arange(7) == 6) & (number == 0),
            task="push the button",
            task_changes=((3, "pull it"),) if number else (),
            images={"top": rng.integers(0, 256, (7, 16, 16, 3), np.uint8)},
            final=FinalObservation(np.ones(4, np.float32), {"top": np.full((16, 16, 3), 200, np.uint8)}),
        )
        hdf5.write_episode(path, episode)
    return TrainConfig(
        name="stored",
        run_dir=str(tmp_path / "runs"),
        policy=PolicyConfig(
            action_horizon=3,
            paligemma_variant="nano",
            action_expert_variant="nano_expert",
            vision_variant="nano",
            max_token_len=12,
            image_size=16,
            dtype="float32",
            remat=False,
            freeze_pi0_backbone=True,
        ),
        agent=AgentConfig(critic=CriticConfig(num_critics=2, hidden_dims=(8,)), best_of_n_samples=2, flow_steps=1),
        data=DataConfig(path=str(tmp_path / "data"), batch_size=4, action_normalization="z_score"),
        offline_steps=3,
        online_steps=0,
        log_frequency=1,
        save_frequency=3,
    )


def implicit(config):
    agent = dataclasses.replace(config.agent, target="implicit", temperature=TemperatureConfig(adaptive=False))
    return dataclasses.replace(config, agent=agent)


@pytest.mark.slow
@pytest.mark.parametrize("target", [lambda config: config, implicit])
def test_a_run_with_stored_prefixes_is_the_run_without(frozen, tmp_path, target):
    frozen = target(frozen)
    without = dataclasses.replace(frozen, name="without", data=dataclasses.replace(frozen.data, prefix_bytes=0))
    trainers = [setup.make_trainer(config) for config in (frozen, without)]
    stored, computed = (trainer.loader.batch(0).observations for trainer in trainers)
    assert (stored.images, computed.prefix) == ({}, None)
    assert computed.images
    for trainer in trainers:
        trainer.train()
    for one, other in zip(*(read_jsonl(setup.run_files(each.config).metrics) for each in trainers), strict=True):
        for name in one:
            if name.startswith("train/"):
                np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)
    pairs = zip(*(jax.tree.leaves(trainer.agent.params) for trainer in trainers), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)

    (made,) = (tmp_path / "runs" / "prefixes").iterdir()
    written = [(path.name, path.stat().st_mtime_ns) for path in sorted(made.iterdir())]
    again = setup.make_trainer(frozen, resume=True)
    np.testing.assert_array_equal(again.loader.batch(0).observations.prefix[0], stored.prefix[0])
    assert written == [(path.name, path.stat().st_mtime_ns) for path in sorted(made.iterdir())]

    agent, stats = again.agent, again.norm_stats
    key = prefixes.key(frozen, agent, stats, tmp_path / "data")
    assert key == made.name
    other_weights = dataclasses.replace(agent, frozen=jax.tree.map(lambda x: x + 1, agent.frozen))
    hdf5.episode_path(tmp_path / "data", 0).touch()
    assert len({key, prefixes.key(frozen, agent, stats, tmp_path / "data")}) == 2
    assert prefixes.key(frozen, other_weights, stats, tmp_path / "data") != prefixes.key(
        frozen, agent, stats, tmp_path / "data"
    )


def test_critics_alone_read_stored_features_of_any_backbone(frozen, tmp_path, monkeypatch):
    """However small the budget, and although the backbone will change: it does not while critics train alone."""
    config = dataclasses.replace(
        frozen,
        policy=dataclasses.replace(frozen.policy, freeze_pi0_backbone=False),
        data=dataclasses.replace(frozen.data, prefix_bytes=0),
        critic_alone_steps=2,
    )
    trainer = setup.make_trainer(config)
    untouched = jax.tree.map(np.array, trainer.agent.params["policy"])
    monkeypatch.setattr(prefixes, "are_features_of_use", lambda *_: False)
    plain = setup.make_trainer(dataclasses.replace(config, name="without"))
    stored, computed = (each.loader.batch(0, critic_alone=True).observations for each in (trainer, plain))
    assert (stored.images, computed.prefix) == ({}, None)
    assert stored.prefix[1:] == (None, None)
    (made,) = (tmp_path / "runs" / "prefixes").iterdir()
    assert [path.name for path in sorted(made.iterdir())] == ["0.bin", "arrays.json"]
    assert len(trainer.loader._features[0].arrays[0]) == 14 + 2  # every row, and every final observation
    for each in (trainer, plain):
        each.train()
    records = [
        [record for record in read_jsonl(setup.run_files(each.config).metrics) if "train/q_mean" in record]
        for each in (trainer, plain)
    ]
    assert ["train/bc_loss" in record for record in records[0]] == [False, False, True]
    for one, other in zip(*records, strict=True):
        for name in one:
            if name.startswith("train/"):
                np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), trainer.agent.params["policy"], untouched)
    assert any(jax.tree.leaves(moved))  # by the third update


@pytest.mark.parametrize("prefix_bytes", [2**30, 1000])
def test_an_implicit_target_reads_features_alone_after_the_chunk(frozen, tmp_path, prefix_bytes):
    """Whole prefixes at s where they fit the budget, pictures where they do not; at s' pooled features either way."""
    config = implicit(dataclasses.replace(frozen, data=dataclasses.replace(frozen.data, prefix_bytes=prefix_bytes)))
    trainer = setup.make_trainer(config)
    without = dataclasses.replace(config, name="without", data=dataclasses.replace(config.data, prefix_bytes=0))
    stored, computed = trainer.loader.batch(0), setup.make_trainer(without).loader.batch(0)
    assert (stored.next_observations.images, stored.next_observations.prefix[1:]) == ({}, (None, None))
    assert (stored.observations.prefix is None) == bool(stored.observations.images) == (prefix_bytes == 1000)
    encode, policy = prefixes._encoder(trainer.agent, features_alone=True)
    expected = encode(policy, computed.next_observations)[0]
    np.testing.assert_allclose(stored.next_observations.prefix[0], expected, rtol=1e-4, atol=1e-5)
    online = trainer.loader.batch(0, online=True)
    assert (online.observations.prefix, online.next_observations.prefix) == (None, None)

    moved = dataclasses.replace(trainer.agent, params=jax.tree.map(lambda x: x + 1, trainer.agent.params))
    keys = [prefixes.key(config, each, trainer.norm_stats, tmp_path / "data", True) for each in (trainer.agent, moved)]
    assert keys[0] == keys[1]  # what encodes is frozen, so a resumed run finds its features


def test_a_store_that_was_cut_short_is_refused(frozen, tmp_path):
    setup.make_trainer(frozen)
    (made,) = (tmp_path / "runs" / "prefixes").iterdir()
    with (made / "0.bin").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(ValueError, match=r"0\.bin: expected \d+ bytes of stored prefixes, found 8: delete"):
        setup.make_trainer(dataclasses.replace(frozen, name="again"))


def test_more_than_the_budget_is_not_stored(frozen, tmp_path, caplog):
    small = dataclasses.replace(frozen, data=dataclasses.replace(frozen.data, prefix_bytes=1000))
    with caplog.at_level("INFO"):
        trainer = setup.make_trainer(small)
    assert trainer.loader.batch(0).observations.prefix is None
    assert not (tmp_path / "runs" / "prefixes").exists()
    assert "data.prefix_bytes allows" in caplog.text


def test_prefixes_of_what_still_changes_are_not_stored(frozen):
    assert prefixes.is_legal(frozen)
    moving = dataclasses.replace(frozen.policy, freeze_pi0_backbone=False)
    assert not prefixes.is_legal(dataclasses.replace(frozen, policy=moving))
