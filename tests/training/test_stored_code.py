"""A checkpoint never runs code: an environment of the user's own is run only where the command names it."""

import contextlib
import dataclasses
import pickle

import pytest
from tests.training.test_online import CONFIG

from acrlpd.cli.main import main
from acrlpd.config import from_stored, to_dict
from acrlpd.envs import collect
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make, make_vector
from acrlpd.envs.vector import RolloutConfig
from acrlpd.founding.regression import ACRLPDRegressionTester
from acrlpd.named_code import StoredName
from acrlpd.training import loading, setup
from acrlpd.training.report import write_report

WORLD = """
from pathlib import Path
import numpy as np
from acrlpd.envs.env import Outcome

Path(__file__).with_suffix(".ran").touch()

class World:
    state_dim, time_limit, fps, cameras, default_camera, instruction = 2, 8, 10.0, (), "none", "go right"
    action_low, action_high = np.array([-1.0], np.float32), np.array([1.0], np.float32)
    def reset(self, seed):
        self.x = float(np.random.default_rng(seed).uniform(-1, 1))
        return np.array([self.x, 0.0])
    def step(self, action):
        self.x += 0.2 * float(action[0])
        return np.array([self.x, 1.0]), Outcome.solved_if(self.x > 1.2)
    def render(self, camera, size):
        return np.zeros((size, size, 3), np.uint8)
    def close(self): pass
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run in an environment of the user's own: its folder, and the file, as if neither had been run here."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "world.py").write_text(WORLD)
    config = dataclasses.replace(
        CONFIG, env=EnvConfig(f"custom/{folder}/world.py:World"), run_dir=str(folder), name="run", online_steps=16
    )
    setup.make_trainer(config).train()
    return folder / "run"


@pytest.fixture
def ran(run):
    """Whether the code has been run since."""
    mark = run.parent / "world.ran"
    mark.unlink(missing_ok=True)
    return mark.exists


def name(run):
    return f"custom/{run.parent}/world.py:World"


def commands(run, tmp_path):
    """The words of each command that may meet an environment, and those that name it."""
    one = ["--checkpoint", str(run), "--episodes", "1"]
    return {
        "eval": (["eval", *one], ["--tasks", name(run)]),
        "collect": (["collect", "--policy", "checkpoint", *one, "--output", str(tmp_path)], ["--name", name(run)]),
        "train": (["train", "--resume", str(run), "--online_steps", "24"], ["--env.name", name(run)]),
    }


@pytest.mark.parametrize("command", ["eval", "collect", "train"])
def test_a_command_runs_stored_code_only_if_it_names_it(run, ran, tmp_path, capsys, command):
    words, naming = commands(run, tmp_path)[command]
    assert main(words) == 2
    assert not ran()
    told = capsys.readouterr().err
    assert f"--env.name {name(run)}" in told
    assert naming[0] in told
    assert main([*words, "--env.name" if command == "train" else naming[0], "custom/elsewhere.py:World"]) == 2
    assert not ran()
    assert main([*words, *naming]) == 0
    assert ran()


def test_a_yaml_file_of_the_users_names_it_as_well(run, ran, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"base_config: debug\nname: run\nrun_dir: {run.parent}\nenv:\n  name: {name(run)}\n")
    assert main(["train", str(file), "--resume", "--online_steps", "32"]) == 0
    assert ran()


def test_a_report_shows_no_film_of_code_that_nobody_named(run, ran, capsys):
    page = write_report(run).read_text()
    assert not ran()
    assert f"acrlpd report {run} --env.name {name(run)}" in page
    assert "--resume --online_steps" in page
    assert main(["report", str(run), "--env.name", name(run)]) == 0


def test_python_runs_it_where_a_script_says_so(run, ran):
    loaded = loading.load_stored(run)
    assert loaded.config.env.name == name(run)
    with pytest.raises(ValueError, match=r"a checkpoint runs no code by itself.*loading\.with_task"):
        setup.make_environments(loaded.config, 1)
    with pytest.raises(ValueError, match="runs no code by itself"):
        ACRLPDRegressionTester(episodes=1).test_performance_metrics(run)
    with pytest.raises(ValueError, match="runs no code by itself"):
        setup.make_trainer(loaded.config, resume=True)
    assert not ran()
    own = loading.load_checkpoint(run).config  # by which nothing has run yet: a script's own from here on
    assert not ran()
    setup.make_environments(own, 1).close()
    assert ran()
    assert ACRLPDRegressionTester(episodes=1, env_name=name(run)).test_performance_metrics(run) in (True, False)


def replaced(env):
    return dataclasses.replace(env, max_episode_steps=3)


def sent(env):
    return pickle.loads(pickle.dumps(env))  # noqa: S301 (our own, as to a worker)


def written_down(env):
    return from_stored(to_dict(dataclasses.replace(CONFIG, env=env))).env


@pytest.mark.parametrize("way", [replaced, sent, written_down])
@pytest.mark.parametrize("text", ["custom/no/file.py:make", "custom/os:abort"])
def test_a_stored_name_stays_one_wherever_it_goes(way, text):
    env = way(EnvConfig(StoredName(text)))
    assert env == dataclasses.replace(env, name=text)
    makers = (
        lambda: make(env),
        lambda: make_vector(env, 1),
        lambda: make_vector(env, 2, RolloutConfig(num_workers=2)),
        lambda: collect.collect(env, [0], policy="random", num_workers=2, on_episode=print),
    )
    for each in makers:
        with pytest.raises(ValueError, match="runs no code by itself"):
            each()


def test_a_stored_name_of_a_simulator_is_like_any_other():
    with contextlib.suppress(ImportError):
        make(EnvConfig(StoredName("metaworld/drawer-open-v3"))).close()
    assert type(to_dict(EnvConfig(StoredName("custom/a.py:b")))["name"]) is str
