from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acrlpd.models import images


@pytest.mark.golden
def test_resize_with_pad_is_openpis(golden):
    arrays = golden.group("functions", "resize/")
    numbers = {key.split("/")[0] for key in arrays}
    assert numbers
    for number in numbers:
        pixels, (height, width) = jnp.asarray(arrays[f"{number}/in_u8"]), map(int, arrays[f"{number}/size"])
        as_bytes = images.resize_with_pad(pixels, height, width)
        # A value halfway between two levels goes up or down with the last bit of the compiler's sum.
        off = np.abs(np.asarray(as_bytes, int) - arrays[f"{number}/out_u8"])
        assert off.max() <= 1
        assert off.mean() < 1e-3
        as_floats = images.resize_with_pad(images.to_float(pixels), height, width)
        np.testing.assert_allclose(as_floats, arrays[f"{number}/out_f32"], atol=1e-5)


@pytest.mark.golden
def test_augment_is_openpis(golden, jit):
    """Needs the draws of augmax 0.4.1 for the key that the golden file was made with."""
    arrays = golden.group("functions", "augment/in/")
    cameras = {name: jnp.asarray(camera) for name, camera in arrays.items()}
    augmented = jit(images.augment)(jax.random.key(11), cameras)
    for name, expected in golden.group("functions", "augment/out/").items():
        np.testing.assert_allclose(augmented[name], expected, atol=1e-5)


def test_to_float():
    pixels = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(images.to_float(pixels).ravel(), [-1, -0.6, 1], atol=1e-6)
    floats = jnp.zeros((1, 1, 1, 3))
    assert images.to_float(floats) is floats


def test_smaller_half_of_odd_padding_is_on_top():
    """A white 2x4 image in a 5x4 frame: three black rows, one above and two below."""
    padded = images.resize_with_pad(jnp.ones((1, 2, 4, 3)), 5, 4)
    np.testing.assert_array_equal(padded[0, :, 0, 0], [-1, 1, 1, -1, -1])
    padded = images.resize_with_pad(jnp.full((1, 4, 2, 3), 255, jnp.uint8), 4, 5)
    np.testing.assert_array_equal(padded[0, 0, :, 0], [0, 255, 255, 0, 0])


def test_image_of_the_right_size_is_returned_untouched():
    pixels = jnp.full((1, 3, 5, 3), 7.0)  # outside [-1, 1]: even clipping is skipped
    assert images.resize_with_pad(pixels, 3, 5) is pixels


@pytest.mark.parametrize(
    ("amount", "expected"),
    [(-0.25, [0.0, 0.375, 0.75]), (0.25, [0.25, 0.625, 1.0]), (0.0, [0.0, 0.5, 1.0])],
)
def test_adjust_brightness(amount, expected):
    value = jnp.array([[0.0, 0.5, 1.0]])
    np.testing.assert_allclose(images.adjust_brightness(value, jnp.float32(amount)), [expected])


@pytest.mark.parametrize("amount", [-0.4, -0.1, 0.0, 0.3])
def test_adjust_contrast_keeps_black_gray_and_white(amount):
    value = jnp.linspace(0, 1, 101)[None]
    adjusted = images.adjust_contrast(value, jnp.float32(amount))
    np.testing.assert_allclose(adjusted[0, jnp.array([0, 50, 100])], [0, 0.5, 1], atol=1e-6)
    slopes = np.diff(np.asarray(adjusted[0])) * 100
    slope = np.tan((amount + 1) * np.pi / 4)
    np.testing.assert_allclose(slopes[[0, 49, 99]], [1 / slope, slope, 1 / slope], rtol=1e-3)


def test_wrist_cameras_of_a_sample_share_their_jitter_and_samples_do_not(jit):
    """Same picture everywhere: the two wrists agree, the base differs, and of 8 samples some are left as they were."""
    picture = jax.random.uniform(jax.random.key(0), (12, 12, 3), minval=-1.0)
    batch = jnp.broadcast_to(picture[None], (8, 12, 12, 3))
    cameras = {"base": batch, "left_wrist": batch, "right_wrist": batch}
    augmented = jit(images.augment)(jax.random.key(1), cameras)
    np.testing.assert_array_equal(augmented["left_wrist"], augmented["right_wrist"])
    assert not np.allclose(augmented["base"], augmented["left_wrist"])
    untouched = [np.allclose(sample, picture, atol=1e-5) for sample in augmented["left_wrist"]]
    assert 0 < sum(untouched) < 8


def test_colour_jitter_keeps_saturation(jit):
    """Saturation is (max - min) / max of a pixel; brightness and contrast act on the value, hue on neither."""
    picture = jax.random.uniform(jax.random.key(0), (6, 6, 3), minval=0.2, maxval=0.8)
    jittered = jit(jax.vmap(images.color_jitter, in_axes=(0, None)))(jax.random.split(jax.random.key(1), 8), picture)

    def saturation(image):
        return 1 - image.min(-1) / image.max(-1)

    changed = [sample for sample in np.asarray(jittered) if not np.allclose(sample, picture, atol=1e-6)]
    assert changed
    for sample in changed:
        np.testing.assert_allclose(saturation(sample), saturation(np.asarray(picture)), atol=1e-4)
