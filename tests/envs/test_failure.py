"""What goes wrong in another process is told in its own words, whatever class it has and wherever the process is."""

import contextlib
import pickle
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest

from acrlpd.envs.collect import collect
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.episodes import Execute, Start
from acrlpd.envs.failure import Failure, WorkerError
from acrlpd.envs.registry import make_vector
from acrlpd.envs.rollout import rollout
from acrlpd.envs.vector import RolloutConfig


class ForceLimitError(Exception):
    """Its constructor takes more than a text, so it cannot be pickled there and back."""

    def __init__(self, joint, newton):
        super().__init__(f"joint {joint} pushed with {newton} N")


class MuteError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class ChoosyError(ValueError):
    pass


def with_handle():
    error = RuntimeError("the camera is unplugged")
    error.on_close = lambda: None
    return error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError("no such file"), ValueError, "no such file"),
        (ChoosyError("not this one"), ValueError, "ChoosyError: not this one"),
        (ImportError("no simulator"), ImportError, "no simulator"),
        (FileNotFoundError(2, "No such file", "a.xml"), OSError, "FileNotFoundError: [Errno 2] No such file: 'a.xml'"),
        (ForceLimitError(3, 51.5), WorkerError, "ForceLimitError: joint 3 pushed with 51.5 N"),
        (with_handle(), WorkerError, "RuntimeError: the camera is unplugged"),
        (KeyError("x"), WorkerError, "KeyError: 'x'"),
        (MuteError(), WorkerError, "MuteError: <exception str() failed>"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_survives_as_text(error, kind, words):
    def raiser():
        raise error from LookupError("the reason behind it")

    try:
        raiser()
    except Exception as caught:  # noqa: BLE001
        failure = pickle.loads(pickle.dumps(Failure.of(caught)))  # noqa: S301
    found = failure.error()
    assert type(found) is kind
    assert str(found) == words
    assert "in raiser" in found.__notes__[0]
    assert "the reason behind it" in found.__notes__[0]


ENVIRONMENT = """
    import numpy as np
    from acrlpd.envs.env import Outcome

    class ForceLimit(Exception):
        def __init__(self, joint, newton):
            super().__init__(f"joint {joint} pushed with {newton} N")

    class Sim:
        state_dim, time_limit, fps, cameras, default_camera, instruction = 2, 6, 10.0, (), "none", "go"
        action_low, action_high = np.array([-1.0], np.float32), np.array([1.0], np.float32)

        def __init__(self, kind):
            self.kind = kind
            if kind == "made":
                raise ForceLimit(1, 2)

        def reset(self, seed):
            self.t = 0
            bad = self.kind == "never" or (self.kind == "sometimes" and seed % 2 == 0)
            return np.full(2, np.nan) if bad else np.zeros(2)

        def step(self, action):
            self.t += 1
            if self.kind == "step" and self.t == 4:
                raise ForceLimit(3, 51.5)
            if self.kind == "answer":
                return Unsendable([0.0, 0.0]), Outcome.GOING_ON
            return np.full(2, self.t / 20), Outcome.GOING_ON

        def close(self):
            pass

    class Unsendable(np.ndarray):
        def __new__(cls, numbers):
            return np.asarray(numbers).view(cls)

        def astype(self, dtype):
            return self

        def __reduce__(self):
            raise ForceLimit(4, 5)

    def made(): return Sim("made")
    def step(): return Sim("step")
    def answer(): return Sim("answer")
    def sometimes(): return Sim("sometimes")
    def never(): return Sim("never")
"""


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """The configuration of one of the environments above, in a file of its own."""
    file = tmp_path_factory.mktemp("envs") / "my_env.py"
    file.write_text(textwrap.dedent(ENVIRONMENT))
    return lambda kind: EnvConfig(f"custom/{file}:{kind}")


def still(observations, numbers):
    return np.zeros((len(observations), 5, 1), np.float32)


WORDS = {"made": "joint 1 pushed with 2 N", "step": "joint 3 pushed with 51.5 N", "answer": "joint 4 pushed with 5 N"}


def run(config, where):
    with contextlib.closing(make_vector(config, 1, where)) as environments:
        rollout(environments, still, [1, 3], execute_horizon=5)


@pytest.mark.parametrize("kind", WORDS)
def test_a_worker_says_what_happened_in_it(named, kind):
    with pytest.raises(WorkerError, match=f"ForceLimit: {WORDS[kind]}") as caught:
        run(named(kind), RolloutConfig(num_workers=1, timeout_s=60))
    assert "In a worker process" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", [pytest.param("made", marks=pytest.mark.slow), "step"])
def test_a_collecting_process_says_what_happened_in_it(named, kind):
    with pytest.raises(WorkerError, match=f"ForceLimit: {WORDS[kind]}"):
        collect(named(kind), range(2), policy="random", num_workers=2, on_episode=lambda _: None)


class FakeRay(types.ModuleType):
    """Actors in this process: what they answer has to survive being sent, and is raised as Ray raises it."""

    class exceptions:  # noqa: N801
        class GetTimeoutError(Exception): ...

        class RayActorError(Exception): ...

        class RayTaskError(Exception): ...

    def is_initialized(self):
        return True

    def remote(self, **_):
        return lambda kind: types.SimpleNamespace(remote=lambda *arguments: Actor(kind(*arguments)))

    def get(self, answer, timeout):
        try:
            return pickle.loads(pickle.dumps(answer()))  # noqa: S301
        except Exception as error:
            raise FakeRay.exceptions.RayTaskError(f"{type(error).__name__}: {error}") from error

    def kill(self, actor):
        pass


class Actor:
    def __init__(self, served):
        self._served = served

    def __getattr__(self, name):
        method = getattr(self._served, name)
        return types.SimpleNamespace(remote=lambda *arguments: lambda: method(*arguments))


@pytest.mark.parametrize("kind", WORDS)
def test_an_actor_says_what_happened_in_it(named, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay("ray"))
    with pytest.raises(WorkerError, match=f"ForceLimit: {WORDS[kind]}"):
        run(named(kind), RolloutConfig(backend="ray", num_workers=1))


def test_actors_answer(named, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay("ray"))
    environments = make_vector(named("sometimes"), 2, RolloutConfig(backend="ray", num_workers=2))
    environments.send({0: Start(0, 1), 1: Start(1, 2)})
    assert [type(answer).__name__ for answer in environments.receive().values()] == ["Report", "Lost"]
    environments.send({0: Execute(np.zeros((6, 1)))})
    assert environments.receive()[0].rollout.length == 6


UNGUARDED = {
    "vector": """
        from acrlpd.envs.env import EnvConfig
        from acrlpd.envs.vector import RolloutConfig
        from acrlpd.envs.registry import make_vector
        make_vector(EnvConfig("custom/FILE:sometimes"), 2, RolloutConfig(num_workers=2))
    """,
    "collect": """
        from acrlpd.envs.collect import collect
        from acrlpd.envs.env import EnvConfig
        collect(EnvConfig("custom/FILE:sometimes"), range(4), policy="random", num_workers=2, on_episode=print)
    """,
    "read": """
        from acrlpd.data.store import processes
        with processes.explained(2):
            print(list(processes.start(2, print).map(abs, range(4))))
    """,
}


@pytest.mark.parametrize(
    "kind", ["vector", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("collect", "read"))]
)
def test_a_script_without_a_main_guard_is_told_so(tmp_path, named, kind):
    script = tmp_path / "train.py"
    file = named("sometimes").name.removeprefix("custom/").partition(":")[0]
    script.write_text(textwrap.dedent(UNGUARDED[kind]).replace("FILE", file))
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"{script} starts processes, and each of them runs it again: put its code under `if __name__" in done.stderr
    assert "bootstrapping phase" not in done.stderr


def test_collecting_replaces_an_episode_that_cannot_begin(named, caplog):
    episodes = []
    collect(named("sometimes"), range(6), policy="random", on_episode=episodes.append)
    assert [each.number for each in episodes] == list(range(6))
    assert all(each.seed % 2 for each in episodes)
    assert "is lost, another seed is tried" in caplog.text
    again = []
    collect(named("sometimes"), [4], policy="random", on_episode=again.append)  # a function of seed and number alone
    np.testing.assert_array_equal(again[0].episode.actions, episodes[4].episode.actions)
    with pytest.raises(RuntimeError, match=r"episode 0 could not begin with any of 10 seeds: .*not finite"):
        collect(named("never"), range(2), policy="random", on_episode=print)
