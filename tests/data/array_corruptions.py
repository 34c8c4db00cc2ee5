"""Damage to arrays, tables and their descriptions, by format: see ``corruptions.py``."""

import io
import os
import shutil
import zipfile
import zlib

import h5py
import numpy as np
from PIL import Image

DEEP = "[" * 100_000
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
OPTIONAL = ("success", "metadata", "ep_meta", "env_args", "num_samples", "sim", "total")  # attributes


def pick(rng, choices):
    return choices[int(rng.integers(len(choices)))]


# -- HDF5


def datasets(file):
    found = []
    file.visititems(lambda name, each: found.append(name) if isinstance(each, h5py.Dataset) else None)
    return [name for name in sorted(found) if not name.startswith("mask")]


def is_optional(name):
    return name.endswith(("rewards", "step_start", "movement_enabled", "qvel"))


def h5_array(path, rng):
    """A data set of another type, rank, length or content."""
    with h5py.File(path, "r+") as file:
        name = pick(rng, datasets(file))
        values = file[name][...]
        what, other = pick(rng, list(arrays_like(values).items()))
        if name.endswith(("rewards",)) and what == "nothing":
            return None
        attributes = dict(file[name].attrs)
        del file[name]
        if other is None:
            file.create_dataset(name, data=h5py.Empty(values.dtype))
        else:
            file[name] = other
        file[name].attrs.update(attributes)
    return f"{name}: {what}"


def arrays_like(values):
    """By what they are; none is as good as ``values`` with other numbers."""
    spoilt = values.astype(np.float64)
    infinite, spoilt.flat[0] = spoilt.copy(), np.nan
    infinite.flat[-1] = 1e300
    return {
        "text": np.full(values.shape, b"x"),
        "complex": values.astype(np.complex64),
        "NaN": spoilt,
        "not finite": infinite,
        "a structure": np.zeros(values.shape, [("a", "f4"), ("b", "i4")]),
        "another axis": values[..., None],
        "flat": values.ravel() if values.ndim > 1 else values[:, None, None],
        "a row less": values[:-1],
        "the last row twice": np.concatenate([values, values[-1:]]),
        "no rows": values[:0],
        "a number": values.ravel()[0],
        "nothing": None,
        "dates": np.zeros(values.shape, "i8").astype(h5py.opaque_dtype(np.dtype("M8[s]"))),
    }


def h5_size(path, rng):
    """A shape that nothing could hold, or numbers that were never written."""
    with h5py.File(path, "r+") as file:
        name = pick(rng, datasets(file))
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        kind = pick(rng, ["huge", "huge chunk", "huge row", "never written", "never written, plain"])
        if kind == "huge":
            file.create_dataset(name, (10**13, *shape[1:]), dtype, chunks=(1, *shape[1:]), compression="gzip")
        elif kind == "huge row":
            file.create_dataset(name, (*shape[:1], 10**13), dtype, chunks=(1, 1000))
        elif kind == "huge chunk":
            file.create_dataset(name, (10**9, *shape[1:]), dtype, chunks=(10**6, *shape[1:]))
        else:
            chunks = (1, *shape[1:]) if kind == "never written" else None
            file.create_dataset(name, shape, dtype, chunks=chunks)
    return f"{name}: {kind}"


def h5_link(path, rng):
    """A data set or group behind a link: inside of the file, where it is good, to nowhere, in a circle, outside."""
    with h5py.File(path, "r+") as file:
        name = pick(rng, datasets(file))
        if rng.random() < 0.3 and "/" in name:
            name = name.rpartition("/")[0]
        kind = pick(rng, ["inside", "beside", "circle", "file", "pipe", "storage", "virtual", "nowhere"])
        if kind in ("storage", "virtual") and isinstance(file[name], h5py.Group):
            return None
        if kind in ("circle", "nowhere") and is_optional(name):
            return None
        elsewhere = path.with_name(".elsewhere.hdf5")
        if kind == "pipe":
            os.mkfifo(elsewhere)
        else:
            shutil.copy(path, elsewhere)
        file.move(name, "moved")
        if kind in ("storage", "virtual"):
            of = file["moved"]
            if kind == "storage":
                file.create_dataset(name, of.shape, of.dtype, external=[(str(elsewhere), 0, of.nbytes)])
            else:
                layout = h5py.VirtualLayout(of.shape, of.dtype)
                layout[...] = h5py.VirtualSource(str(elsewhere), name, of.shape, of.dtype)
                file.create_virtual_dataset(name, layout)
            del file["moved"]
        else:
            links = {
                "inside": h5py.SoftLink("/moved"),
                "beside": h5py.SoftLink("/" + name + "-moved"),
                "circle": h5py.SoftLink("/" + name),
                "file": h5py.ExternalLink(elsewhere.name, "/" + name),
                "pipe": h5py.ExternalLink(elsewhere.name, "/" + name),
                "nowhere": h5py.SoftLink("/nowhere"),
            }
            if kind == "beside":
                file.move("moved", name + "-moved")
                if "images" in name or "camera_type" in name or "demo" in name:
                    return "a camera more"
            file[name] = links[kind]
    return f"{name}: {kind}"


def h5_name(path, rng):
    """A data set that has another name, or is a group."""
    with h5py.File(path, "r+") as file:
        name = pick(rng, datasets(file))
        if is_optional(name):
            return None
        head = name.rpartition("/")[0]
        other = pick(rng, ["", "../x", "\x1b[31m", "x" * 3000, "group"])
        if other == "group":
            del file[name]
            file.create_group(name)
        elif other:
            file.move(name, "/".join(filter(None, [head, other.replace("/", "|")])))
        else:
            del file[name]
    return f"{name} -> {other[:10]!r}"


def h5_attribute(path, rng):
    with h5py.File(path, "r+") as file:
        holders = [file, *(file[name] for name in ("data", "data/demo_1") if name in file)]
        holder = pick(rng, holders)
        names = sorted(holder.attrs)
        if not names:
            return None
        name = pick(rng, names)
        if name not in OPTIONAL and rng.random() < 0.4:
            del holder.attrs[name]
            return f"{name} removed"
        if name in ("sim", "total"):
            return None
        trap = pick(rng, [np.zeros((2, 2)), "{" * 5, DEEP[:60_000], 5.5, h5py.Empty("f4"), b"\xff\xfe", "[1]"])
        if name == "task" and isinstance(trap, str):
            return None
        holder.attrs[name] = trap
    return f"{name} = {str(trap)[:20]!r}"


def h5_jpeg(path, rng):
    with h5py.File(path, "r+") as file:
        if "observations/images/top" not in file or file["observations/images/top"].ndim != 2:
            return None
        rows = file["observations/images/top"][...]
        row = rows[int(rng.integers(len(rows)))]
        content = row.tobytes().rstrip(b"\0")
        kind, other = pick(rng, list(pictures_like(content).items()))
        row[:] = 0
        row[: len(other)] = np.frombuffer(other[: len(row)], np.uint8)
        file["observations/images/top"][...] = rows
    return kind


def other_size():
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures_like(content):
    trap = bytearray(content)
    if content.startswith(b"\x89PNG"):
        header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + content[24:29]
        trap[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    found = {"cut": content[: len(content) // 2], "nearly whole": content[:-9], "PostScript": EPS, "nothing": b""}
    return (
        found | {"text": b"no picture", "other size": other_size()} | ({"huge": bytes(trap)} if trap != content else {})
    )


# -- parquet


def read_table(path):
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        return pq.read_table(file)


def write_table(path, table):
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd")


CHECKED = ("timestamp", "frame_index", "episode_index", "index", "length", "dataset_from_index", "dataset_to_index")
CHECKED += ("data/chunk_index", "data/file_index")
UNUSED = ("tasks",)


def pq_cell(path, rng):
    """One value that is missing, not finite, of another kind, or another where it can be known."""
    table = read_table(path)
    names = [name for name in table.column_names if name not in UNUSED]
    name = pick(rng, names)
    cells = table[name].to_pylist()
    at = int(rng.integers(len(cells)))
    cell = cells[at]
    traps = {"null": None}
    if isinstance(cell, dict):
        content = pictures_like(cell["bytes"]) | {"flipped": flipped_picture(cell["bytes"], rng)}
        traps |= {kind: {"bytes": other, "path": "../x.png"} for kind, other in content.items()}
        traps["no bytes"] = {"bytes": None, "path": "/etc/passwd"}
    elif isinstance(cell, list):
        traps |= {"a number less": cell[:-1], "NaN": [*cell[:-1], float("nan")], "empty": []}
    elif isinstance(cell, float):
        traps |= {"NaN": float("nan"), "large": 1e30} if name != "next.reward" else {"NaN": float("nan")}
    elif isinstance(cell, int) and name in CHECKED:
        traps |= {"one more": cell + 1, "negative": -1, "large": 2**40}
    elif isinstance(cell, int):
        traps |= {"large": 2**40, "negative": -1}
    kind, cells[at] = pick(rng, list(traps.items()))
    return replaced(path, table, name, cells, f"row {at}: {kind}")


def flipped_picture(content, rng):
    content = bytearray(content)
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    return bytes(content)


def replaced(path, table, name, cells, told):
    import pyarrow as pa

    kind = table.schema.field(name).type
    if pa.types.is_fixed_size_list(kind):
        kind = pa.list_(kind.value_type)
    column = pa.array(cells, kind)
    write_table(path, table.set_column(table.column_names.index(name), name, column))
    return f"{name}, {told}"


def pq_column(path, rng):
    """A column that is gone, twice, has another name or another kind."""
    import pyarrow as pa

    table = read_table(path)
    needed = [name for name in table.column_names if name not in (*UNUSED, "next.reward")]
    name = pick(rng, needed)
    at = table.column_names.index(name)
    kind = pick(rng, ["gone", "twice", "other name", "texts", "lists", "zero rows", "booleans"])
    if kind == "gone":
        table = table.drop_columns([name])
    elif kind == "twice":
        table = table.append_column(name, table[name])
    elif kind == "other name":
        other = pick(rng, ["../x", "\x1b[31m", ""])
        table = table.rename_columns([other if each == name else each for each in table.column_names])
        if path.name == "tasks.parquet" and name != "task_index":
            return None
    elif kind == "zero rows":
        table = table.slice(0, 0)
    elif kind == "texts":
        if path.name == "tasks.parquet" and name != "task_index":
            return None
        table = table.set_column(at, name, pa.array(["x"] * len(table)))
    elif kind == "lists":
        table = table.set_column(at, name, pa.array([[[1.0], [2.0]]] * len(table)))
    else:
        table = table.set_column(at, name, pa.array([True] * len(table)))
    write_table(path, table)
    return f"{name}: {kind}"


def pq_rows(path, rng):
    """Rows removed, twice, or in another order, each time all of a row."""
    table = read_table(path)
    order = list(range(len(table)))
    at = int(rng.integers(len(order)))
    kind = pick(rng, ["less", "twice", "reversed", "swapped"])
    if kind == "less":
        del order[at]
    elif kind == "twice":
        order.insert(at, at)
    elif kind == "reversed":
        order.reverse()
    else:
        other = int(rng.integers(len(order)))
        order[at], order[other] = order[other], order[at]
    write_table(path, table.take(order))
    return f"row {at} {kind}"


# -- npz


def npz_array(path, rng):
    with np.load(path) as file:
        arrays = dict(file)
    name = pick(rng, ["observations", "actions", "terminals"])
    others = {key: value for key, value in arrays_like(arrays[name]).items() if value is not None and key != "dates"}
    others["objects"] = np.array([{}, []], object)
    others["gone"] = None
    kind, other = pick(rng, list(others.items()))
    if other is None:
        del arrays[name]
    else:
        arrays[name] = other
    np.savez(path, **arrays)
    return f"{name}: {kind}"


def npz_member(path, rng):
    """A member whose header is a lie, that occurs twice, or has a name of its own."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    kind = pick(rng, ["huge shape", "smaller shape", "twice", "other name", "bomb"])
    content = members["actions.npy"]
    header = io.BytesIO()
    rows = {"huge shape": 10**13, "bomb": 10**9}.get(kind, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (rows, 3)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, each in members.items():
            if name == "actions.npy" and kind in ("huge shape", "smaller shape"):
                each = header.getvalue() + content[128:]
            elif name == "actions.npy" and kind == "bomb":
                each = header.getvalue() + bytes(20 << 20)
            elif name == "actions.npy" and kind == "other name":
                name = pick(rng, ["../actions.npy", "\x1b.npy", "actions"])
            file.writestr(name, each)
        if kind == "twice":
            file.writestr("actions.npy", members["observations.npy"])
    return kind
