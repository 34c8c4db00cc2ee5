"""Training, acting, serving and exporting on the data of openpi's robots: one mapping for all, and its inverse."""

import dataclasses

import jax
import numpy as np
import pytest

from acrlpd import deploy
from acrlpd.agents import agent as agent_module
from acrlpd.config import PolicyConfig, TrainConfig
from acrlpd.data import statistics
from acrlpd.data.formats import hdf5
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.view import normalize
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.robots import aloha, mapping
from acrlpd.data.view.transforms import Normalize
from acrlpd.deploy import export as deploy_export
from acrlpd.presets import NANO, get_preset
from acrlpd.serving import export
from acrlpd.training import build, loading, memory, setup
from acrlpd.training.evaluate import chunk_policy
from acrlpd.types import Episode

IDENTITY = NormStats(np.zeros(14), np.full(14, 1 - normalize.EPSILON))


def with_robot(config: TrainConfig, robot: str | None, *, kind: str = "mlp_flow", **data) -> TrainConfig:
    policy = config.policy
    if kind != "mlp_flow":
        policy = PolicyConfig(kind=kind, action_horizon=5, action_dim=32, image_size=56, max_token_len=48)
    if kind == "pi05":
        data["action_normalization"] = "quantile"
    found = dataclasses.replace(config.data, robot=robot, batch_size=2, sequence_ratio=1.0, **data)
    return dataclasses.replace(config, policy=policy, data=found)


def first_batch(config, stats, state, actions, images):
    """A batch of chunks that all begin at the first row of one episode, as a run makes it; and the way back."""
    episode = Episode(
        state=np.repeat(state[None], len(actions), axis=0).astype(np.float32),
        actions=actions.astype(np.float32),
        rewards=np.zeros(len(actions), np.float32),
        terminals=np.zeros(len(actions), bool),
        task="lift",
        images={name: np.repeat(image[None], len(actions), axis=0) for name, image in images.items()},
    )
    transform = setup.make_transform(config, stats, setup.Dims(state.shape[-1], actions.shape[-1]))
    store = EpisodeStore.from_episodes([episode])
    horizon = len(actions)
    loader = ChunkLoader(store, transform, batch_size=2, horizon=horizon, sequence_ratio=1.0, seed=0, prefetch=0)
    batch = loader.batch(0)
    back = transform.inverse({"state": batch.observations.state, "actions": batch.actions})["actions"]
    np.testing.assert_allclose(back[1], actions, atol=1e-5)
    return batch


def visible(observation):
    return {camera: mask.tolist() for camera, mask in observation.image_masks.items()}


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_batch_of_libero_is_openpis(tiny_config, shared, kind):
    """Of openpi's own call: its observation, its statistics, its answer as the data's actions."""
    call = np.load(shared / f"golden/{kind}_policy.npz")
    stats = normalize.load(shared / f"golden/{kind}_policy_norm_stats.json")
    config = with_robot(tiny_config, "libero", kind=kind, delta_mask=(6, -1) if kind == "pi05" else None)
    images = {"image": call["observation/image"], "wrist_image": call["observation/wrist_image"]}
    state, actions = call["observation/state"], call["actions"]
    sizes = {"action_horizon": len(actions), "image_size": len(images["wrist_image"])}
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, **sizes))
    batch = first_batch(config, stats, state, actions, images)
    deltas = actions - np.append(state[:6], 0.0)[None]
    for found, raw, key in (
        (batch.observations.state[0], state, "state"),
        (batch.next_observations.state[0], state, "state"),
        (batch.actions[0], deltas, "actions"),
    ):
        each = stats[key]
        by_hand = (
            (raw - each.q01) / (each.q99 - each.q01 + 1e-6) * 2 - 1
            if kind == "pi05"
            else (raw - each.mean) / (each.std + 1e-6)
        )
        np.testing.assert_allclose(found[..., : raw.shape[-1]], by_hand, rtol=1e-5, atol=1e-5)
        assert found.shape[-1] == 32
        assert not found[..., raw.shape[-1] :].any()
    np.testing.assert_array_equal(batch.observations.images["left_wrist_0_rgb"][0], images["wrist_image"])
    assert visible(batch.observations) == {
        "base_0_rgb": [True] * 2, "left_wrist_0_rgb": [True] * 2, "right_wrist_0_rgb": [False] * 2
    }  # fmt: skip


@pytest.mark.golden
def test_a_batch_of_aloha_is_openpis(tiny_config, shared):
    arrays = np.load(shared / "golden/functions.npz")
    picture = np.full((56, 56, 3), 7, np.uint8)
    images = {"cam_high": picture, "cam_right_wrist": picture + 1}
    config = with_robot(tiny_config, "aloha", kind="pi0")
    stats = {"state": IDENTITY, "actions": IDENTITY}
    state, actions = arrays["aloha/adapt_state"], arrays["aloha/adapt_actions"]
    relative = actions - np.where(aloha.DELTA_MASK, state, 0.0)[None]
    for mask, expected in ((None, relative), ((), actions)):
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, delta_mask=mask))
        batch = first_batch(changed, stats, arrays["aloha/state"], arrays["aloha/actions"], images)
        np.testing.assert_allclose(batch.observations.state[0, :14], state, atol=1e-5)
        np.testing.assert_allclose(batch.actions[0, :, :14], expected, atol=1e-5)
    assert {camera: image.max() for camera, image in batch.observations.images.items()} == {
        "base_0_rgb": 7, "left_wrist_0_rgb": 0, "right_wrist_0_rgb": 8
    }  # fmt: skip
    assert [mask[0] for mask in visible(batch.observations).values()] == [True, False, True]


def test_a_batch_of_droid(tiny_config):
    """Joint velocities stay as they are; the second view from outside is not used."""
    rng = np.random.default_rng(0)
    state, actions = rng.normal(size=8), rng.normal(size=(5, 8))
    names = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    images = {name: np.full((56, 56, 3), number, np.uint8) for number, name in enumerate(names)}
    stats = {"state": IDENTITY, "actions": IDENTITY}
    batch = first_batch(with_robot(tiny_config, "droid", kind="pi0"), stats, state, actions, images)
    np.testing.assert_allclose(batch.actions[0, :, :8], actions, atol=1e-5)
    assert {camera: image.max() for camera, image in batch.observations.images.items()} == {
        "base_0_rgb": 0, "left_wrist_0_rgb": 2, "right_wrist_0_rgb": 0
    }  # fmt: skip
    assert [mask[0] for mask in visible(batch.observations).values()] == [True, True, False]


def make_aloha(seed, state_dim=14):
    rng = np.random.default_rng(seed)
    length = 8 + seed
    return Episode(
        state=rng.uniform(0.1, 0.9, (length, state_dim)).astype(np.float32),
        actions=rng.uniform(0.1, 0.9, (length, 14)).astype(np.float32),
        rewards=-np.ones(length, np.float32),
        terminals=np.zeros(length, bool),
        task="fold",
        images={"top": rng.integers(0, 256, (length, 4, 4, 3), np.uint8)},
    )


def write_aloha(folder, state_dim=14):
    for number in range(3):
        hdf5.write_episode(hdf5.episode_path(folder, number), make_aloha(number, state_dim), {})
    return str(folder)


def test_a_run_of_aloha_acts_the_same_wherever_it_is_loaded(tiny_config, tmp_path):
    config = with_robot(tiny_config, "aloha", path=write_aloha(tmp_path / "aloha"), min_std=1e-3)
    config = dataclasses.replace(config, name="robot", offline_steps=2, save_frequency=2)
    trainer = setup.make_trainer(config)
    trainer.train()
    run = setup.run_files(config).directory
    loaded = loading.load_checkpoint(run)
    assert loaded.config.data.robot == "aloha"
    (store,) = trainer.loader._prior.stores
    seen = statistics.from_store(store, loaded.transform.before(Normalize), horizon=3)
    for key, stats in trainer.norm_stats.items():
        np.testing.assert_allclose(stats.mean, seen[key].mean, atol=1e-6)
        np.testing.assert_allclose(stats.std, seen[key].std, atol=1e-6)

    obs = {"state": store.state[3], "image": {"top": store.images["top"][np.array([3])][0]}, "prompt": "fold"}
    chunks = [
        chunk_policy(agent, transform, jax.random.key(0), mode="greedy")([obs], np.array([0]))
        for agent, transform in ((trainer.agent, trainer.parts.transform), (loaded.agent, loaded.transform))
    ]
    np.testing.assert_array_equal(*chunks)

    trained = deploy.load_trained(run)
    policy = deploy.trained_policy(trained, deploy.ActingOptions())
    client = {"state": obs["state"], "images": {"cam_high": np.moveaxis(obs["image"]["top"], -1, 0)}, "prompt": "fold"}
    answers = [policy.infer(each | {"acrlpd": {"seed": 3}})["actions"] for each in (obs, client)]
    np.testing.assert_array_equal(*answers)
    request = policy.prepare(obs)
    inputs = {
        "state": obs["state"][None],
        "tokenized_prompt": request.observation.tokenized_prompt[None],
        "tokenized_prompt_mask": request.observation.tokenized_prompt_mask[None],
        "seed": np.array([3], np.uint32),
    }
    exported = export._infer(trained.agent, deploy_export.interface(trained), jax.device_put(inputs))
    np.testing.assert_allclose(exported["actions"][0], answers[0], atol=1e-4)


def test_a_pi0_fits_the_robots_cameras_in_training_and_export(tiny_config, tmp_path):
    """By shapes alone: the data names its cameras, and the model has openpi's."""
    config = with_robot(tiny_config, "aloha", path=write_aloha(tmp_path / "aloha"))
    config = dataclasses.replace(config, policy=dataclasses.replace(NANO, action_dim=32))
    dims, stats = setup.Dims(14, 14), {"state": IDENTITY, "actions": IDENTITY}
    agent = jax.eval_shape(lambda: build.create_agent(config, dims, ("top",)))
    store = EpisodeStore.from_episodes([make_aloha(0)])
    transform = setup.make_transform(config, stats, dims)
    batch = ChunkLoader(store, transform, batch_size=2, horizon=5, sequence_ratio=1.0, seed=0, prefetch=0).batch(0)
    shapes = memory.batch_shapes(config, dims, build.model_cameras(config, ("top",)), 2)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), batch) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype.name), shapes
    )
    rng = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(agent_module._update, agent, batch, rng, config.agent.loss_weights)
    trained = deploy.Trained(agent, config, stats, ("top",), 0, None)
    interface = deploy_export.interface(trained)
    inputs = export._inputs(interface, 1)
    assert [name for name in inputs if name.startswith("image/")] == ["image/base_0_rgb"]
    found = jax.eval_shape(lambda agent, inputs: export._infer(agent, interface, inputs), agent, inputs)
    assert found["actions"].shape == (1, 5, 14)


def test_data_of_another_robot_is_refused(tiny_config, tmp_path):
    path = write_aloha(tmp_path / "other", state_dim=7)
    with pytest.raises(ValueError, match=r"other: data\.robot='aloha' needs 14 state and 14 action .* got 7 and 14"):
        setup.make_trainer(with_robot(tiny_config, "aloha", path=path))
    config = dataclasses.replace(with_robot(tiny_config, None, path=path, delta_mask=(9,)), name="relative")
    with pytest.raises(ValueError, match=r"data\.delta_mask names 9 dimensions, but state and actions have 7 and 14"):
        setup.make_trainer(config)
    with pytest.raises(ValueError, match="use 'z_score'"):
        with_robot(tiny_config, "aloha", action_normalization="bounds")
    mapping.check("aloha", (), where="here", dims=(14, 14), cameras=("top",))
    with pytest.raises(ValueError, match=r"here: .* expected a camera cam_high or top, got front\. Rename the data's"):
        mapping.check("aloha", (), where="here", dims=(14, 14), cameras=("front",))


def test_presets_of_robots_see_data_as_openpi_does():
    assert [get_preset(name).data.robot for name in ("droid", "aloha", "libero", "demo")] == [
        *("droid", "aloha", "libero"), None
    ]  # fmt: skip
