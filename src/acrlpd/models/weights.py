"""Policy weights on disk: openpi's Orbax directories and training checkpoints, PaliGemma's ``.npz``, safetensors.

In memory, weights are a flat dictionary from the parameter's path, joined by '/', to a numpy array. Nothing here reads
or writes a pickle.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util

Weights: TypeAlias = dict[str, np.ndarray]

LORA = ".*lora.*"
NOT_IN_PALIGEMMA = f"{LORA}|(?!PaliGemma/).*|PaliGemma/llm/.*_1/.*"
"""What a model has beyond a PaliGemma checkpoint: adapters, the action expert, the top-level projections."""

_MAX_LISTED = 20


@dataclasses.dataclass(frozen=True)
class TrainingCheckpoint:
    """One step folder of openpi's training loop: all that it needs to go on."""

    step: int  # updates done; the folder's own number is one less
    params: Weights
    ema_params: Weights | None  # None: the run kept no average
    opt_state: Any  # nested lists and dictionaries with arrays, as openpi's optimizer chain (see ``write_checkpoint``)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_params(path: str | os.PathLike[str]) -> Weights:
    """Weights for inference from any of the formats, in the dtypes of the file.

    ``path`` may name a ``params`` folder, a step folder or a released checkpoint that holds one, a training run (its
    newest step is taken), an ``.npz`` or ``.safetensors`` file, or a URL of any of these. Of a training checkpoint
    these are the averaged weights if it kept an average.
    """
    local = fetch(path)
    if local.suffix == ".npz":
        return _read_npz(local)
    if local.suffix == ".safetensors":
        return _read_safetensors(local)
    return _flatten_params(_restore(_find_item(local, "params")), local)


def read_checkpoint(path: str | os.PathLike[str]) -> TrainingCheckpoint:
    """A step folder of openpi's training loop, or the newest one of a run."""
    local = fetch(path)
    saved = read_params(local)
    state = _restore(_find_item(local, "train_state"))
    # openpi keeps the average, if there is one, in the item that inference reads, and the plain weights elsewhere.
    plain = _flatten_params(state, local) if state.get("params") else None
    return TrainingCheckpoint(
        step=int(state["step"]),
        params=saved if plain is None else plain,
        ema_params=None if plain is None else saved,
        opt_state=state["opt_state"],
    )


def inspect(path: str | os.PathLike[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array that ``read_params`` would return; Orbax arrays are not read for it."""
    local = fetch(path)
    if local.suffix in (".npz", ".safetensors"):
        return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in read_params(local).items()}
    tree = _metadata(_find_item(local, "params"))
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _flatten_params(tree, local).items()}


def fetch(path: str | os.PathLike[str]) -> Path:
    """A local path; a URL (``gs://``, ``hf://`` and whatever fsspec knows) is mirrored first, once.

    The mirror is openpi's: ``<cache>/<host>/<path>``, with the cache folder in ``OPENPI_DATA_HOME`` or
    ``~/.cache/openpi``.
    """
    scheme, separator, rest = os.fspath(path).partition("://")
    if not separator:
        if not Path(path).exists():
            raise FileNotFoundError(f"no weights at {path}: the path does not exist")
        return Path(path).absolute()
    target = Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser() / rest.strip("/")
    if not target.exists():
        _download(os.fspath(path), scheme, target)
    return target


def _download(url: str, scheme: str, target: Path) -> None:
    try:
        import fsspec

        filesystem, remote = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"reading {scheme}:// needs an extra: pip install 'acrlpd[remote]' ({error})") from error
    partial = target.with_name(f"{target.name}.partial")  # so that a broken transfer is never taken for weights
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        filesystem.get(remote, str(partial), recursive=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no weights at {url}: {error}") from error
    except Exception as error:  # every file system has network errors of its own
        raise ConnectionError(
            f"could not copy {url} to {target}: {error!r}. Check the network and your access, or copy it there by hand."
        ) from error
    partial.rename(target)


def _find_item(path: Path, item: str) -> Path:
    """The Orbax folder of ``item``: ``path`` itself, inside it, or inside its highest-numbered step."""
    steps = [int(child.name) for child in path.iterdir() if child.name.isdigit()] if path.is_dir() else []
    candidates = [path / item, *(path / str(step) / item for step in sorted(steps, reverse=True))]
    if item == "params":
        candidates.insert(0, path)
    for candidate in candidates:
        if (candidate / "_METADATA").exists():
            return candidate
    raise ValueError(
        f"{path} holds no {item}: expected an Orbax folder (with a _METADATA file) there, in {item}/ or in "
        f"<step>/{item}/" + (", or a .npz or .safetensors file" if item == "params" else "")
    )


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _metadata(item: Path) -> Any:
    return _checkpointer().metadata(item).item_metadata.tree


def _restore(item: Path) -> Any:
    """The whole tree as numpy, whatever devices it was written from."""
    tree = _metadata(item)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return _checkpointer().restore(item, args=ocp.args.PyTreeRestore(tree, restore_args=as_numpy))


def _flatten_params(tree: Any, source: Path) -> dict[str, Any]:
    """What lies under "params", flat; the level "value" below every leaf, which openpi's training loop adds, is cut.

    Only the last element counts: the image tower has modules named "key" and "value".
    """
    flat = traverse_util.flatten_dict(tree.get("params") or {})
    if not flat:
        raise ValueError(f"{source} holds no arrays under 'params'; it has {sorted(tree)}")
    if all(path[-1] == "value" for path in flat):
        flat = {path[:-1]: leaf for path, leaf in flat.items()}
    return {"/".join(path): leaf for path, leaf in flat.items()}


def _read_npz(path: Path) -> Weights:
    """Arrays by path; a PaliGemma file has its image and language parts under "params", other subtrees are dropped."""
    with np.load(path, allow_pickle=False) as file:
        names = [name for name in file.files if name.startswith("params/")]
        if names:
            return {f"PaliGemma/{name.removeprefix('params/')}": file[name] for name in names}
        return {name: file[name] for name in file.files}


def _read_safetensors(path: Path) -> Weights:
    from safetensors import flax as safetensors

    return {name: np.asarray(value) for name, value in safetensors.load_file(path).items()}


# -- between disk and model --------------------------------------------------------------------------------------------


def flatten(model: nnx.Module) -> dict[str, jax.Array]:
    """A model's parameters by path."""
    return {path: param.get_value() for path, param in _params(model).items()}


def load_into(
    model: nnx.Module,
    weights: Mapping[str, np.ndarray],
    *,
    may_miss: str = LORA,
    place: Callable[[np.ndarray], Any] = jnp.asarray,
) -> None:
    """Puts ``weights`` into ``model``, in the model's dtypes; all problems are listed before anything changes.

    Parameters whose path matches ``may_miss`` keep what they hold, if the weights lack them. ``place`` moves an array
    to where it belongs, such as a sharding. The model may be abstract (``nnx.eval_shape``), but then must become
    complete.
    """
    params = _params(model)
    kept = {path for path in params.keys() - weights.keys() if re.fullmatch(may_miss, path)}
    problems = [
        f"missing: {path}, expected {_describe(params[path].get_value())}"
        for path in sorted(params.keys() - weights.keys() - kept)
    ]
    problems += [f"extra: {path}, found {_describe(weights[path])}" for path in sorted(weights.keys() - params.keys())]
    for path in sorted(params.keys() & weights.keys()):
        expected, found = params[path].get_value(), weights[path]
        if expected.shape != found.shape:
            problems.append(f"shape: {path}, expected {_describe(expected)}, found {_describe(found)}")
    problems += [
        f"missing: {path}, and the model was built without values to keep"
        for path in sorted(kept)
        if isinstance(params[path].get_value(), jax.ShapeDtypeStruct)
    ]
    if problems:
        listed = problems[:_MAX_LISTED] + [f"... and {len(problems) - _MAX_LISTED} more"] * (
            len(problems) > _MAX_LISTED
        )
        raise ValueError("the weights do not fit the model; is its config the right one?\n  " + "\n  ".join(listed))
    for path in params.keys() - kept:
        param = params[path]
        param.set_value(place(np.asarray(weights[path]).astype(param.get_value().dtype)))


def _params(model: nnx.Module) -> dict[str, nnx.Param]:
    return {"/".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _describe(array: Any) -> str:
    return f"{tuple(array.shape)} {np.dtype(array.dtype).name}"


# -- writing -----------------------------------------------------------------------------------------------------------


def write_params(path: str | os.PathLike[str], params: nnx.Module | Mapping[str, Any]) -> None:
    """Writes a ``params`` folder as openpi's training loop does; arrays keep their dtype and may be sharded."""
    target = _new(path)
    _checkpointer().save(target, args=ocp.args.PyTreeSave({"params": _nest(_flat(params))}))


def write_checkpoint(path: str | os.PathLike[str], checkpoint: TrainingCheckpoint) -> None:
    """Writes a step folder from which openpi's training loop can go on.

    Its optimizer is ``chain(clip, adamw)``: ``opt_state`` is ``[None, [{count, mu, nu}, None, {count}]]`` with ``mu``
    and ``nu`` nested like the trainable parameters.
    """
    target = _new(path)
    with_average = checkpoint.ema_params is not None
    train_state = {
        "step": _on_host(np.asarray(checkpoint.step, np.int32)),
        "params": _nest(checkpoint.params) if with_average else {},
        "model_def": None,
        "opt_state": jax.tree.map(_on_host, checkpoint.opt_state),
        "ema_params": None,
    }
    saved = checkpoint.ema_params if checkpoint.ema_params is not None else checkpoint.params
    items = ocp.args.Composite(
        params=ocp.args.PyTreeSave({"params": _nest(saved)}), train_state=ocp.args.PyTreeSave(train_state)
    )
    ocp.Checkpointer(ocp.CompositeCheckpointHandler()).save(target, args=items)


def write_safetensors(path: str | os.PathLike[str], params: nnx.Module | Mapping[str, Any]) -> None:
    """Writes one file whose tensors are named by the parameters' paths."""
    from safetensors import flax as safetensors

    safetensors.save_file({name: jnp.asarray(value) for name, value in _flat(params).items()}, os.fspath(path))


def _flat(params: nnx.Module | Mapping[str, Any]) -> Mapping[str, Any]:
    return flatten(params) if isinstance(params, nnx.Module) else params


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    leaves = {(*path.split("/"), "value"): _on_host(value) for path, value in flat.items()}
    return traverse_util.unflatten_dict(leaves)


def _on_host(value: Any) -> jax.Array:
    """A numpy array as a JAX array in host memory: only of those Orbax notes chunks and sharding, as openpi's do."""
    if isinstance(value, jax.Array):
        return value
    return jax.device_put(value, jax.local_devices(backend="cpu")[0])


def _new(path: str | os.PathLike[str]) -> Path:
    target = Path(path).absolute()
    if target.exists():
        raise FileExistsError(f"{target} exists already: name another folder, or delete it first")
    return target
