from __future__ import annotations

import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from acrlpd.models import weights

RUNS = {"pi0_ema": "pi0", "pi05_noema": "pi05", "pi0_lora": "pi0_lora"}


class Tiny(nnx.Module):
    """A dense layer with an adapter."""

    def __init__(self, value=0.0):
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.lora_a = nnx.Param(jnp.full((2, 1), value, jnp.bfloat16))


def tiny_weights():
    return {
        "dense/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "dense/bias": np.array([1.5, 2.5, 3.5], np.float32),
        "lora_a": np.array([[0.5], [0.25]], ml_dtypes.bfloat16),
    }


def assert_same(ours, theirs):
    """Bit for bit, with the same dtypes."""
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        assert (path, ours[path].dtype, ours[path].shape) == (path, expected.dtype, expected.shape)
        assert np.asarray(ours[path]).tobytes() == np.asarray(expected).tobytes(), path


def files_below(folder):
    """Relative paths of all files."""
    return {anonymous(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file()}


def anonymous(path):
    """The path without a data file's name, which is random."""
    return re.sub("(^|/)d/[0-9a-f]{32}$", r"\1d/*", path)


def tree_keys(item):
    return json.loads((item / "_METADATA").read_text())["tree_metadata"].keys()


# -- openpi's files ----------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("below", ["", "2", "2/params"])
def test_training_checkpoint_is_read(golden, run, below):
    """The run's folder, its step and the step's item all give what inference uses: the average, if there is one."""
    described = golden.meta[f"{run}_checkpoint"]
    read = weights.read_params(golden.folder / f"{run}_checkpoint" / below)
    kind = "ema_params" if described["ema_decay"] is not None else "params"
    expected = golden.arrays(f"{run}_train_{kind}")
    assert {path: value.dtype.name for path, value in read.items()} == described["restored_dtypes"]
    for path, value in expected.items():
        np.testing.assert_array_equal(read[path].astype("float32"), value, err_msg=path)
    assert {path for path, value in read.items() if value.dtype == ml_dtypes.bfloat16} == set(described["frozen"])


@pytest.mark.golden
def test_tree_without_the_value_level_is_read(golden):
    assert_same(weights.read_params(golden.folder / "pi0_params_without_value"), golden.arrays("pi0_params"))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["pi0_lora_checkpoint", "pi0_params_without_value", "pi0_params.npz"])
def test_inspect_agrees_with_reading(golden, name):
    described = weights.inspect(golden.folder / name)
    read = weights.read_params(golden.folder / name)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in described.items()} == {
        path: (value.shape, value.dtype) for path, value in read.items()
    }


@pytest.mark.golden
def test_params_are_written_as_openpi_does(golden, tmp_path):
    """From a model: openpi's files, its key paths, and the bits of every array."""
    policy = golden.model("pi0")
    weights.write_params(tmp_path / "params", policy)
    files = golden.meta["pi0_ema_checkpoint"]["files"]
    wanted = {anonymous(path.removeprefix("2/params/")) for path in files if path.startswith("2/params/")}
    assert wanted <= files_below(tmp_path / "params")
    assert tree_keys(tmp_path / "params") == tree_keys(golden.folder / "pi0_ema_checkpoint" / "2" / "params")
    assert_same(weights.read_params(tmp_path / "params"), golden.arrays("pi0_params"))


# -- formats of ours ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [weights.write_params, weights.write_safetensors])
def test_what_is_written_reads_back_bit_for_bit(tmp_path, write):
    path = tmp_path / ("w.safetensors" if write is weights.write_safetensors else "w")
    write(path, tiny_weights())
    assert_same(weights.read_params(path), tiny_weights())
    model = Tiny()
    weights.load_into(model, weights.read_params(path))
    assert_same({name: np.asarray(value) for name, value in weights.flatten(model).items()}, tiny_weights())


def test_modules_called_value_keep_their_name(tmp_path):
    """Only a level that every path ends with is cut."""
    flat = {"attention/value/kernel": np.ones(2, np.float32), "attention/key/kernel": np.zeros(2, np.float32)}
    weights.write_params(tmp_path / "params", flat)
    assert_same(weights.read_params(tmp_path), flat)


def test_newest_step_is_read(tmp_path):
    for step in (2, 10):
        weights.write_params(tmp_path / str(step) / "params", {"w": np.full(1, step, np.float32)})
    assert weights.read_params(tmp_path)["w"] == 10


@pytest.mark.parametrize("folder", ["", "checkpoints"])
@pytest.mark.parametrize("damage", ["10/params", "10/params/_METADATA", "10"])
def test_an_incomplete_newest_step_is_named(tmp_path, folder, damage):
    """The one before is not taken in its place: nobody would notice."""
    for step in (2, 10):
        weights.write_params(tmp_path / folder / str(step) / "params", tiny_weights())
    damaged = tmp_path / folder / damage
    if damaged.is_dir():
        shutil.rmtree(damaged)
        (tmp_path / folder / "10").mkdir(exist_ok=True)
    else:
        damaged.unlink()
    for read in (weights.read_params, weights.inspect):
        with pytest.raises(ValueError, match=rf"{tmp_path / folder / '10'}.* Copy it anew"):
            read(tmp_path)


def test_paligemma_file(tmp_path):
    path = tmp_path / "paligemma.npz"
    np.savez(path, **{"params/img/head/kernel": np.ones(2), "params/llm/final_norm/scale": np.ones(1), "opt/x": 1})
    assert weights.read_params(path).keys() == {"PaliGemma/img/head/kernel", "PaliGemma/llm/final_norm/scale"}


@pytest.mark.parametrize(
    ("path", "may_miss"),
    [
        ("action_in_proj/kernel", True),
        ("PaliGemma/llm/layers/mlp_1/linear", True),
        ("PaliGemma/llm/layers/attn/q_einsum/lora_a", True),
        ("PaliGemma/llm/layers/mlp/linear", False),
        ("PaliGemma/img/head/kernel", False),
    ],
)
def test_what_paligemma_lacks(path, may_miss):
    assert bool(re.fullmatch(weights.NOT_IN_PALIGEMMA, path)) == may_miss


def test_pickle_is_refused(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, w=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        weights.read_params(path)


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.array(["a"]), "odd is <U1, expected real numbers"),
        (np.zeros(2, complex), "odd is complex128, expected real numbers"),
        (np.array([{}], object), "odd holds pickled objects"),
    ],
)
@pytest.mark.parametrize("read", [weights.read_params, weights.inspect])
def test_arrays_that_are_no_weights_are_named(tmp_path, array, complaint, read):
    np.savez(tmp_path / "w.npz", w=np.zeros(2), odd=array)
    with pytest.raises(ValueError, match=f"w.npz: .*{complaint}"):
        read(tmp_path / "w.npz")


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
def test_a_file_without_arrays_is_named(tmp_path, name):
    weights.write(tmp_path / name, {})
    for read in (weights.read_params, weights.inspect):
        with pytest.raises(ValueError, match=f"{name} holds no arrays"):
            read(tmp_path / name)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("read", [weights.read_params, weights.inspect])
def test_a_damaged_npz_is_named(tmp_path, save, read):
    """Whichever bit of its headers is flipped: numpy and zipfile raise ten kinds of errors for that."""
    path = tmp_path / "w.npz"
    save(path, w=np.random.default_rng(0).random(1000))  # the first header is parsed before the sum at the end is seen
    whole = path.read_bytes()
    refused = unnamed = 0
    for bit in (*range(8 * 200), *range(8 * (len(whole) - 100), 8 * len(whole))):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read(path)
        except ValueError as error:
            refused += str(path) in str(error)
            unnamed += str(path) not in str(error)
    assert refused
    assert not unnamed


def test_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        weights.write_params(tmp_path, tiny_weights())


def test_folder_without_weights_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"holds no params: expected an Orbax folder"):
        weights.read_params(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        weights.read_params(tmp_path / "nowhere")


def without_metadata(item):
    (item / "_METADATA").unlink()


def with_other_metadata(item):
    (item / "_METADATA").write_text("{}")


def with_broken_sharding(item):
    (item / "_sharding").write_text("{")


def with_half_a_manifest(item):
    content = (item / "manifest.ocdbt").read_bytes()
    (item / "manifest.ocdbt").write_bytes(content[: len(content) // 2])


def with_empty_data(item):
    for file in item.rglob("d/*"):
        file.write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [without_metadata, with_other_metadata, with_broken_sharding, with_half_a_manifest, with_empty_data]
)
def test_a_damaged_folder_is_named(tmp_path, caplog, damage):
    weights.write_params(tmp_path / "params", tiny_weights())
    caplog.clear()
    damage(tmp_path / "params")
    with pytest.raises(ValueError, match=r"params: expected a complete Orbax folder; .* Copy it anew"):
        weights.read_params(tmp_path)
    assert not caplog.records


# -- loading -----------------------------------------------------------------------------------------------------------


def test_missing_extra_and_wrongly_shaped_arrays_are_listed():
    model = Tiny()
    before = dict(weights.flatten(model))
    flat = {"dense/kernel": np.zeros((3, 2), np.float32), "stranger": np.zeros(4), "lora_a": np.zeros((2, 1))}
    with pytest.raises(ValueError, match="do not fit the model") as raised:
        weights.load_into(model, flat)
    assert str(raised.value).splitlines()[1:] == [
        "  missing: dense/bias, expected (3,) float32",
        "  extra: stranger, found (4,) float64",
        "  shape: dense/kernel, expected (2, 3) float32, found (3, 2) float32",
    ]
    assert_same(weights.flatten(model), before)


def test_only_adapters_may_be_missing():
    model = Tiny(value=7.0)
    without = tiny_weights()
    del without["lora_a"]
    weights.load_into(model, without)
    np.testing.assert_array_equal(model.lora_a[...], np.full((2, 1), 7))
    np.testing.assert_array_equal(model.dense.bias[...], [1.5, 2.5, 3.5])
    with pytest.raises(ValueError, match="missing: lora_a, expected"):
        weights.load_into(model, without, may_miss="")
    with pytest.raises(ValueError, match="missing: lora_a, and the model was built without values"):
        weights.load_into(nnx.eval_shape(Tiny), without)


class Adapted(nnx.Module):
    def __init__(self):
        self.linear_lora_a, self.linear_lora_b = (nnx.Param(jnp.zeros(2)) for _ in range(2))


@pytest.mark.parametrize("there", ["linear_lora_a", "linear_lora_b"])
def test_half_an_adapter_is_refused(there):
    """The other half would stay as it was drawn, and the sum be neither trained nor fresh."""
    [absent] = {"linear_lora_a", "linear_lora_b"} - {there}
    message = rf"\(some/params\)(?s:.*)missing: {absent}, half of an adapter whose other half {there} is there"
    with pytest.raises(ValueError, match=message):
        weights.load_into(Adapted(), {there: np.ones(2)}, source="some/params")
    weights.load_into(Adapted(), {})


def test_weights_take_the_dtype_of_the_model():
    model = Tiny()
    flat = {name: value.astype("float64") for name, value in tiny_weights().items()}
    weights.load_into(model, flat)
    assert_same({name: np.asarray(value) for name, value in weights.flatten(model).items()}, tiny_weights())


def test_arrays_are_placed_where_they_belong():
    mesh = jax.make_mesh((2,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = nnx.eval_shape(Tiny)
    weights.load_into(model, tiny_weights(), place=lambda array: jax.device_put(array, sharding))
    assert all(len(value.devices()) == 2 for value in weights.flatten(model).values())


# -- URLs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A file system in memory, and a cache folder of our own."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


def test_url_is_mirrored_once(tmp_path, remote):
    weights.write_params(tmp_path / "params", tiny_weights())
    remote.put(str(tmp_path / "params"), "/bucket/pi0/params", recursive=True)
    assert_same(weights.read_params("memory://bucket/pi0/params"), tiny_weights())
    assert (tmp_path / "cache" / "bucket" / "pi0" / "params" / "_METADATA").exists()
    remote.rm("/bucket/pi0/params", recursive=True)
    assert_same(weights.read_params("memory://bucket/pi0/params"), tiny_weights())
    remote.pipe("/bucket/rest", b"")


def test_absent_url_is_named(tmp_path, remote):
    remote.pipe("/bucket/there", b"")
    with pytest.raises(FileNotFoundError, match="no weights at memory://bucket/nowhere"):
        weights.read_params("memory://bucket/nowhere")
    assert not (tmp_path / "cache").exists()


def test_broken_network_is_named(remote, monkeypatch):
    remote.pipe("/bucket/there", b"")

    def fail(*_args, **_kwargs):
        raise TimeoutError("no route")

    monkeypatch.setattr(type(remote), "get", fail)
    with pytest.raises(ConnectionError, match=r"could not copy memory://bucket/there .*no route.*Check the network"):
        weights.read_params("memory://bucket/there")


@pytest.mark.parametrize("url", ["gs://bucket/params", "hf://owner/model"])
def test_absent_extra_is_named(tmp_path, monkeypatch, url):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"pip install 'acrlpd\[remote\]'"):
        weights.read_params(url)
