"""pi0-FAST from a checkpoint of openpi's layout to a robot's actions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from acrlpd import deploy
from acrlpd.data.view import normalize
from acrlpd.data.view.fast_tokenizer import FastPromptTokenizer, FastTokenizer, TokenizeFast
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.robots.mapping import before_normalization, fast_cameras
from acrlpd.data.view.transforms import Normalize, ResizeImages, to_observation
from acrlpd.models import weights
from acrlpd.models.pi0_fast import Pi0FastConfig
from acrlpd.serving.policy import Draws, TokenSampler

HORIZON, PROMPTS = 5, ("open the drawer", "push the plate")
MODEL = Pi0FastConfig(
    action_dim=7,
    action_horizon=HORIZON,
    max_token_len=90,
    paligemma_variant="nano",
    vision_variant="nano",
    vocab_size=1024,
    cameras=fast_cameras("libero"),
    dtype="float32",
    remat=False,
)


def observations():
    """One of each prompt, with the actions to learn."""
    rng = np.random.default_rng(0)
    chunks = rng.uniform(-1, 1, (2, HORIZON, 7))
    return [
        {
            "observation/state": rng.uniform(-0.5, 0.5, 8).astype(np.float32),
            "observation/image": rng.integers(0, 255, (64, 64, 3), np.uint8),
            "observation/wrist_image": rng.integers(0, 255, (64, 64, 3), np.uint8),
            "prompt": prompt,
            "actions": actions,
        }
        for prompt, actions in zip(PROMPTS, chunks, strict=True)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with ``params``, ``assets`` and ``fast``: a tiny model that knows two chunks by heart."""
    folder = tmp_path_factory.mktemp("fast")
    examples = observations()
    stats = {
        "state": NormStats(np.zeros(8), np.ones(8), -np.ones(8), np.ones(8)),
        "actions": NormStats(np.zeros(7), np.ones(7), -2 * np.ones(7), 2 * np.ones(7)),
    }
    fast = FastTokenizer.fit(np.stack([example["actions"] for example in examples]), vocab_size=256)
    fast.save(folder / "fast")
    text = FastPromptTokenizer(
        fast, action_horizon=HORIZON, action_dim=7, max_length=MODEL.max_token_len, vocab_size=MODEL.vocab_size
    )
    steps = [
        *before_normalization("libero", [0], pi05=False, fast=True),
        *(Normalize(stats, quantiles=True), ResizeImages(64, 64), TokenizeFast(text)),
    ]
    batch = []
    for example in examples:
        data = example
        for step in steps:
            data = step(data)
        batch.append(to_observation(data))
    batch += [one_further(row) for row in batch]
    weights.write_params(folder / "params", train(jax.tree.map(lambda *rows: jnp.stack(rows), *batch)))
    normalize.save(folder / "assets" / "libero" / normalize.FILE_NAME, stats)
    return folder


def one_further(observation):
    """With a gap before the actions: where openpi decodes them, one position behind where it trains them.

    A released model does not mind; one that learned two texts by heart does.
    """
    gap = int(np.argmax(observation.token_ar_mask))
    fields = ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask")
    moved = {name: np.insert(getattr(observation, name), gap, 0)[:-1] for name in fields}
    moved["token_loss_mask"][gap + 1] = False  # what follows the prompt is not said from the gap
    return dataclasses.replace(observation, **moved)


def train(observation):
    graphdef, params = nnx.split(MODEL.create(nnx.Rngs(0)))
    optimizer = optax.adam(2e-3)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, moments = carry
            mean_loss = lambda p: nnx.merge(graphdef, p).compute_loss(jax.random.key(0), observation).mean()  # noqa: E731
            loss, gradient = jax.value_and_grad(mean_loss)(params)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(params, updates), moments), loss

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=400)
        return params, losses[-1]

    params, loss = run(params)
    assert loss < 0.01
    return nnx.merge(graphdef, params)


def options(folder, **changes):
    given = {"robot": "libero", "action_horizon": HORIZON, "max_token_len": MODEL.max_token_len, "delta_mask": (0,)}
    return deploy.OpenPIOptions(**(given | {"fast_tokenizer": str(folder / "fast"), "dtype": "float32"} | changes))


def test_a_robot_gets_the_chunk_that_was_learned(checkpoint):
    """Through recognition, tokens both ways and normalization; two at once get what each gets alone."""
    policy = deploy.openpi_policy(checkpoint, options(checkpoint), deploy.ActingOptions())
    asked = [{key: value for key, value in each.items() if key != "actions"} for each in observations()]
    together = policy.infer_batch([policy.prepare(each) for each in asked], size=4)
    for example, obs, answer in zip(observations(), asked, together, strict=True):
        assert answer["actions"].shape == (HORIZON, 7)
        np.testing.assert_allclose(answer["actions"], example["actions"], atol=0.2)  # quantized in tenths of 2
        np.testing.assert_array_equal(policy.infer(obs)["actions"], answer["actions"])


def test_each_request_draws_from_its_own_key(checkpoint):
    """At a temperature, whoever else is in the batch; the tokens are openpi's for that key and one observation."""
    model = MODEL.create(nnx.Rngs(1))
    sampler = TokenSampler(model, temperature=1.0, max_decoding_steps=6)
    policy = deploy.openpi_policy(checkpoint, options(checkpoint), deploy.ActingOptions())
    asked = [{key: value for key, value in each.items() if key != "actions"} for each in observations()]
    rows = [policy.prepare(each).observation for each in asked]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    keys = np.array([[0, 5], [0, 6]], np.uint32)
    tokens, _ = sampler(stacked, Draws(keys), sampler.plan)
    for k, row in enumerate(rows):
        alone = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], row)
        expected = model.sample_actions(jax.random.key(5 + k), alone, max_decoding_steps=6, temperature=1.0)
        np.testing.assert_array_equal(tokens[k], expected[0])
    assert not np.array_equal(tokens[0], tokens[1])


@pytest.mark.parametrize(
    ("changes", "acting", "message"),
    [
        ({"fast_tokenizer": None}, {}, "physical-intelligence/fast: --fast_tokenizer"),
        ({}, {"num_steps": 5, "real_time": True}, "leave out num_steps, real_time"),
        ({}, {"latency_budget_ms": 50.0}, "leave out latency_budget_ms"),
        ({"temperature": -1.0}, {}, "temperature must be"),
        ({"action_horizon": 0}, {}, "action_horizon must be a whole number of at least 1, got 0"),
        ({"max_token_len": 0}, {}, "max_token_len must be a whole number of at least 1 or None, got 0"),
        ({"max_token_len": -1}, {}, "max_token_len must be a whole number of at least 1 or None, got -1"),
        ({"delta_mask": (6, -2)}, {}, "delta_mask names 8 dimensions, but state and actions have 8 and 7"),
    ],
)
def test_options_that_do_not_fit_are_refused(checkpoint, changes, acting, message):
    with pytest.raises(ValueError, match=message):
        deploy.openpi_policy(checkpoint, options(checkpoint, **changes), deploy.ActingOptions(**acting))


def test_a_flow_policy_has_no_action_tokens(checkpoint, shared):
    arrays = shared / "golden" / "pi0_params.npz"
    with pytest.raises(ValueError, match="leave out --fast_tokenizer"):
        deploy.openpi_policy(arrays, options(checkpoint), deploy.ActingOptions())
