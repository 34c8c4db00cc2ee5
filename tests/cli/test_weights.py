import json
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from acrlpd.cli import weights as command
from acrlpd.cli.main import main
from acrlpd.models import torch_names, weights
from acrlpd.models.pi0 import Pi0Config
from acrlpd.models.recognize import recognize

SMALL = {
    "PaliGemma/llm/final_norm/scale": np.array([1.0, 2.0], ml_dtypes.bfloat16),
    "PaliGemma/img/head/bias": np.arange(3, dtype=np.float32),
    "PaliGemma/llm/final_norm_1/scale": np.array([4.0], np.float32),
    "action_in_proj/bias": np.array([-0.0, 1e-30], np.float32),
    "count": np.array(3, np.int32),
}
FILES = {"orbax": "folder", "orbax-bare": "bare", "npz": "w.npz", "safetensors": "w.safetensors"}


def assert_same(ours, theirs):
    """Bit for bit, with the same dtypes."""
    assert {path: (array.dtype, array.shape) for path, array in ours.items()} == {
        path: (array.dtype, array.shape) for path, array in theirs.items()
    }
    assert all(ours[path].tobytes() == theirs[path].tobytes() for path in theirs)


def shapes(arrays):
    return {path: (array.shape, array.dtype) for path, array in arrays.items()}


# -- convert -----------------------------------------------------------------------------------------------------------


def test_around_all_layouts_no_bit_changes(tmp_path):
    source = tmp_path / "start.npz"
    weights.write(source, SMALL)
    for layout, name in FILES.items():
        target = tmp_path / "out" / name
        assert main(["weights", "convert", str(source), str(target), "--layout", layout]) == 0
        assert_same(weights.read_params(target), SMALL)
        assert shapes(weights.inspect(target)) == shapes(SMALL)
        source = target
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES.values())  # nothing temporary is left
    tree = json.loads((tmp_path / "out" / "bare" / "_METADATA").read_text())["tree_metadata"]
    assert any("bias" in key for key in tree)
    assert not any("value" in key for key in tree)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["pi0_lora_checkpoint", "pi0_ema_checkpoint", "pi0_params_without_value"])
def test_openpis_files_are_converted(shared, tmp_path, name):
    source, target = shared / "golden" / name, tmp_path / "w.safetensors"
    assert main(["weights", "convert", str(source), str(target)]) == 0
    assert_same(weights.read_params(target), weights.read_params(source))


def test_paligemma_layout_is_paligemmas_part(tmp_path):
    source, target = tmp_path / "w.npz", tmp_path / "paligemma.npz"
    weights.write(source, SMALL)
    assert main(["weights", "convert", str(source), str(target), "--layout", "paligemma"]) == 0
    with np.load(target) as file:
        assert set(file.files) == {"params/llm/final_norm/scale", "params/img/head/bias"}
    part = {path: SMALL[path] for path in ("PaliGemma/llm/final_norm/scale", "PaliGemma/img/head/bias")}
    assert_same(weights.read_params(target), part)


def test_dtype_is_changed_where_it_is_a_floating_point_one(tmp_path):
    source, target = tmp_path / "w.npz", tmp_path / "w.safetensors"
    weights.write(source, SMALL)
    assert main(["weights", "convert", str(source), str(target), "--dtype", "float32"]) == 0
    converted = weights.read_params(target)
    assert {array.dtype.name for array in converted.values()} == {"float32", "int32"}
    np.testing.assert_array_equal(converted["PaliGemma/llm/final_norm/scale"], [1.0, 2.0])


@pytest.mark.golden
def test_adapters_are_merged(shared, tmp_path, capsys):
    """Their scaling is not in the weights: sizes without a name need it told."""
    source, target = shared / "golden" / "pi0_lora_params.npz", tmp_path / "merged.npz"
    words = ["weights", "convert", str(source), str(target), "--merge_adapters"]
    assert main(words) == 2
    assert "Give --adapter_scaling" in capsys.readouterr().err
    assert not target.exists()
    assert main([*words, "--adapter_scaling", "2"]) == 0
    adapted, merged = weights.read_params(source), weights.read_params(target)
    assert merged.keys() == {path for path in adapted if "lora" not in path}
    path = "PaliGemma/llm/layers/attn/q_einsum"
    expected = adapted[f"{path}/w"] + 2 * adapted[f"{path}/lora_a"] @ adapted[f"{path}/lora_b"]
    np.testing.assert_allclose(merged[f"{path}/w"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.golden
def test_a_pytorch_checkpoint_becomes_openpis_folder(shared, tmp_path, capsys):
    params = weights.read_params(shared / "golden" / "pi0_params.npz")
    metadata = torch_names.head_sizes(params)
    weights.write_safetensors(tmp_path / "model.safetensors", torch_names.to_torch(params), metadata=metadata)
    assert main(["weights", "inspect", str(tmp_path / "model.safetensors")]) == 0
    assert "looks like pi0" in capsys.readouterr().out
    assert main(["weights", "convert", str(tmp_path / "model.safetensors"), str(tmp_path / "params")]) == 0
    assert_same(weights.read_params(tmp_path / "params"), params)


def test_existing_target_needs_overwrite(tmp_path, capsys):
    source, target = tmp_path / "w.npz", tmp_path / "folder"
    weights.write(source, SMALL)
    weights.write(target, {"old": np.zeros(1, np.float32)})
    arguments = ["weights", "convert", str(source), str(target)]
    assert main(arguments) == 2
    assert "folder exists already" in capsys.readouterr().err
    assert weights.read_params(target).keys() == {"old"}
    assert main([*arguments, "--overwrite"]) == 0
    assert_same(weights.read_params(target), SMALL)


def test_a_folder_of_something_else_is_never_deleted(tmp_path, capsys):
    source, target = tmp_path / "w.npz", tmp_path / "home"
    weights.write(source, SMALL)
    target.mkdir()
    (target / "letter.txt").write_text("dear")
    assert main(["weights", "convert", str(source), str(target), "--overwrite"]) == 2
    assert "will not be deleted" in capsys.readouterr().err
    assert (target / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["notes.txt", "notes"])
def test_a_file_of_something_else_is_never_replaced(tmp_path, capsys, name):
    weights.write(tmp_path / "w.npz", SMALL)
    (tmp_path / name).write_text("dear")
    assert main(["weights", "convert", str(tmp_path / "w.npz"), str(tmp_path / name), "--overwrite"]) == 2
    assert f"{name} is no file of weights (.npz or .safetensors) and will not be replaced" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "dear"


@pytest.mark.parametrize("name", FILES.values())
def test_an_interrupt_at_the_last_moment_leaves_what_was_there(tmp_path, monkeypatch, name):
    """Between taking the old weights away and putting the new ones in their place."""
    target, replace = tmp_path / name, os.replace
    weights.write(target, {"old": np.zeros(1, np.float32)})

    def interrupted(path, to):
        if to == target and Path(path).stem == "content":
            raise KeyboardInterrupt
        return replace(path, to)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.write(target, SMALL, overwrite=True)
    assert os.listdir(tmp_path) == [name]
    assert weights.read_params(target).keys() == {"old"}


@pytest.mark.parametrize("name", FILES.values())
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, name):
    target = tmp_path / name
    weights.write(target, {"old": np.zeros(1, np.float32)})
    monkeypatch.setattr(weights, "_on_host", fail)
    monkeypatch.setattr(np, "savez", fail)
    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk is full"):
        weights.write(target, SMALL, overwrite=True)
    assert os.listdir(tmp_path) == [name]
    assert weights.read_params(target).keys() == {"old"}


def fail(*_args, **_kwargs):
    raise OSError("disk is full")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["w.npz", "x.npz", "--layout", "orbax"], "the layout orbax needs the name of a folder"),
        (["w.npz", "x", "--layout", "npz"], "needs a name that ends in .npz"),
        (["w.npz", "gs://bucket/x"], "gs://bucket/x: weights are written to local paths only"),
        (["foo://bucket/x", "x"], "foo:// cannot be read here (Protocol not known: foo). gs:// and hf:// can"),
        (["wide.npz", "x"], "no float64 arrays: cast the weights"),
        (["both.npz", "x", "--layout", "orbax-bare"], "a is an array and has arrays below it"),
        (["nowhere.npz", "x"], "the path does not exist"),
        (["text.npz", "x"], "text.npz: expected a complete .npz file"),
        (["text.safetensors", "x"], "text.safetensors: expected a complete .safetensors file"),
        (["cut.npz", "x"], "cut.npz: expected a complete .npz file"),
        (["pickle.npz", "x"], "allow_pickle=False"),
        (["plain.npz", "y.npz", "--layout", "paligemma"], "hold no PaliGemma"),
        (["strange.npz", "x"], "strange.npz holds no known model: its arrays are named w"),
        (["strange.npz", "x.safetensors"], "holds no known model"),
        (["w.npz", "x", "--merge_adapters"], "these weights have no adapters"),
        (["w.npz", "x", "--adapter_scaling", "2"], "--adapter_scaling has no effect without --merge_adapters"),
        (["w.npz", "x", "--variant", "pi1"], "unknown variant 'pi1': there are pi0, pi05"),
        (["w.npz", "x", "--variant", "demo"], "the sizes of preset demo come from its data"),
    ],
)
def test_mistakes_are_explained(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    weights.write("w.npz", SMALL)
    weights.write("wide.npz", {"PaliGemma/w": np.zeros(2)})
    weights.write("both.npz", {"PaliGemma/a": np.zeros(2, np.float32), "PaliGemma/a/b": np.zeros(2, np.float32)})
    weights.write("plain.npz", {f"{name}/kernel": np.zeros(2) for name in ("state_in", "chunk_time_in", "out")})
    weights.write("strange.npz", {"w": np.zeros(2, np.float32)})
    np.savez("pickle.npz", w=np.array([{}], dtype=object))
    for name in ("text.npz", "text.safetensors"):
        (tmp_path / name).write_text("not weights")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "w.npz").read_bytes()[:-40])
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    before = set(os.listdir())
    assert main(["weights", "convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert set(os.listdir()) == before


# -- inspect and the variants ------------------------------------------------------------------------------------------


@pytest.mark.golden
def test_inspect_lists_every_array_and_the_totals(shared, capsys):
    path = str(shared / "golden" / "pi0_lora_checkpoint")
    sizes = json.loads((shared / "golden" / "meta.json").read_text())["config"]
    arrays = weights.read_params(path)
    assert main(["weights", "inspect", path]) == 0
    table = capsys.readouterr().out
    rows = {line.split()[0]: line for line in table.split("\n\n")[0].splitlines()}
    assert rows.keys() == arrays.keys()
    assert all(str(array.shape) in rows[name] and array.dtype.name in rows[name] for name, array in arrays.items())
    assert f"{len(arrays)} arrays, {sum(array.size for array in arrays.values()):,} parameters" in table
    assert "looks like pi0\n" in table

    assert main(["weights", "inspect", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_bytes"] == sum(array.nbytes for array in arrays.values())
    assert found["looks_like"]["model"] == "pi0"
    ranks = f"attention_lora {sizes['lora']['attn']['rank']}, mlp_lora {sizes['lora']['ffn']['rank']}"
    assert ranks in found["looks_like"]["action_expert_variant"]


def test_files_are_inspected_without_reading_arrays(tmp_path, monkeypatch):
    for name in ("w.npz", "w.safetensors"):
        weights.write(tmp_path / name, SMALL)
    monkeypatch.setattr(weights, "read_params", fail)
    for name in ("w.npz", "w.safetensors"):
        assert shapes(weights.inspect(tmp_path / name)) == shapes(SMALL)


def test_run_of_ours_is_found_by_its_folder(tmp_path):
    weights.write(tmp_path / "checkpoints" / "20" / "params", {"new": np.zeros(1, np.float32)})
    weights.write(tmp_path / "checkpoints" / "3" / "params", {"old": np.zeros(1, np.float32)})
    assert weights.inspect(tmp_path).keys() == {"new"}


def test_url_without_its_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    assert main(["weights", "inspect", "gs://bucket/pi0"]) == 2
    assert "pip install 'acrlpd[remote]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def variants():
    """Abstract arrays of every released model."""
    return {name: command._expected(name) for name in command.VARIANTS}


def test_a_size_is_named_among_its_own_kind():
    """The image towers have a "mid", too, of other sizes."""
    config = Pi0Config(paligemma_variant="mid", action_expert_variant="mid_expert", vision_variant="mid", vocab_size=8)
    found = recognize(weights.flatten(nnx.eval_shape(lambda: config.create(nnx.Rngs(0)))))
    parts = ("paligemma", "action_expert", "vision")
    assert [found[f"{part}_variant"] for part in parts] == ["mid", "mid_expert", "mid"]


@pytest.mark.golden
def test_released_models_are_recognized(shared, variants):
    path = shared / "spec" / "param-tables.json"
    if not path.exists():
        pytest.skip("these reference files have no parameter tables")
    tables = json.loads(path.read_text())
    assert tables.keys() == variants.keys() - {"paligemma"}
    for name, table in tables.items():
        rows = {path: tuple(row["shape"]) for path, row in table["params"].items()}
        assert {path: leaf.shape for path, leaf in variants[name].items()} == rows, name
        found = recognize(variants[name])
        adapters = "_lora" if name.endswith("_lora") else ""
        expected = {"vocab_size": "257152", "paligemma_variant": f"gemma_2b{adapters}", "vision_variant": "so400m_14"}
        if name.startswith("pi0_fast"):
            expected |= {"model": "paligemma"}
        else:
            expected |= {"model": name.removesuffix("_lora"), "action_dim": "32"}
            expected |= {"action_expert_variant": f"gemma_300m{adapters}"}
        assert found == expected, name
    assert recognize(variants["paligemma"]) == recognize(variants["pi0_fast"])


def test_unknown_arrays_look_like_nothing():
    assert recognize({"layers_0/kernel": np.zeros((2, 3))}) == {}


@pytest.mark.parametrize(
    ("path", "field"),
    [("action_out_proj/bias", "action_dim"), ("PaliGemma/llm/embedder/input_embedding", "vocab_size")],
)
def test_what_a_damaged_array_would_tell_is_left_out(variants, path, field):
    expected = recognize(variants["pi05"])
    assert expected.pop(field)
    assert recognize({name: leaf for name, leaf in variants["pi05"].items() if name != path}) == expected
    assert recognize(variants["pi05"] | {path: np.zeros(())}) == expected


def test_differences_from_a_variant_are_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_expected", lambda variant: {
        "a/kernel": jax.ShapeDtypeStruct((2, 3), np.float32), "b": jax.ShapeDtypeStruct((4,), np.float32),
    })  # fmt: skip
    path = tmp_path / "w.npz"
    weights.write(path, {"a/kernel": np.zeros((3, 2), np.float32), "c": np.zeros(1, np.float16)})
    lines = [
        "missing: b, expected (4,) float32",
        "extra: c, found (1,) float16",
        "shape: a/kernel, expected (2, 3) float32, found (3, 2) float32",
    ]
    assert main(["weights", "inspect", str(path), "--variant", "any", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["mismatches"] == lines
    assert [line.strip() for line in captured.err.splitlines()][-3:] == lines
    assert main(["weights", "convert", str(path), str(tmp_path / "x.npz"), "--variant", "any"]) == 2
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.golden
def test_sizes_of_the_tiny_model_do_not_pass_for_the_released_one(shared, capsys):
    sizes = json.loads((shared / "golden" / "meta.json").read_text())["config"]
    found = (sizes["action_dim"], sizes["gemma"]["tiny_expert"]["width"])
    assert main(["weights", "inspect", str(shared / "golden" / "pi0_params.npz"), "--variant", "pi0"]) == 2
    error = capsys.readouterr().err
    assert f"shape: action_in_proj/kernel, expected (32, 1024) float32, found {found} float32" in error
    assert "missing:" not in error
    assert "extra:" not in error


def test_models_own_arrays_fit_themselves():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert weights.mismatches(weights.flatten(model), weights.flatten(model)) == []
