"""Policy weights on disk: openpi's Orbax directories, in training runs as well, PaliGemma's ``.npz``, safetensors.

In memory, weights are a flat dictionary from the parameter's path, joined by '/', to a numpy array. This module never
reads or writes a pickle.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util

from acrlpd import files
from acrlpd.models import torch_names

Weights: TypeAlias = dict[str, np.ndarray]
_Array = TypeVar("_Array", np.ndarray, jax.ShapeDtypeStruct)
Layout = Literal["orbax", "orbax-bare", "npz", "paligemma", "safetensors"]

LORA = ".*lora.*"
NOT_IN_PALIGEMMA = f"{LORA}|(?!PaliGemma/).*|PaliGemma/llm/.*_1/.*"
"""The parameters that a PaliGemma checkpoint lacks: adapters, the action expert, the top-level projections."""

TORCH_FILE = "model.safetensors"
"""The weights file in a checkpoint of openpi's PyTorch port or of LeRobot."""

_MAX_LISTED = 20
_SUFFIXES: dict[Layout, str] = {"npz": ".npz", "paligemma": ".npz", "safetensors": ".safetensors"}
_BFLOAT16 = np.dtype(jnp.bfloat16)
_BFLOAT16_IN_NPZ = np.dtype("V2")  # numpy's file format has no name for bfloat16; big_vision does the same


# -- reading -----------------------------------------------------------------------------------------------------------


def read_params(path: str | os.PathLike[str]) -> Weights:
    """Read weights for inference from any of the formats, in the dtypes of the file.

    ``path`` may name a ``params`` folder, a step folder or a released checkpoint that holds one, a training run (its
    newest step is read), an ``.npz`` or ``.safetensors`` file, a folder of openpi's PyTorch port or of LeRobot, or a
    URL of any of these. For a training checkpoint, the EMA weights are returned if it has them. Arrays with names of
    the PyTorch port are returned under our names.
    """
    local = _source(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    return _checked(readers.get(local.suffix, _read_item)(local), local)


def inspect(path: str | os.PathLike[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every array that ``read_params`` would return, without reading any array."""
    local = _source(path)
    readers = {".npz": _inspect_npz, ".safetensors": _inspect_safetensors}
    return _checked(readers.get(local.suffix, _inspect_item)(local), local)


def _checked(arrays: dict[str, _Array], path: Path) -> dict[str, _Array]:
    """Raise ValueError if there are no arrays, or some that cannot be parameters: text, complex numbers, dates."""
    if not arrays:
        raise ValueError(f"{path} holds no arrays: expected the parameters of a model")
    for name, array in arrays.items():
        if not any(jnp.issubdtype(array.dtype, allowed) for allowed in (jnp.floating, jnp.integer, jnp.bool_)):
            raise ValueError(f"{path}: {name} is {array.dtype}, expected real numbers: these are no model's weights")
    return arrays


def fetch(path: str | os.PathLike[str]) -> Path:
    """Return a local path; a URL (``gs://``, ``hf://`` or any other that fsspec knows) is downloaded once.

    Downloads go to the same place as openpi's: ``<cache>/<host>/<path>``, where the cache folder is
    ``OPENPI_DATA_HOME`` or ``~/.cache/openpi``.
    """
    scheme, separator, rest = os.fspath(path).partition("://")
    if not separator:
        if not Path(path).exists():
            raise FileNotFoundError(f"no weights at {path}: the path does not exist")
        return Path(path).absolute()
    cache = Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser()
    target = files.inside(cache, rest.strip("/"), os.fspath(path))
    if not target.exists():
        _download(os.fspath(path), scheme, target)
    return target


def _download(url: str, scheme: str, target: Path) -> None:
    try:
        import fsspec

        filesystem, remote = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a package is missing, or no package knows the scheme
        if scheme in ("gs", "gcs", "hf"):
            raise ImportError(f"reading {scheme}:// needs an extra: pip install 'acrlpd[remote]' ({error})") from error
        raise ValueError(
            f"{url}: {scheme}:// cannot be read here ({error}). gs:// and hf:// can, with acrlpd[remote]; copy other "
            "weights to a local path."
        ) from error
    with _replacing(target) as partial:
        try:
            filesystem.get(remote, str(partial), recursive=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no weights at {url}: {error}") from error
        except Exception as error:  # every file system has network errors of its own
            raise ConnectionError(
                f"could not copy {url} to {target}: {error!r}. Check the network and your access, or copy it there by "
                "hand."
            ) from error


def locate(path: str | os.PathLike[str]) -> Path:
    """Return the file or Orbax folder that ``read_params`` would read; statistics are in ``assets`` next to it."""
    local = _source(path)
    return local if local.suffix in _SUFFIXES.values() else _find_params(local)


def _source(path: str | os.PathLike[str]) -> Path:
    """Return a local file or a folder that Orbax wrote; for a PyTorch checkpoint its weights file, as openpi does.

    A path on which a library would block, such as a pipe, is refused.
    """
    local = fetch(path)
    if (local / TORCH_FILE).exists():
        local = local / TORCH_FILE
    if local.suffix in _SUFFIXES.values():
        files.check_file(local)
    return local


def _step_of(path: Path) -> Path:
    """Return ``path``, or a run's newest step; steps may be in ``checkpoints``, as in runs of this project."""
    if any(_is_item(folder) for folder in (path, path / "params", path / "train_state")):
        return path
    for parent in (path, path / "checkpoints"):
        steps = [child for child in parent.glob("*") if child.name.isdecimal() and child.is_dir()]
        if steps:
            return max(steps, key=lambda step: int(step.name))
    return path


def _is_item(folder: Path) -> bool:
    return (folder / "_METADATA").exists() or (folder / "manifest.ocdbt").exists()


def _find_params(path: Path) -> Path:
    """Return the Orbax folder: ``path`` itself, or ``params`` inside it or inside its highest-numbered step."""
    step = _step_of(path)
    folder = step if _is_item(step) else step / "params"
    if (folder / "_METADATA").exists():
        return folder
    if _is_item(folder):
        raise ValueError(f"{folder}: expected a complete Orbax folder; its _METADATA is missing. Copy it anew.")
    if step != path:
        raise ValueError(
            f"{step}, the newest step of {path}, holds no params: it is incomplete. Copy it anew, delete it, or name "
            "another step."
        )
    raise ValueError(
        f"{path} holds no params: expected an Orbax folder (with a _METADATA file) there, in params/ or in "
        "<step>/params/, or a .npz or .safetensors file"
    )


def _metadata(item: Path) -> Any:
    files.check_folder(item)
    with _naming_item(item):
        return ocp.PyTreeCheckpointHandler().metadata(item).tree


def _restore(item: Path) -> Any:
    """Restore the whole tree as numpy arrays, independently of the devices it was written from."""
    tree = _metadata(item)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with _naming_item(item):
        return ocp.PyTreeCheckpointHandler().restore(item, args=ocp.args.PyTreeRestore(tree, restore_args=as_numpy))


@contextlib.contextmanager
def _naming_item(item: Path) -> Iterator[None]:
    quiet_orbax()
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{item}: expected a complete Orbax folder; a file in it is damaged or missing ({reason}). Copy it anew."
        ) from error


@functools.cache
def quiet_orbax() -> None:
    """Keep errors that are raised while reading or writing from being printed as well, by each thread they pass.

    Orbax logs them with a traceback, and TensorStore prints one for every operation that ends after Orbax gave up.
    """
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    logging.getLogger("asyncio").addFilter(lambda record: not _was_raised_in_orbax(record))
    show = sys.unraisablehook

    def unraisablehook(args: sys.UnraisableHookArgs) -> None:
        if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"):
            show(args)

    sys.unraisablehook = unraisablehook


def _was_raised_in_orbax(record: logging.LogRecord) -> bool:
    trace = record.exc_info[2] if record.exc_info else None
    return any("orbax" in frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))


def _flatten_params(tree: Any, source: Path) -> dict[str, Any]:
    """Flatten what is under "params" and cut the level "value" that openpi's training loop adds at every leaf.

    Only the last element of a path is cut: the image tower has modules named "key" and "value".
    """
    params = tree.get("params") if isinstance(tree, dict) else None
    flat = traverse_util.flatten_dict(params) if isinstance(params, dict) else {}
    if not flat:
        found = sorted(tree) if isinstance(tree, dict) else f"a {type(tree).__name__}"
        raise ValueError(f"{source} holds no arrays under 'params'; it has {found}")
    if all(path[-1] == "value" for path in flat):
        flat = {path[:-1]: leaf for path, leaf in flat.items()}
    return {"/".join(path): leaf for path, leaf in flat.items()}


def _read_item(path: Path) -> Weights:
    return _flatten_params(_restore(_find_params(path)), path)


def stored_shapes(item: Path) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return the shape of every array in an Orbax folder, by its whole path there."""
    return {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(_metadata(item)).items()}


def _inspect_item(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    tree = _metadata(_find_params(path))
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _flatten_params(tree, path).items()}


def _read_npz(path: Path) -> Weights:
    _inspect_npz(path)  # its errors name the arrays that cannot be read
    with _naming(path), np.load(path, allow_pickle=False) as file:
        return {name: _as_bfloat16(file[stored]) for stored, name in _npz_names(file.files).items()}


def _inspect_npz(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    with _naming(path):
        found = files.npz_outline(path)
        names = _npz_names(found)
        outlines = {name: found[stored] for stored, name in names.items()}
        return {
            name: jax.ShapeDtypeStruct(shape, _BFLOAT16 if dtype == _BFLOAT16_IN_NPZ else dtype)
            for name, (shape, dtype) in outlines.items()
        }


def _npz_names(stored: Iterable[str]) -> dict[str, str]:
    """Map names in the file to our paths. PaliGemma's two parts are under "params"; other subtrees are dropped."""
    names = list(stored)
    inside = [name for name in names if name.startswith("params/")]
    if inside:
        return {name: f"PaliGemma/{name.removeprefix('params/')}" for name in inside}
    return {name: name for name in names}


def _as_bfloat16(array: np.ndarray) -> np.ndarray:
    return array.view(_BFLOAT16) if array.dtype == _BFLOAT16_IN_NPZ else array


def _read_safetensors(path: Path) -> Weights:
    from safetensors.numpy import load_file

    _inspect_safetensors(path)
    with _naming(path):
        arrays = load_file(path)
    if not torch_names.is_torch(arrays):
        return arrays
    return torch_names.from_torch(arrays, metadata=_safetensors_header(path)[1], where=str(path))


def _inspect_safetensors(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    shapes, metadata = _safetensors_header(path)
    if not torch_names.is_torch(shapes):
        return shapes
    from_torch = functools.partial(torch_names.from_torch, metadata=metadata, stack=jnp.stack, where=str(path))
    return jax.eval_shape(from_torch, shapes)


def _safetensors_header(path: Path) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, str]]:
    """Return shape and dtype of every array, and the file's metadata."""
    from safetensors import safe_open

    with _naming(path), safe_open(path, "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        unknown = [name for name, each in slices.items() if each.get_dtype() not in _SAFETENSORS_DTYPES]
        if unknown:
            dtype = slices[unknown[0]].get_dtype()
            raise ValueError(f"{unknown[0]} holds {dtype} numbers, which no model here has. Make them bfloat16")
        shapes = {
            name: jax.ShapeDtypeStruct(tuple(each.get_shape()), _SAFETENSORS_DTYPES[each.get_dtype()])
            for name, each in slices.items()
        }
        return shapes, file.metadata() or {}


_SAFETENSORS_DTYPES = {"BF16": _BFLOAT16, "BOOL": np.dtype(bool)} | {
    f"{letter}{8 * size}": np.dtype(f"{kind}{size}")
    for letter, kind, sizes in (("F", "f", (2, 4, 8)), ("I", "i", (1, 2, 4, 8)), ("U", "u", (1, 2, 4, 8)))
    for size in sizes
}


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file's name to errors that lack it; a damaged .npz can raise errors of many different classes."""
    from safetensors import SafetensorError

    try:
        yield
    except (PermissionError, IsADirectoryError):
        raise
    except (*files.NPZ_DAMAGE, SafetensorError) as error:
        reason = files.one_line(error)
        raise ValueError(
            f"{path}: expected a complete {path.suffix} file with arrays; it is truncated or of another kind ({reason})"
        ) from error


# -- between disk and model --------------------------------------------------------------------------------------------


def flatten(model: nnx.Module) -> dict[str, jax.Array]:
    """Return a model's parameters by path."""
    return {path: param.get_value() for path, param in _params(model).items()}


def load_into(
    model: nnx.Module,
    weights: Mapping[str, np.ndarray],
    *,
    may_miss: str = LORA,
    place: Callable[[np.ndarray], Any] = jnp.asarray,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Load ``weights`` into ``model``, in the model's dtypes; all problems are reported before anything changes.

    Parameters whose path matches ``may_miss`` keep their values if the weights lack them, but half an adapter is never
    kept. ``place`` puts an array on its devices, for example with a sharding. The model may be abstract
    (``nnx.eval_shape``); then no parameter may be missing. ``source`` is named in errors.
    """
    params = _params(model)
    kept = {path for path in params.keys() - weights.keys() if re.fullmatch(may_miss, path)}
    problems = mismatches(flatten(model), weights, may_miss=may_miss)
    problems += [
        f"missing: {path}, and the model was built without values to keep"
        for path in sorted(kept)
        if isinstance(params[path].get_value(), jax.ShapeDtypeStruct)
    ]
    problems += [
        f"missing: {path}, half of an adapter whose other half {half} is there"
        for path in sorted(kept)
        if (half := _other_half(path)) in weights
    ]
    if problems:
        listed = problems[:_MAX_LISTED] + [f"... and {len(problems) - _MAX_LISTED} more"] * (
            len(problems) > _MAX_LISTED
        )
        where = "" if source is None else f" ({source})"
        raise ValueError(
            f"the weights do not fit the model{where}; is its config the right one?\n  " + "\n  ".join(listed)
        )
    for path in params.keys() - kept:
        param = params[path]
        param.set_value(place(np.asarray(weights[path]).astype(param.get_value().dtype)))


def _other_half(path: str) -> str | None:
    halves = {"lora_a": "lora_b", "lora_b": "lora_a"}
    return path[:-6] + halves[path[-6:]] if path[-6:] in halves else None


def mismatches(expected: Mapping[str, Any], found: Mapping[str, Any], *, may_miss: str = "") -> list[str]:
    """Return how ``found`` differs from ``expected``: one line per array missing, extra or of another shape.

    Both map paths to anything with a shape and a dtype. Dtypes may differ; paths matching ``may_miss`` may be missing.
    """
    missing = [path for path in sorted(expected.keys() - found.keys()) if not re.fullmatch(may_miss, path)]
    problems = [f"missing: {path}, expected {_describe(expected[path])}" for path in missing]
    problems += [f"extra: {path}, found {_describe(found[path])}" for path in sorted(found.keys() - expected.keys())]
    problems += [
        f"shape: {path}, expected {_describe(expected[path])}, found {_describe(found[path])}"
        for path in sorted(expected.keys() & found.keys())
        if expected[path].shape != found[path].shape
    ]
    return problems


def _params(model: nnx.Module) -> dict[str, nnx.Param]:
    return {"/".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _describe(array: Any) -> str:
    return f"{tuple(array.shape)} {np.dtype(array.dtype).name}"


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str],
    params: nnx.Module | Mapping[str, Any],
    *,
    layout: Layout | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights in one of the layouts; half-written files never have the name ``path``.

    ``orbax`` is a ``params`` folder of openpi's training loop and ``orbax-bare`` one without the level "value";
    ``npz`` and ``safetensors`` are one file with the parameters' paths as names; ``paligemma`` is an ``.npz`` of only
    the image tower and the vision-language expert, under PaliGemma's names. With None, the suffix of ``path`` decides.
    ``metadata`` goes into the header of a safetensors file.
    """
    layout = check_target(path, layout, overwrite=overwrite)
    flat = _flat(params)
    with _replacing(Path(path).absolute(), overwrite=overwrite) as partial:
        if layout == "safetensors":
            _write_safetensors(partial, flat, metadata)
        elif layout in ("npz", "paligemma"):
            _write_npz(partial, flat if layout == "npz" else _for_paligemma(flat))
        else:
            tree = _nest(flat) if layout == "orbax" else _nest(flat, level=())
            _save(partial, {"params": tree})


def check_target(path: str | os.PathLike[str], layout: Layout | None = None, *, overwrite: bool = False) -> Layout:
    """Return the layout that ``write`` would choose; raise if it must not write to ``path``."""
    if "://" in os.fspath(path):
        raise ValueError(f"{path}: weights are written to local paths only; write them here, then copy them there")
    suffix = Path(path).suffix
    if layout is None:
        by_suffix: dict[str, Layout] = {".npz": "npz", ".safetensors": "safetensors"}
        layout = by_suffix.get(suffix, "orbax")
    if suffix != _SUFFIXES.get(layout, suffix) or (layout not in _SUFFIXES and suffix in _SUFFIXES.values()):
        expected = f"a name that ends in {_SUFFIXES[layout]}" if layout in _SUFFIXES else "the name of a folder"
        raise ValueError(f"{path}: the layout {layout} needs {expected}, because readers go by the suffix")
    _check_free(Path(path).absolute(), overwrite=overwrite)
    return layout


def write_params(path: str | os.PathLike[str], params: nnx.Module | Mapping[str, Any]) -> None:
    """Write a ``params`` folder as openpi's training loop does; arrays keep their dtype and may be sharded."""
    write(path, params, layout="orbax")


def write_safetensors(
    path: str | os.PathLike[str],
    params: nnx.Module | Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file whose tensors are named by the parameters' paths, with ``metadata`` in its header."""
    write(path, params, layout="safetensors", metadata=metadata)


def _save(path: Path, tree: Mapping[str, Any]) -> None:
    quiet_orbax()
    try:
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(path, args=ocp.args.PyTreeSave(tree))
    except BaseException:
        _await_writes(path.parent)
        raise


def _await_writes(folder: Path) -> None:
    """Wait for TensorStore's threads to finish: their writes would create a deleted folder again."""
    before, now = -1, 0
    while now != before:
        time.sleep(1)
        before, now = now, 0
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                now += path.lstat().st_size


def _write_safetensors(path: Path, flat: Mapping[str, Any], metadata: Mapping[str, str] | None) -> None:
    from safetensors.numpy import save_file

    arrays = {name: np.asarray(value, order="C") for name, value in flat.items()}
    save_file(arrays, path, None if metadata is None else dict(metadata))


def _write_npz(path: Path, flat: Mapping[str, Any]) -> None:
    arrays = {name: np.asarray(value) for name, value in flat.items()}
    np.savez(path, **{  # type: ignore[arg-type]  # to the stubs, any name may be savez's own argument
        name: value.view(_BFLOAT16_IN_NPZ) if value.dtype == _BFLOAT16 else value for name, value in arrays.items()
    })  # fmt: skip


def _for_paligemma(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays that a PaliGemma checkpoint has, under its names."""
    part = {path: value for path, value in flat.items() if not re.fullmatch(NOT_IN_PALIGEMMA, path)}
    if not part:
        raise ValueError("the weights hold no PaliGemma (no array under PaliGemma/): write them as npz instead")
    return {f"params/{path.removeprefix('PaliGemma/')}": value for path, value in part.items()}


def _flat(params: nnx.Module | Mapping[str, Any]) -> Mapping[str, Any]:
    return flatten(params) if isinstance(params, nnx.Module) else params


def _nest(flat: Mapping[str, Any], *, level: tuple[str, ...] = ("value",)) -> dict[str, Any]:
    paths = {path: (*path.split("/"), *level) for path in flat}
    folders = {keys[:end] for keys in paths.values() for end in range(1, len(keys))}
    both = sorted(path for path, keys in paths.items() if keys in folders)
    if both:
        raise ValueError(f"{both[0]} is an array and has arrays below it, which openpi's layout cannot hold")
    return traverse_util.unflatten_dict({paths[path]: _on_host(value) for path, value in flat.items()})


def _on_host(value: Any) -> jax.Array:
    """Return a JAX array in host memory: Orbax stores chunks and sharding, as in openpi's files, only for these."""
    if isinstance(value, jax.Array):
        return value
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise ValueError(f"openpi's layout has no {value.dtype} arrays: cast the weights to float32 or bfloat16 first")
    return jax.device_put(value, jax.local_devices(backend="cpu")[0])


@contextlib.contextmanager
def _replacing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path next to ``target`` to write to; it replaces the target at the end, or is deleted on an error."""
    _check_free(target, overwrite=overwrite)
    with _parents(target), files.written_whole(target) as partial:
        yield partial


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Create the folders above ``target``; on an error, remove those that did not exist before."""
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # it may contain other files by now
                folder.rmdir()
        raise


def _check_free(target: Path, *, overwrite: bool) -> None:
    if os.path.lexists(target) and not overwrite:
        raise FileExistsError(f"{target} exists already: name another path, or overwrite it")
    if target.is_dir() and not (target / "_METADATA").exists():
        raise ValueError(f"{target} is a folder without weights (no _METADATA in it) and will not be deleted")
    if os.path.lexists(target) and not target.is_dir() and target.suffix not in _SUFFIXES.values():
        raise ValueError(f"{target} is no file of weights (.npz or .safetensors) and will not be replaced")
