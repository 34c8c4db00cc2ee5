"""Commands on files that others made, or damaged: an exit code and one line that names the file, never a traceback."""

import json
import os
import struct
import zipfile

import numpy as np
import pytest

from acrlpd import presets
from acrlpd.cli.main import main
from acrlpd.config import to_dict
from acrlpd.data.formats import hdf5
from acrlpd.training.metrics import JsonlWriter, write_json
from acrlpd.training.run import RunFiles
from acrlpd.types import Episode

DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not UTF-8": lambda content: b"\xff" + content,
    "a list": lambda content: b"[1, 2]\n",
    "a number": lambda content: b"5\n",
    "deep": lambda content: b"[" * 100_000 + b"\n",
    "digits": lambda content: b'{"step": ' + b"9" * 5000 + b"}\n",
    "foreign": lambda content: b'{"step": {}, "updates": [], "phases": 3, "env": [], "name": {}}\n',
    "terminal": lambda content: b'{"\\u001b[31m": 1}\n',
}
# half a line is left by a kill; a report shows what there is of a configuration
HARMLESS = {("metrics", "empty"), ("metrics", "cut")}
HARMLESS_TO_REPORT = {("config", "foreign"), ("config", "terminal")}


@pytest.fixture
def run(tmp_path):
    files = RunFiles(tmp_path / "run")
    write_json(files.config, to_dict(presets.get_preset("demo")))
    writer = JsonlWriter(files.metrics)
    for step in (1, 2):
        writer.write({"step": step, "phase": "offline", "env_steps": 0, "wall_s": 1.0, "train/total_loss": 1.0})
    writer.close()
    summary = {"phases": {}, "wall_s": 1.0, "cpu_s": 1.0, "updates": 2, "env_steps": 0}
    write_json(files.summary, summary)
    write_json(files.full_evaluation, {"step": 2, "tasks": {}})
    write_json(files.best, {"step": 2, "success": 0.5})
    files.checkpoints.mkdir()
    return files


def refused(capsys, *words):
    """What a command says that ends with the user's mistake."""
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("acrlpd: ")
    assert "Traceback" not in said
    assert not any(ord(letter) < 32 and letter not in "\n\t" for letter in said)
    return said


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("part", "command"),
    [
        ("config", ["report"]),
        ("metrics", ["report"]),
        ("summary", ["report"]),
        ("full_evaluation", ["report"]),
        ("config", ["config", "show"]),
        ("config", ["train", "--resume"]),
        ("best", ["export"]),
    ],
)
def test_a_damaged_file_of_a_run_is_named(run, capsys, part, command, damage):
    path = getattr(run, part)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    if (part, damage) in HARMLESS | (HARMLESS_TO_REPORT if command == ["report"] else set()):
        assert main([*command, str(run.directory)]) == 0
        return
    target = run.directory / "best" if part == "best" else run.directory
    name = ["--checkpoint"] if command == ["export"] else []
    words = [*command, *name, target, *(["--output_dir", run.directory / "out"] if command == ["export"] else [])]
    assert path.name in refused(capsys, *words)


@pytest.mark.parametrize("text", [b"batch_size: \xff", b"a: [", b"agent: {discount: 1, discount: 0}", b"- 1", b"a: *b"])
def test_a_damaged_yaml_is_named(tmp_path, capsys, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    said = refused(capsys, "config", "show", path)
    assert "run.yaml" in said
    assert said.count("\n") == 1


def safetensors(path, dtype="F8_E4M3", shape=(4,), size=4):
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def large_npz(path):
    with zipfile.ZipFile(path, "w") as file, file.open("w.npy", "w") as member:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3)}
        np.lib.format.write_array_header_1_0(member, header)


WEIGHTS = {
    "float8.safetensors": safetensors,
    "huge.safetensors": lambda path: safetensors(path, "F32", (10**12,), 4),
    "header.safetensors": lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
    "large.npz": large_npz,
    "pipe.npz": os.mkfifo,
    "pipe.safetensors": os.mkfifo,
    "folder.npz": os.mkdir,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", [["inspect"], ["convert"]])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_a_trap_are_named(tmp_path, capsys, name, command):
    path = tmp_path / name
    WEIGHTS[name](path)
    target = [tmp_path / "out.npz"] if command == ["convert"] else []
    assert name in refused(capsys, "weights", *command, path, *target)


@pytest.mark.timeout(60)
def test_a_pipe_in_an_orbax_folder_is_not_waited_for(tmp_path, capsys):
    (tmp_path / "params").mkdir()
    os.mkfifo(tmp_path / "params" / "_METADATA")
    assert "_METADATA" in refused(capsys, "weights", "inspect", tmp_path)


def test_texts_of_a_data_set_do_not_reach_the_terminal_raw(tmp_path, capsys):
    zeros = np.zeros((3, 2), np.float32)
    ends = np.arange(3) == 2
    episode = Episode(zeros, zeros, ends.astype(np.float32), ends, task="lift\x1b[2J\x07", success=True)
    hdf5.write_episode(tmp_path / "episode_0.hdf5", episode)
    assert main(["data", "inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "lift\\x1b[2J\\x07" in said
    assert "\x1b" not in said
