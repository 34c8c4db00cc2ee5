"""acrlpd config, the founding design's script, and --resume with other values."""

import argparse
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
from tests.training.looks import leaves

from acrlpd import presets
from acrlpd.cli import train
from acrlpd.cli.configured import starting_point, take
from acrlpd.cli.main import main
from acrlpd.config import TrainConfig, from_dict, to_dict
from acrlpd.data.formats.lerobot import reader as lerobot
from acrlpd.overrides import load_yaml

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_acrlpd_pi0.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_acrlpd_pi0", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_preset_then_yaml_then_flags(tmp_path, capsys):
    file = tmp_path / "changes.yaml"
    file.write_text("agent:\n  discount: 0.9\nlog_frequency: 7\n")
    assert main(["config", "show", "demo", "--config", str(file), "--log-frequency", "3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["agent"]["discount"], shown["log_frequency"], shown["utd_ratio"]) == (0.9, 3, 0.5)


def test_every_range_is_shown_beside_its_value(capsys, tmp_path):
    assert main(["config", "show", "demo"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "  discount: 0.99  # a number in (0, 1]",
        "    q_aggregation: mean  # 'min', 'mean', 'weighted', 'subset' or 'mean_minus_std'",
        "      warmup_steps: 100  # a whole number of at least 0",
        "seed: 0  # a whole number of at least 0",
    ):
        assert f"\n{line}\n" in shown
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_yaml(tmp_path / "shown.yaml", presets.get_preset) == presets.get_preset("demo")
    with pytest.raises(SystemExit, match="0"):
        main(["config", "show", "demo", "--help"])
    assert "a number in (0, 1]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("eval --checkpoint x --episodes 0", "episodes must be a whole number of at least 1 or None, got 0"),
        ("eval --checkpoint x --videos -1", "videos must be a whole number of at least 0, got -1"),
        ("collect --output x --episodes 0", "episodes must be a whole number of at least 1, got 0"),
        ("collect --output x --noise_range -1 1", "noise_range[0] must be a number of at least 0, got -1.0"),
    ],
)
def test_other_commands_refuse_a_value_in_one_line(words, told, capsys):
    assert main(words.split()) == 2
    assert capsys.readouterr().err == f"acrlpd: {told}\n"


TOGETHER = {  # changes that contradict a preset each alone, and not together
    "data instead of an environment": ("debug", {"env": None}, {"data.path": "somewhere"}),
    "a robot and its statistics": ("demo", {"data.robot": "libero"}, {"data.action_normalization": "z_score"}),
    "pi0.5 and quantiles": ("aloha", {"policy.kind": "pi05"}, {"data.action_normalization": "quantile"}),
    "a chunk and what is executed": ("demo", {"execute_horizon": 9}, {"policy.action_horizon": 9}),
    "adapters in both experts": (
        "droid",
        {"policy.paligemma_variant": "gemma_2b_lora", "policy.frozen_dtype": "bfloat16"},
        {"policy.action_expert_variant": "gemma_300m_lora"},
    ),
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("algorithm", [[], ["--algorithm", "bc"], ["--algorithm", "qc"]])
@pytest.mark.parametrize("case", TOGETHER)
def test_a_file_is_judged_together_with_the_flags(tmp_path, capsys, case, algorithm, named):
    """Either half may stand in the file, which may come over a preset or name its own."""
    preset, *halves = TOGETHER[case]
    for in_file, as_flags in (halves, halves[::-1]):
        file = tmp_path / "half.yaml"
        file.write_text(json.dumps(in_file | ({"base_config": preset} if named else {})))
        flags = [word for field, value in as_flags.items() for word in (f"--{field}", str(value))]
        start = [str(file)] if named else [preset, "--config", str(file)]
        assert main(["config", "show", *start, *algorithm, *flags, "--json"]) == 0
        shown = leaves(from_dict(TrainConfig, json.loads(capsys.readouterr().out)))
        for field, value in (in_file | as_flags).items():
            assert shown.get(field) == value


def test_a_file_that_no_flag_saves_is_told(tmp_path, capsys):
    file = tmp_path / "wrong.yaml"
    file.write_text("env: null\n")
    assert main(["config", "show", "demo", "--config", str(file), "--data.no-ends-in-chunks", "--seed", "-1"]) == 2
    told = capsys.readouterr().err
    assert "a run needs data.path" in told
    assert "seed must be a whole number of at least 0, got -1" in told
    assert main(["config", "show", "demo", "--env", "counting"]) == 2
    assert "--env counting: expected None, or a field of it, such as --env.name" in capsys.readouterr().err


def test_save_and_diff(tmp_path, capsys):
    target = tmp_path / "saved.yaml"
    assert main(["config", "save", "demo", str(target), "--agent.best_of_n_samples", "5"]) == 0
    assert load_yaml(target, presets.get_preset).agent.best_of_n_samples == 5
    assert main(["config", "save", "demo", str(target)]) == 2
    capsys.readouterr()
    assert main(["config", "diff", "demo", str(target)]) == 0
    assert capsys.readouterr().out == "agent.best_of_n_samples: was 16, now 5\n"
    assert main(["config", "dif", "demo", str(target)]) == 2
    assert main(["config", "diff", "demo"]) == 2


def test_words_taken_from_the_flags():
    assert take(["--a", "1", "--config", "x.yaml", "--b"], "config") == ("x.yaml", ["--a", "1", "--b"])
    assert take(["--config=x.yaml"], "config") == ("x.yaml", [])
    assert take(["--configs", "1"], "config") == (None, ["--configs", "1"])
    with pytest.raises(ValueError, match="--config needs a value"):
        take(["--config"], "config")
    config, rest = starting_point("droid", ["--environment", "development", "--seed", "1"])
    assert (config.offline_steps, rest) == (500_000, ["--seed", "1"])


@pytest.mark.parametrize("command", [["config", "show"], ["plan"], ["train"]])
def test_every_wrong_flag_is_told(command, capsys):
    """A value that is right beside another (execute_horizon here) is none of them."""
    flags = "--agent.discount 2 --log-frequency 0 --seed x --execute-horizon 9 --policy.action-horizon 9 --agent.disc 1"
    assert main([*command, "demo", *flags.split(), "--online-envs", "0"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    for words in ("agent.discount must be a number in (0, 1], got 2.0", "parsing --seed", "options: --agent.disc"):
        assert words in told
    for name in ("log_frequency", "online_envs"):
        assert f" {name} must be a whole number of at least 1, got 0" in told
    assert "cannot execute more steps" not in told


def test_flags_that_contradict_each_other_are_told(capsys):
    assert main(["config", "show", "demo", "--data.cube-goal", "1", "2", "3", "--data.button-goal", "1"]) == 2
    assert capsys.readouterr().err == "acrlpd: cube_goal and button_goal exclude each other\n"


def test_what_a_resumed_run_may_change():
    parsed = train._parse(presets.get_preset("demo"), "demo", ["--resume", "--override_lr_schedule"])
    assert parsed.may_differ() == train.LR_FIELDS
    assert train._parse(presets.get_preset("demo"), "demo", ["--resume", "--override"]).may_differ() == ("*",)
    assert train._parse(presets.get_preset("demo"), "demo", ["--resume"]).may_differ() == ()


FLAGS = {
    "--data_dir /d": ("data", "path", "/d"),
    "--lerobot_repo_id lerobot/pusht": ("data", "path", str(lerobot.hub_folder("lerobot/pusht"))),
    "--checkpoint_dir c": ("run_dir", "c"),
    "--experiment_name e": ("name", "e"),
    "--pretrained_weights w": ("policy", "weights", "w"),
    "--bc_weight 0.5": ("agent", "loss_weights", "bc_weight", 0.5),
    "--pi0_peak_lr 1e-6": ("optimizers", "policy", "schedule", "peak_lr", 1e-6),
    "--critic_peak_lr 1e-6": ("optimizers", ("critic", "temperature"), "schedule", "peak_lr", 1e-6),
    "--discount 0.5": ("agent", "discount", 0.5),
    "--max_grad_norm 3": ("optimizers", ("policy", "critic", "temperature"), "clip_gradient_norm", 3.0),
    "--offline_steps 3": ("offline_steps", 3),
    "--online_steps 3": ("online_steps", 3),
    "--batch_size 3": ("data", "batch_size", 3),
    "--best_of_n_samples 3": ("agent", "best_of_n_samples", 3),
    "--gradient_accumulation_steps 4": ("agent", "gradient_accumulation_steps", 4),
    "--fsdp_devices 3": ("fsdp_devices", 3),
    "--seed 3": ("seed", 3),
    "--log_frequency 3": ("log_frequency", 3),
    "--eval_frequency 3": ("eval", "frequency", 3),
    "--save_frequency 3": ("save_frequency", 3),
    "--num_eval_episodes 3": ("eval", "episodes", 3),
    "--freeze_pi0_backbone": ("policy", "freeze_pi0_backbone", True),
    "--debug_mode": ("max_skipped_updates", 1),
    "--environment debug": ("offline_steps", 1000),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_of_the_script_has_its_effect(script, flag):
    *path, expected = FLAGS[flag]
    base = presets.get_preset("droid")
    config = script.configuration(script.parser().parse_args(flag.split()), base)
    places = itertools.product(*([part] if isinstance(part, str) else part for part in path))
    fields = {".".join(place) for place in places}
    before, after = leaves(base), leaves(config)
    assert {after[field] for field in fields} == {expected}
    assert expected not in {before[field] for field in fields}
    if flag not in ("--debug_mode", "--environment debug"):  # which change more than one thing
        assert {field for field in before if after[field] != before[field]} == fields


def test_no_flag_is_forgotten(script):
    known = {flag.split()[0] for flag in FLAGS} | {"--config", "--resume", "--overwrite", "--override_lr_schedule"}
    actions = [action for action in script.parser()._actions if not isinstance(action, argparse._HelpAction)]
    assert {action.option_strings[0] for action in actions} == known


def test_how_the_script_starts_a_run(script, monkeypatch, tmp_path, capsys):
    started = []
    monkeypatch.setattr(train, "run", lambda config, **how: started.append((config, how)) or 0)
    assert script.main(["--config", "droid", "--overwrite"]) == 0
    assert started[-1][1]["overwrite"]
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"data": {"path": "d"}, "online_steps": 0}))
    words = ["--resume", str(run), "--override_lr_schedule", "--bc_weight", "0.25"]
    assert script.main(words) == 0
    config, how = started[-1]
    assert (config.name, config.run_dir, config.agent.loss_weights.bc_weight) == ("mine", str(tmp_path), 0.25)
    assert how["resume"]
    assert how["override"] == (*train.LR_FIELDS, "agent.loss_weights.bc_weight")
    assert script.main(["--resume", str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err
    assert script.main([]) == 2


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Runs that were begun: configuration, and how."""
    found = []
    monkeypatch.setattr(train, "run", lambda config, **how: found.append((config, how)) or 0)
    monkeypatch.chdir(tmp_path)
    return found


ORIGINAL = "--config droid --environment development --data_dir /d --checkpoint_dir c --experiment_name e --seed 3"


def test_the_script_resumes_a_run_from_what_it_stored(script, started, tmp_path):
    assert script.main(ORIGINAL.split()) == 0
    config, how = started[-1]
    assert how["again"] == f"--resume {Path('c') / 'e'}"
    stored = tmp_path / "c" / "e" / "config.json"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps(to_dict(config)))
    config = config.with_critic_horizon(config.critic_horizon)  # which a stored configuration always names
    for again in (
        [*ORIGINAL.split(), "--resume"],
        ["--config", "droid", "--checkpoint_dir", "c", "--experiment_name", "e", "--resume"],
        how["again"].split(),
    ):
        assert script.main(again) == 0
        assert started[-1][0] == config
        assert started[-1][1]["resume"]
    assert main(["train", *how["again"].split()]) == 0  # as the hint says
    assert started[-1][0] == config
    words = ["train", "droid", "--environment", "development", "--run_dir", "c", "--name", "e", "--resume"]
    assert main(words) == 0
    assert started[-1][0] == config


@pytest.mark.parametrize("flag", [["--config", "droid"], ["--environment", "debug"]])
def test_the_script_refuses_what_a_named_run_would_ignore(script, started, capsys, flag):
    assert script.main(["--resume", "somewhere", *flag]) == 2
    assert "leave --config and --environment out" in capsys.readouterr().err
    assert not started


def test_the_script_copies_a_data_set_from_the_hub(script, started, monkeypatch, tmp_path, capsys):
    copied = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: copied.append((name, how)) or "there")
    words = ["--config", "aloha", "--lerobot_repo_id", "lerobot/pusht"]
    assert script.main([*words, "--discount", "2"]) == 2
    assert not copied  # a mistake is told before
    assert script.main(words) == 0
    folder = tmp_path / "cache" / "acrlpd" / "lerobot" / "lerobot" / "pusht"
    assert copied == [("lerobot/pusht", {"repo_type": "dataset", "revision": None, "local_dir": folder})]
    assert started[-1][0].data.path == str(folder)
    (tmp_path / "lerobot" / "pusht").mkdir(parents=True)
    assert script.main(words) == 0
    assert started[-1][0].data.path == "lerobot/pusht"
    assert (len(copied), len(started)) == (1, 2)
    assert script.main([*words, "--data_dir", "d"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_a_data_set_that_cannot_be_copied(script, started, monkeypatch, capsys):
    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    words = ["--config", "aloha", "--lerobot_repo_id", "lerobot/pusht"]
    assert script.main(words) == 2
    told = capsys.readouterr().err
    assert "could not copy the dataset lerobot/pusht" in told
    assert "Check its name, the network" in told
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert script.main(words) == 2
    assert "pip install 'acrlpd[remote]'" in capsys.readouterr().err
    assert not started
