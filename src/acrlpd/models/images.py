"""Preprocessing of a model's camera images: value range, resizing with padding, augmentation in training."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy import ndimage
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from acrlpd.types import typed

CROP_SHARE = 0.95
MAX_ROTATION = math.radians(5)
BRIGHTNESS, CONTRAST, HUE = 0.3, 0.4, 0.1  # bounds of a uniform draw around 0; hue in turns
JITTER_PROBABILITY = 0.5


@typed
def to_float(images: UInt8[Array, "b y x 3"] | Float[Array, "b y x 3"]) -> Float[Array, "b y x 3"]:
    """Convert uint8 images to floats in [-1, 1]; float images are assumed to be in that range already."""
    if images.dtype != jnp.uint8:
        return images
    return images.astype(jnp.float32) / 255.0 * 2.0 - 1.0


@typed
def resize_with_pad(
    images: UInt8[Array, "b y x 3"] | Float[Array, "b y x 3"], height: int, width: int
) -> UInt8[Array, "b height width 3"] | Float[Array, "b height width 3"]:
    """Scale images to fit, keeping the aspect ratio, and pad with black; odd padding has its smaller half top and left.

    Interpolation is linear with antialiasing. Float images are expected in [-1, 1] and clipped to it. Images that have
    the right size are returned unchanged.
    """
    b, old_height, old_width, channels = images.shape
    if (old_height, old_width) == (height, width):
        return images
    ratio = max(old_width / width, old_height / height)
    new_height, new_width = int(old_height / ratio), int(old_width / ratio)
    resized = jax.image.resize(images, (b, new_height, new_width, channels), method="linear")
    is_bytes = images.dtype == jnp.uint8
    resized = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8) if is_bytes else jnp.clip(resized, -1.0, 1.0)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    padding = ((0, 0), (top, height - new_height - top), (left, width - new_width - left), (0, 0))
    return jnp.pad(resized, padding, constant_values=0 if is_bytes else -1.0)


@typed
def augment(rng: PRNGKeyArray, images: dict[str, Float[Array, "b y x 3"]]) -> dict[str, Float[Array, "b y x 3"]]:
    """Augment images in [-1, 1] as openpi does in training, with augmax 0.4.1's random numbers for the same key.

    Cameras without "wrist" in their name are cropped, scaled back and rotated; all get colour jitter. Every camera of
    a sample starts from the same key, so wrist cameras share their jitter. Nothing is clipped afterwards.
    """

    def augment_camera(name: str, camera: jax.Array) -> jax.Array:
        one = jitter_only if "wrist" in name else crop_rotate_jitter
        return jax.vmap(one)(jax.random.split(rng, camera.shape[0]), camera / 2.0 + 0.5) * 2.0 - 1.0

    return {name: augment_camera(name, camera) for name, camera in images.items()}


@typed
def jitter_only(rng: PRNGKeyArray, image: Float[Array, "y x 3"]) -> Float[Array, "y x 3"]:
    """Apply colour jitter to one image in [0, 1]; keys are split as augmax does for a chain of one transformation."""
    (chain_rng,) = jax.random.split(rng, 1)
    (jitter_rng,) = jax.random.split(chain_rng, 1)
    return color_jitter(jitter_rng, image)


@typed
def crop_rotate_jitter(rng: PRNGKeyArray, image: Float[Array, "y x 3"]) -> Float[Array, "y x 3"]:
    """Crop, resize back and rotate one image in [0, 1] at random, interpolating only once, then apply colour jitter."""
    geometry_rng, chain_rng = jax.random.split(rng, 2)
    crop_rng, _, rotate_rng = jax.random.split(geometry_rng, 3)
    (jitter_rng,) = jax.random.split(chain_rng, 1)
    return color_jitter(jitter_rng, crop_rotate(crop_rng, rotate_rng, image))


def crop_rotate(
    crop_rng: PRNGKeyArray, rotate_rng: PRNGKeyArray, image: Float[Array, "y x 3"]
) -> Float[Array, "y x 3"]:
    """Map each output pixel to its place in the input and interpolate linearly there; black outside the image."""
    size = jnp.array(image.shape[:2], jnp.float32)
    cropped = jnp.array([int(CROP_SHARE * side) for side in image.shape[:2]], jnp.float32)
    limit = (size - cropped) / 2
    centre = jax.random.uniform(crop_rng, (2,), minval=-limit, maxval=limit)
    angle = jax.random.uniform(rotate_rng, minval=-MAX_ROTATION, maxval=MAX_ROTATION)
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    middle = size / 2 - 0.5
    y, x = jnp.meshgrid(*(jnp.arange(side, dtype=jnp.float32) for side in image.shape[:2]), indexing="ij")
    y, x = y - middle[0], x - middle[1]
    zoom = cropped / size
    rows = (cos * y + sin * x) * zoom[0] + centre[0] + middle[0]
    columns = (cos * x - sin * y) * zoom[1] + centre[1] + middle[1]
    read = functools.partial(ndimage.map_coordinates, coordinates=[rows, columns], order=1, mode="constant")
    return jax.vmap(read, in_axes=-1, out_axes=-1)(image)


def color_jitter(rng: PRNGKeyArray, image: Float[Array, "y x 3"]) -> Float[Array, "y x 3"]:
    """Change brightness, contrast and hue of one image in [0, 1], either all of them or none.

    augmax 0.4.1 also draws a change of saturation and discards it; its key is split only to reproduce the others.
    """
    brightness_rng, contrast_rng, hue_rng, _, _ = jax.random.split(rng, 5)
    hue, saturation, value = _rgb_to_hsv(image)
    value = adjust_brightness(value, _uniform_around_zero(brightness_rng, BRIGHTNESS))
    value = adjust_contrast(value, _uniform_around_zero(contrast_rng, CONTRAST))
    hue = hue + _uniform_around_zero(hue_rng, HUE)
    return jnp.where(jax.random.bernoulli(rng, JITTER_PROBABILITY), _hsv_to_rgb(hue, saturation, value), image)


def _uniform_around_zero(rng: PRNGKeyArray, bound: float) -> Float[Array, ""]:
    return jax.random.uniform(rng, minval=-bound, maxval=bound)


def adjust_brightness(value: Float[Array, "y x"], amount: Float[Array, ""]) -> Float[Array, "y x"]:
    """Move the value towards black for an amount below 0, towards white for one above."""
    return jnp.where(amount < 0, value * (1 + amount), value * (1 - amount) + amount)


def adjust_contrast(value: Float[Array, "y x"], amount: Float[Array, ""]) -> Float[Array, "y x"]:
    """Apply a piecewise linear map through 0, 1/2 and 1: slope s in the middle, 1/s outside; amount 0 means s = 1."""
    slope = jnp.tan((amount + 1) * (jnp.pi / 4))
    knee = slope / (2 * (1 + slope))
    middle = slope * (value - 0.5) + 0.5
    return jnp.where(value < knee, value / slope, jnp.where(value > 1 - knee, (value - 1) / slope + 1, middle))


def _rgb_to_hsv(image: Float[Array, "y x 3"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return hue in turns, saturation and value, each [y x]."""
    value = image.max(axis=-1)
    spread = value - image.min(axis=-1)
    largest = jnp.argmax(image, axis=-1)
    after = jnp.take_along_axis(image, ((largest + 1) % 3)[..., None], axis=-1)[..., 0]
    before = jnp.take_along_axis(image, ((largest + 2) % 3)[..., None], axis=-1)[..., 0]
    is_gray, is_black = spread == 0, value == 0
    hue = jnp.where(is_gray, 0.0, (2 * largest + (after - before) / jnp.where(is_gray, 1.0, spread)) / 6)
    return hue, jnp.where(is_black, 0.0, spread / jnp.where(is_black, 1.0, value)), value


def _hsv_to_rgb(hue: Float[Array, "y x"], saturation: jax.Array, value: jax.Array) -> Float[Array, "y x 3"]:
    sector = jnp.stack([(offset + hue * 6) % 6 for offset in (5, 3, 1)], axis=-1)
    away = jnp.clip(jnp.minimum(sector, 4 - sector), 0, 1)
    return value[..., None] - (value * saturation)[..., None] * away
