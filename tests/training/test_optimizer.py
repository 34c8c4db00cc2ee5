import jax.numpy as jnp
import numpy as np
import optax
import pytest

from acrlpd.config import CosineDecaySchedule, OptimizerConfig, OptimizersConfig
from acrlpd.training.optimizer import make_optimizer, make_optimizers, make_schedule

SCHEDULES = {
    "cosine_default": CosineDecaySchedule(),
    "cosine_short": CosineDecaySchedule(warmup_steps=10, peak_lr=1e-3, decay_steps=100, decay_lr=1e-4),
    "rsqrt_default": CosineDecaySchedule(warmup_steps=1000, peak_lr=5e-5, rsqrt_timescale=10_000),
    "cosine_pi05_libero": CosineDecaySchedule(warmup_steps=10_000, peak_lr=5e-5, decay_steps=1_000_000, decay_lr=5e-5),
}


@pytest.mark.golden
def test_learning_rates_are_openpis(shared):
    with np.load(shared / "golden/functions.npz") as file:
        arrays = {name.removeprefix("schedule/"): file[name] for name in file.files if name.startswith("schedule/")}
    assert {name.split("/")[0] for name in arrays} == SCHEDULES.keys()
    for name, config in SCHEDULES.items():
        ours = [make_schedule(config)(step) for step in arrays[f"{name}/steps"].tolist()]
        np.testing.assert_allclose(ours, arrays[f"{name}/lr"], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),  # peak / (warmup + 1)
        (3, 1.0),  # the peak
        (8, 0.55),  # half of the cosine's way from step 3 to step 13
        (13, 0.1),
        (1000, 0.1),
    ],
)
def test_schedule_by_hand(step, expected):
    config = CosineDecaySchedule(warmup_steps=3, peak_lr=1.0, decay_steps=13, decay_lr=0.1)
    np.testing.assert_allclose(make_schedule(config)(step), expected, rtol=1e-6)


def test_first_step_by_hand():
    """Adam's first step is the sign of the clipped gradient, scaled by g / (g + eps); decay is beside it."""
    config = OptimizerConfig(
        CosineDecaySchedule(warmup_steps=0, peak_lr=0.1, decay_steps=10, decay_lr=0.1),
        eps=1.0,
        weight_decay=0.5,
        clip_gradient_norm=1.0,
    )
    optimizer = make_optimizer(config)
    params, gradient = jnp.array([2.0, -4.0]), jnp.array([3.0, -4.0])  # of norm 5, so clipped to 0.6 and -0.8
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates, [-0.1 * (0.6 / 1.6 + 0.5 * 2), 0.1 * (0.8 / 1.8 + 0.5 * 4)], rtol=1e-5)


def test_small_gradients_are_not_scaled_up():
    config = OptimizerConfig(eps=1.0, clip_gradient_norm=10.0, weight_decay=0.0)
    optimizer = make_optimizer(config)
    params, gradient = jnp.zeros(1), jnp.array([0.5])
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates, [-make_schedule(config.schedule)(0) * 0.5 / 1.5], rtol=1e-5)


def test_moments_lie_where_openpis_checkpoint_has_them():
    """``[None, [{count, mu, nu}, None, {count}]]``, since the chain of optimisers is openpi's."""
    state = make_optimizer(OptimizerConfig()).init({"w": jnp.zeros(2)})
    clip, (adam, decay, schedule) = state
    assert isinstance(clip, optax.EmptyState)
    assert isinstance(decay, optax.EmptyState)
    assert {"count", "mu", "nu"} <= set(adam._fields)
    assert schedule._fields == ("count",)


def test_every_group_has_its_own():
    assert set(make_optimizers(OptimizersConfig())) == {"policy", "critic", "temperature"}
