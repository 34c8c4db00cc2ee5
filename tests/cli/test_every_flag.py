"""Every flag of every command changes what the command asks for, prints or writes.

``COMMANDS`` has for each command the words it is tried with, the functions that do its work, which are only listened to
here, and for each flag its words and what else must be said for it to matter. What those functions make of an argument
is tested where they are.
"""

import asyncio
import contextlib
import dataclasses
import os
import shlex
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tests.envs.test_custom import CAR

from acrlpd import deploy, presets
from acrlpd.cli import (
    collect,
    config,
    data,
    diagnose,
    doctor,
    export,
    improve,
    norm_stats,
    plan,
    report,
    serve,
    train,
    weights,
)
from acrlpd.cli import eval as evaluation
from acrlpd.cli.main import COMMANDS as NAMES
from acrlpd.cli.main import main
from acrlpd.config import TrainConfig
from acrlpd.data import sources, statistics
from acrlpd.data.formats import hdf5
from acrlpd.data.tools import convert, inspection
from acrlpd.data.view import normalize
from acrlpd.data.view.robots import mapping
from acrlpd.deploy import improving
from acrlpd.deploy.diagnosis import Diagnosis
from acrlpd.doctor import Check
from acrlpd.envs.env import EnvConfig
from acrlpd.training import loading, memory, setup
from acrlpd.training.evaluate import summarize
from acrlpd.training.findings import Finding
from acrlpd.types import Episode


@dataclasses.dataclass(frozen=True)
class Command:
    arguments: type  # whose fields are the flags
    words: str  # with which it is tried; {tmp} is a folder with an episode set "set" and weights "w.npz"
    flags: dict[str, str | tuple[str, str]]  # a field's words, with what else must be said; =: instead of ``words``
    listened_to: tuple[tuple[Any, str, Any], ...] = ()  # module, function, what it returns


ROLLOUT = SimpleNamespace(success=True, returns=0.0, length=3)
TASK = SimpleNamespace(rollouts=[ROLLOUT], evaluation=summarize([ROLLOUT]))
FINDINGS = SimpleNamespace(
    task=TASK, to_dict=dict, observation_noise={}, action_noise={}, best_of_n={}, guidance={}, agreement=None
)
RUN = dataclasses.replace(presets.get_preset("demo"), env=EnvConfig(CAR))
LOADED = SimpleNamespace(agent=None, transform=None, config=RUN, step=4)
STATS = {"state": normalize.NormStats(np.zeros(1), np.ones(1))}
ORIGINAL = improving.Original("there", Path("there/params"), RUN, {})
PLAN = memory.Plan(1, 1, 1, 10, 10, 10, 10, 10, 10, 1, memory.Machine(2, 9000))
SOURCE = mock.Mock(format="acrlpd", num_episodes=1, lengths=np.array([3]), cameras=("top",))
SOURCE.window.return_value = np.zeros((1, 14))
FOUND = inspection.Inspection(contents=None, problems=[])
OPTIONS = {
    "read.fps": "--fps 7",
    "read.default_task": "--default_task lift",
    "read.cameras": "--cameras top",
    "read.state_keys": "--state_keys a b",
    "read.action_keys": "--action_keys a",
    "read.filter_key": "--filter_key some",
    "read.episodes": "--episodes 3 0",
    "read.tolerance_s": "--tolerance_s 0.1",
    "read.check_images": "--check_images True",
    "read.align_observations": "--align_observations",
    "read.jpeg_bgr": "--jpeg_bgr",
    "read.drop_idle": "--drop_idle",
    "read.clip_actions": "--clip_actions",
    "read.cube_goal": "--cube_goal 1 2 3",
    "read.button_goal": "--button_goal 0 1",
}
READ = {**OPTIONS, "read.num_workers": f"--num_workers {(os.cpu_count() or 1) + 1}"}
ON_DATA = "--data set"
OPENPI = {
    "openpi.robot": "--robot droid",
    "openpi.action_horizon": "--action_horizon 5",
    "openpi.asset_id": "--asset_id droid",
    "openpi.tokenizer": "--tokenizer t.model",
    "openpi.fast_tokenizer": "--fast_tokenizer fast",
    "openpi.temperature": "--temperature 0.5",
    "openpi.delta_mask": "--delta_mask 6 -1",
    "openpi.max_token_len": "--max_token_len 9",
    "openpi.discrete_state_input": "--discrete_state_input True",
    "openpi.quantiles": "--quantiles True",
    "openpi.dtype": "--dtype float32",
}
BESIDE = SimpleNamespace(
    told=(),
    config=RUN,
    step=4,
    evaluate=lambda **options: SimpleNamespace(to_dict=lambda: {name: str(value) for name, value in options.items()}),
)
CHECKPOINT = "--policy checkpoint --checkpoint there"

COMMANDS = {
    "train": Command(
        train.TrainArguments,
        "demo",
        {
            "resume": "--resume",
            "overwrite": "--overwrite",
            "override": "--override",
            "override_lr_schedule": "--override_lr_schedule",
        },
        ((train, "run", 0),),
    ),
    "improve": Command(
        improve.ImproveArguments,
        "there --data.path set",
        {
            "robot": "--robot droid",
            "output_dir": "--output_dir elsewhere",
            "steps": "--steps 3",
            "resume": "--resume",
            "overwrite": "--overwrite",
        },
        (
            (improving, "open_original", ORIGINAL),
            (improving, "check", "prospect"),
            (setup, "make_trainer", mock.Mock()),
            (improve, "_judged", None),
            (improve, "_keep", None),
            (improve, "told", []),
        ),
    ),
    "eval": Command(
        evaluation.EvalArguments,
        "--checkpoint there",
        {
            "checkpoint": "--checkpoint elsewhere",
            "data": ON_DATA,
            "validation_fraction": ("--validation_fraction 0.2", ON_DATA),
            "chunks": ("--chunks 7", ON_DATA),
            "execute_horizon": ("--execute_horizon 2", ON_DATA),
            **{name: (f"--read.{words.removeprefix('--')}", ON_DATA) for name, words in OPTIONS.items()},
            **{name: (words, ON_DATA) for name, words in OPENPI.items()},
            "compare": "--compare other",
            "tasks": f"--tasks {CAR} {CAR}s",
            "episodes": "--episodes 3",
            "first_seed": "--first_seed 5",
            "mode": "--mode bc",
            "extraction": "--extraction best_of_n",
            "guidance_weights": "--guidance_weights 0 2",
            "compare_extraction": ("--compare_extraction best_of_n", "--compare other"),
            "compare_guidance_weights": ("--compare_guidance_weights 2", "--compare other"),
            "num_envs": "--num_envs 3",
            "seed": "--seed 1",
            "full": "--full",
            "protocol.observation_noise": ("--protocol.observation_noise 0.5", "--full"),
            "protocol.action_noise": ("--protocol.action_noise 0.5", "--full"),
            "protocol.best_of_n": ("--protocol.best_of_n 3", "--full"),
            "protocol.guidance_weights": ("--protocol.guidance_weights 0.5", "--full"),
            "videos": "--videos 2",
            "output": "--output file.json",
            "json": "--json",
        },
        (
            (loading, "load_stored", LOADED),
            (setup, "make_environments", SimpleNamespace(close=lambda: None)),
            (loading, "locate_checkpoint", (Path("run/checkpoints"), 4)),
            (evaluation, "put_beside", BESIDE),
            (evaluation, "check_cameras", None),
            (evaluation, "sentences", []),
            (evaluation, "ACRLPDEvaluationProtocol", SimpleNamespace(run=lambda agent: FINDINGS)),
            (evaluation, "compare", SimpleNamespace(to_dict=dict)),
            (evaluation, "save_videos", []),
            (evaluation, "write_json", None),
        ),
    ),
    "diagnose": Command(
        diagnose.DiagnoseArguments,
        "there --data set",
        {
            "checkpoint": "=elsewhere --data set",
            "data": "=there --data other",
            "validation_fraction": "--validation_fraction 0.2",
            "chunks": "--chunks 7",
            "execute_horizon": "--execute_horizon 2",
            **{name: f"--read.{words.removeprefix('--')}" for name, words in OPTIONS.items()},
            **OPENPI,
            "env_name": f"--env.name {CAR}",
            "replay_episodes": ("--replay_episodes 3", f"--env.name {CAR}"),
            "replay_seed": ("--replay_seed 3", f"--env.name {CAR}"),
            "extraction": "--extraction best_of_n",
            "seed": "--seed 1",
            "html": "--html {tmp}/page.html",
            "json": "--json",
        },
        (
            (diagnose, "put_beside", BESIDE),
            (diagnose, "diagnose", Diagnosis((), {})),
            (diagnose, "replay", Finding("replay", "good", "")),
            (diagnose, "page", ""),
        ),
    ),
    "collect": Command(
        collect.CollectArguments,
        "--output there",
        {
            "output": "--output elsewhere",
            "env.name": f"--name {CAR}",
            "env.max_episode_steps": "--max_episode_steps 5",
            "env.cameras": "--cameras top",
            "env.image_size": "--image_size 8",
            "env.reward": "--reward 0/1",
            "env.instruction": "--instruction go",
            "episodes": "--episodes 3",
            "policy": "--policy random",
            "noise_range": "--noise_range 0 1",
            "checkpoint": ("--checkpoint other", CHECKPOINT),
            "mode": ("--mode bc", CHECKPOINT),
            "extraction": ("--extraction best_of_n", CHECKPOINT),
            "guidance_weights": ("--guidance_weights 0 2", CHECKPOINT),
            "num_envs": ("--num_envs 3", CHECKPOINT),
            "num_workers": "--num_workers 2",
            "seed": "--seed 1",
        },
        ((collect, "collect_prior", None), (collect, "collect_by_agent", None), (loading, "load_stored", LOADED)),
    ),
    "serve": Command(
        serve.ServeArguments,
        "--checkpoint there",
        {
            "checkpoint": "--checkpoint elsewhere",
            "server.host": "--host 0.0.0.0",
            "server.port": "--port 0",
            "server.max_batch_size": "--max_batch_size 3",
            "server.batch_wait_s": "--batch_wait_s 3",
            "server.max_concurrent_requests": "--max_concurrent_requests 3",
            "server.request_timeout_s": "--request_timeout_s 3",
            "server.max_requests_per_s": "--max_requests_per_s 3",
            "server.max_connections": "--max_connections 3",
            "server.max_connections_per_address": "--max_connections_per_address 3",
            "server.max_message_bytes": "--max_message_bytes 3",
            "server.max_picture_pixels": "--max_picture_pixels 3",
            "server.message_timeout_s": "--message_timeout_s 3",
            "server.ping_interval_s": "--ping_interval_s 3",
            "server.allow_anonymous": "--allow_anonymous",
            "server.tls_cert": ("--tls_cert other", "--tls_cert a --tls_key b"),
            "server.tls_key": ("--tls_key other", "--tls_cert a --tls_key b"),
            "server.reload_interval_s": "--reload_interval_s 3",
            "server.drain_timeout_s": "--drain_timeout_s 3",
            "server.show_tracebacks": "--show_tracebacks",
            "acting.mode": "--mode bc",
            "acting.num_samples": "--num_samples 3",
            "acting.num_steps": "--num_steps 3",
            "acting.real_time": "--real_time",
            "acting.latency_budget_ms": "--latency_budget_ms 3",
            "acting.default_prompt": "--default_prompt go",
            "acting.seed": "--seed 1",
            "acting.extraction": "--extraction best_of_n",
            "acting.guidance_weights": "--guidance_weights 0 2",
            **OPENPI,
            "api_key_file": "--api_key_file {tmp}/keys",
            "platform": "--platform droid",
        },
        (
            (serve, "open_door", None),
            (deploy, "is_ours", False),
            (deploy, "openpi_policy", None),
            (serve, "PolicyServer", SimpleNamespace(run=lambda on_ready: asyncio.sleep(0))),
        ),
    ),
    "export": Command(
        export.ExportArguments,
        "--checkpoint there --output_dir out",
        {
            "checkpoint": "--checkpoint elsewhere",
            "output_dir": "--output_dir other",
            "optimization_level": "--optimization_level fast",
            "platform": "--platform droid",
            "data": "--data set",
            "extraction": "--extraction own.py:Own",
            "guidance_weights": "--guidance_weights 0 2",
        },
        ((export, "export_acrlpd_model", "out"),),
    ),
    "report": Command(
        report.ReportArguments,
        "there",
        {"run": "=elsewhere", "env_name": "--env.name custom/a:b"},
        ((report, "write_report", "page"),),
    ),
    "weights inspect": Command(
        weights.InspectArguments,
        "{tmp}/w.npz",
        {"path": "={tmp}/absent.npz", "variant": "--variant pi0", "json": "--json"},
    ),
    "weights convert": Command(
        weights.ConvertArguments,
        "{tmp}/w.npz {tmp}/new.npz",
        {
            "source": "={tmp}/v.npz {tmp}/new.npz",
            "target": "={tmp}/w.npz {tmp}/newer.npz",
            "layout": "--layout safetensors",
            "dtype": "--dtype bfloat16",
            "variant": "--variant pi0",
            "merge_adapters": "--merge_adapters",
            "adapter_scaling": "--merge_adapters --adapter_scaling 3",
            "overwrite": "--overwrite",
        },
        ((weights.weights, "check_target", "npz"), (weights.weights, "write", None), (weights.weights, "inspect", {})),
    ),
    "data inspect": Command(
        data.InspectArguments,
        "{tmp}/set",
        {"path": "={tmp}/other", "json": "--json", **READ},
        ((inspection, "inspect", FOUND),),
    ),
    "data validate": Command(
        data.ValidateArguments,
        "{tmp}/set",
        {"path": "={tmp}/other", "json": "--json", "decode": "--no-decode", **READ},
        ((inspection, "inspect", FOUND),),
    ),
    "data convert": Command(
        data.ConvertArguments,
        "{tmp}/set new",
        {
            "path": "={tmp}/other new",
            "output": "={tmp}/set newer",
            "to": "--to hdf5",
            "pictures": "--pictures png",
            "compression": ("--compression lzf", "--to hdf5"),
            "robot_type": "--robot_type arm",
            "success": "--success True",
            "on_bad_episode": "--on_bad_episode skip",
            **READ,
        },
        ((sources, "open_episodes", SOURCE), (convert, "to_hdf5", "new"), (convert, "to_lerobot", "new")),
    ),
    "data cache": Command(
        data.CacheArguments,
        "{tmp}/set frames",
        {
            "path": "={tmp}/other frames",
            "output": "={tmp}/set other",
            "height": "--height 4",
            "width": "--width 4",
            "on_bad_episode": "--on_bad_episode skip",
            **READ,
        },
        (
            (data, "_opened", SOURCE),
            (data, "FrameCache", mock.Mock(**{"missing.return_value": [], "total_bytes.return_value": 1})),
        ),
    ),
    "config show": Command(config.ShowArguments, "demo", {"json": "--json"}),
    "doctor": Command(
        doctor.DoctorArguments, "", {"json": "--json"}, ((doctor, "validate_installation", [Check("a", True, "b")]),)
    ),
    "plan": Command(
        plan.PlanArguments,
        "demo",
        {
            "devices": "--devices 2",
            "device_memory": "--device_memory 7GB",
            "fsdp": "--fsdp 2",
            "json": "--json",
        },
        ((memory, "plan", PLAN),),
    ),
    "norm-stats": Command(
        norm_stats.NormStatsArguments,
        "there",
        {
            "data_path": "=elsewhere",
            "out": "--out folder",
            "json": "--json",
            "horizon": "--horizon 3",
            "robot": "--robot aloha",
            "delta_mask": "--delta_mask 6 -1",
            "pi05": ("--pi05", "--robot libero"),
            **OPTIONS,
            "weights": ("--weights 1 3", "elsewhere"),
            "num_episodes": "--num_episodes 1",
            "min_std": "--min_std 0",
            "on_bad_episode": "--on_bad_episode skip",
        },
        (
            (norm_stats, "identify", "hdf5"),
            (norm_stats, "open_episodes", SOURCE),
            (mapping, "check", None),  # of the data's widths, which are no robot's here
            (statistics, "from_sources", STATS),
            (normalize, "save", None),
        ),
    ),
}


def flags_of(arguments: type, path: str = "") -> set[str]:
    """By field; a run's configuration, whose every field is a flag too, is test_every_field's."""
    found: set[str] = set()
    hints = typing.get_type_hints(arguments)
    for field in dataclasses.fields(arguments):
        if hints[field.name] is TrainConfig:
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            found |= flags_of(hints[field.name], f"{path}{field.name}.")
        else:
            found.add(f"{path}{field.name}")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    numbers = np.zeros((3, 2), np.float32)
    episode = Episode(numbers, numbers, numbers[:, 0], np.zeros(3, bool), task="lift", success=True)
    hdf5.write_episode(hdf5.episode_path(folder / "set", 0), episode)
    for name, number in (("w", 1), ("v", 2)):
        shapes = {"w": (1, 1, 2, 2), "lora_a": (1, 1, 2, 1), "lora_b": (1, 1, 1, 2)}
        layer = "PaliGemma/llm/layers/attn/q_einsum"
        arrays = {f"{layer}/{leaf}": np.full(shape, number, np.float32) for leaf, shape in shapes.items()}
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "keys").write_text("one\n")
    return folder


def outcome(command: str, words: str, folder: Path, capsys: Any) -> Any:
    """What a command asks its functions for, says and returns."""
    told: list[Any] = []
    with contextlib.ExitStack() as patches:
        for module, name, returns in COMMANDS[command].listened_to:
            patches.enter_context(mock.patch.object(module, name, listener(told, name, returns)))
        try:
            code: Any = main([*command.split(), *shlex.split(words.format(tmp=folder))])
        except SystemExit as stop:
            code = f"refused by the parser: {stop.code}"
    shown = capsys.readouterr()
    return code, [str(each) for each in told], shown.out, shown.err


def listener(told: list[Any], name: str, returns: Any) -> Any:
    def called(*arguments: Any, **options: Any) -> Any:
        told.append((name, arguments, options))
        return returns

    return called


def test_no_command_and_no_flag_is_forgotten():
    assert {name.split()[0] for name in COMMANDS} == set(NAMES) - {"list"}  # which has no flags
    for command in COMMANDS.values():
        assert flags_of(command.arguments) == set(command.flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_words_are_the_same_twice(command, folder, capsys):
    one, other = (outcome(command, COMMANDS[command].words, folder, capsys) for _ in range(2))
    assert one == other


@pytest.mark.parametrize(("command", "flag"), [(name, flag) for name, each in COMMANDS.items() for flag in each.flags])
def test_a_flag_has_its_effect(command, flag, folder, capsys):
    said, also = COMMANDS[command].flags[flag], ""
    if not isinstance(said, str):
        said, also = said
    before = f"{COMMANDS[command].words} {also}"
    words = said.removeprefix("=") if said.startswith("=") else f"{before} {said}"
    one, other = (outcome(command, each, folder, capsys) for each in (before, words))
    assert not str(other[0]).startswith("refused"), other
    assert one[0] in (0, data.EXIT_UNUSABLE), one
    assert one != other
