"""Two arrays, rows or numbers that change places make another checksum, wherever the arrays lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd.training import checksum

DTYPES = (np.float32, np.int32, np.uint8, np.bool_, jnp.bfloat16)


def of(tree):
    return checksum.of_arrays({"all": tree})["all"]


def tree_of(seed):
    rng = np.random.default_rng(seed)
    return {
        "layer": {str(k): jnp.asarray(rng.integers(0, 2, (4, 6)) + k, dtype) for k, dtype in enumerate(DTYPES)},
        "scalar": jnp.asarray(rng.normal(), jnp.float32),
        "like": [jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for _ in range(2)],
    }


@given(st.integers(0, 100), st.data())
@settings(max_examples=60, deadline=None)
def test_two_elements_in_each_others_place(seed, data):
    tree = tree_of(seed)
    places = [(path, *index) for path in (0, 1) for index in np.ndindex(4, 6)]
    one, other = (data.draw(st.sampled_from(places)) for _ in range(2))
    arrays = [np.array(array) for array in tree["like"]]
    arrays[one[0]][one[1:]], arrays[other[0]][other[1:]] = arrays[other[0]][other[1:]], arrays[one[0]][one[1:]]
    exchanged = {**tree, "like": [jnp.asarray(array) for array in arrays]}
    assert (of(exchanged) == of(tree)) == (one == other)


@given(st.integers(0, 100), st.sampled_from(range(len(DTYPES))), st.integers(0, 23), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_any_bit(seed, kind, place, bit):
    tree = tree_of(seed)
    array = np.array(tree["layer"][str(kind)])
    if array.dtype == np.bool_:
        array.ravel()[place] ^= True
    else:
        array.view(np.uint8).ravel()[place] ^= np.uint8(1 << bit)
    assert of({**tree, "layer": tree["layer"] | {str(kind): jnp.asarray(array)}}) != of(tree)


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_that_change_places(axis):
    rows = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    assert len({of([jnp.roll(rows, shift, axis)]) for shift in range(4)}) == 4
    assert of([rows]) != of([-rows]) != of([rows.T])


def test_arrays_of_one_shape_that_change_places_and_names():
    one, other = jnp.zeros(5), jnp.ones(5)
    found = [of({"a": one, "b": other}), of({"a": other, "b": one}), of({"a": one, "c": other})]
    assert len(set(found)) == 3


def test_zeros_are_told_apart_by_their_number():
    assert of([jnp.zeros(5)]) != of([jnp.zeros(6)]) != of([])


def test_how_arrays_are_spread_makes_no_difference():
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    specs = (jax.P(), jax.P("devices"), jax.P(None, "devices"))
    spread = [jax.device_put(rows, jax.NamedSharding(mesh, spec)) for spec in specs]
    assert {of([each]) for each in spread} == {of([rows])}
