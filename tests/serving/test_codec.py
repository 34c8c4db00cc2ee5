import base64
import json

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd.serving import codec

VALUES = {
    "f32_2d": np.arange(6, dtype=np.float32).reshape(2, 3),
    "u8_image": np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
    "i64_scalar_array": np.array(5),
    "f32_scalar": np.float32(1.5),
    "f64_scalar": np.float64(1.5),
    "i32_scalar": np.int32(-3),
    "bool_scalar": np.bool_(True),
    "bool_array": np.array([True, False]),
    "str_array": np.array(["asdf", "qw"]),
    "str_scalar": np.str_("asdf"),
    "nested": {"observation/state": np.array([1.0, 2.0]), "prompt": "pick up", "n": 3, "list": [1, np.float32(2)]},
    "empty": {},
}
"""What openpi packed into ``wire.json``."""


def same(ours, theirs):
    """Equal in value, dtype and shape, also inside lists and dictionaries."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, np.ndarray):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and np.array_equal(ours, theirs)
    plain = isinstance(theirs, (float, str))  # numpy's subclasses of these two come back as Python's
    return ours == theirs and (plain or type(ours) is type(theirs))


@pytest.mark.golden
def test_messages_are_openpis_byte_for_byte(shared):
    messages = json.loads((shared / "golden/wire.json").read_text())
    assert messages.keys() == VALUES.keys()
    for name, text in messages.items():
        message = base64.b64decode(text)
        assert codec.pack(VALUES[name]) == message, name
        assert same(codec.unpack(message), VALUES[name]), name


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((0, 3)),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(4, dtype=">f4"),
        np.arange(10)[::3],
        {b"key": np.float16(0.5), "key": [None, b"bytes"]},
    ],
)
def test_round_trip(value):
    assert same(codec.unpack(codec.pack(value)), value)


def test_tuples_come_back_as_lists():
    assert codec.unpack(codec.pack((1, (2,)))) == [1, [2]]


def test_decoded_arrays_are_read_only_views():
    message = codec.pack(np.arange(1000))
    array = codec.unpack(message)
    assert not array.flags.writeable
    assert not array.flags.owndata


@pytest.mark.parametrize(
    "value",
    [
        np.array([{}], dtype=object),
        np.zeros(2, complex),
        np.complex64(1),
        np.zeros(2, "f4,i4"),
        np.zeros(2, jnp.bfloat16),
    ],
)
def test_kinds_that_no_message_holds_are_refused(value):
    with pytest.raises(ValueError, match="a message cannot hold the dtype"):
        codec.pack({"actions": [value]})


def test_arrays_on_a_device_must_be_converted_first():
    with pytest.raises(TypeError, match=r"not ArrayImpl; convert it first \(np.asarray"):
        codec.pack(jnp.zeros(2))


def array_message(**changes):
    fields = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2], **changes}
    return msgpack.packb({key.encode(): value for key, value in fields.items() if value is not None})


def test_the_message_that_the_next_test_spoils_is_sound():
    np.testing.assert_array_equal(codec.unpack(array_message()), np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dtype": "|O"}, "numpy does not know|cannot hold"),
        ({"dtype": "|O8"}, "cannot hold the dtype object"),
        ({"dtype": "|V4"}, "cannot hold"),
        ({"dtype": "<c8"}, "cannot hold"),
        ({"dtype": "f4,f4"}, "numpy does not know"),
        ({"dtype": "(2,)f4"}, "numpy does not know"),
        ({"dtype": None}, "no usable dtype"),
        ({"shape": [3]}, "does not have 8 bytes"),
        ({"shape": [-2]}, "whole numbers from 0"),
        ({"shape": [2.0]}, "whole numbers from 0"),
        ({"shape": None}, "no usable shape"),
        ({"data": "text"}, "no usable data"),
    ],
)
def test_arrays_that_are_not_what_they_say_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        codec.unpack(array_message(**changes))


@pytest.mark.parametrize("data", [b"", b"\x82", b"\xc1", b"\xa1\xff", b"\x01\x02", b"\x91" * 5000])
def test_bytes_that_are_no_message(data):
    with pytest.raises(ValueError):  # noqa: PT011
        codec.unpack(data)


@settings(max_examples=100, deadline=None)
@given(
    marker=st.sampled_from(["__ndarray__", "__npgeneric__"]),
    dtype=st.text(alphabet="<>|=fiubSUOVcMm0123456789[]s,(): {}'\n", max_size=6),
    data=st.one_of(st.binary(max_size=8), st.integers(-300, 300), st.floats(), st.text(max_size=2)),
    shape=st.lists(st.integers(-1, 3), max_size=2),
)
def test_hostile_messages_raise_nothing_but_value_errors(marker, dtype, data, shape):
    fields = {marker: True, "data": data, "dtype": dtype, "shape": shape}
    message = msgpack.packb({key.encode(): value for key, value in fields.items()})
    try:
        decoded = codec.unpack(message)
    except ValueError:
        return
    assert isinstance(decoded, (np.ndarray, np.generic, str, bytes, float))
    assert not getattr(decoded, "dtype", np.dtype("f4")).hasobject
