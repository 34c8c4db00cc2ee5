"""The page about a run, from a folder that the real writers made; the simulator is one line of arithmetic."""

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from acrlpd import presets
from acrlpd.config import to_dict
from acrlpd.envs.env import EnvConfig, Outcome, PhysicsError, SimulatedEnvironment
from acrlpd.envs.rollout import Rollout
from acrlpd.training import films, report
from acrlpd.training.agreement import Choice, agreement
from acrlpd.training.clocks import breakdown
from acrlpd.training.comparison import compare
from acrlpd.training.evaluate import Evaluation, summarize, wilson
from acrlpd.training.films import improved_seed, load_outcomes
from acrlpd.training.metrics import JsonlWriter, write_json
from acrlpd.training.protocol import Findings, Trial
from acrlpd.training.report import headline, read_run, write_report
from acrlpd.training.run import RunFiles, save_rollouts
from acrlpd.types import Episode

BC_SOLVED = (False, True, False, False)  # of the seeds 100, 101, 102, 103
ONLINE_SOLVED = (False, True, True, True)
LIMIT = 20  # steps
SECONDS = {"update": 60.0, "simulator": 20.0, "compile": 10.0, "evaluation": 20.0, "act": 15.0}


class Walk:
    """Solved when the sum of the actions reaches 5; a picture's red channel counts the steps. Resets are remembered."""

    state_dim = 1
    action_low = np.array([-1.0], np.float32)
    action_high = np.array([1.0], np.float32)
    instruction = "walk"
    time_limit = LIMIT
    fps = 10.0
    cameras = ("front",)
    default_camera = "front"

    def __init__(self):
        self.seeds, self.pictures, self.closed = [], [], False

    def reset(self, seed):
        self.seeds.append(seed)
        self.position, self.steps = 0.0, 0
        return np.zeros(1, np.float32)

    def step(self, action):
        self.position += float(action[0])
        self.steps += 1
        return np.array([self.position], np.float32), Outcome.solved_if(self.position >= 5)

    def render(self, camera, size):
        self.pictures.append(self.steps)
        return np.full((size, size, 3), (10 * self.steps, 0, 0), np.uint8)

    def close(self):
        self.closed = True


def use(simulator, monkeypatch):
    monkeypatch.setattr(report, "make", lambda config: SimulatedEnvironment(simulator, EnvConfig("walk/forward")))


@pytest.fixture
def walk(monkeypatch):
    simulator = Walk()
    use(simulator, monkeypatch)
    return simulator


def recorded(number, success):
    """Five steps forward, or as many on the spot as the limit allows."""
    length = 5 if success else LIMIT
    episode = Episode(
        state=np.zeros((length, 1), np.float32),
        actions=np.full((length, 1), float(success), np.float32),
        rewards=np.zeros(length, np.float32),
        terminals=np.zeros(length, np.bool_),
        task="walk",
    )
    return Rollout(episode, number, 100 + number, 0.0, length, success)


def evaluation(successes, episodes):
    return Evaluation(successes, episodes, *wilson(successes, episodes), 0.0, 0.0, 10.0)


def training_record(step, **changes):
    names = ("total_loss", "critic_loss", "bc_loss", "actor_loss", "q_mean", "target_q_mean", "entropy_estimate")
    names += ("alpha_value", "q_ensemble_variance", "best_of_n_variance")
    values = {name: math.sin(step / 500) + index for index, name in enumerate(names)} | {"actor_loss": 0.0} | changes
    return {f"train/{name}": value for name, value in values.items()}


class Writer:
    """A run's folder, part by part."""

    def __init__(self, directory, **changes):
        self.files = RunFiles(directory)
        self.config = dataclasses.replace(presets.get_preset("demo"), **changes)
        write_json(self.files.config, to_dict(self.config))

    def record(self, step, phase, values, env_steps=0):
        writer = JsonlWriter(self.files.metrics)
        writer.write({"step": step, "phase": phase, "env_steps": env_steps, "wall_s": step / 20} | values)
        writer.close()

    def train(self, steps, phase="offline", **changes):
        for step in steps:
            self.record(step, phase, training_record(step, **changes), env_steps=max(0, step - 2000))

    def evaluate(self, step, phase, successes, episodes, env_steps=0):
        self.record(step, phase, evaluation(successes, episodes).metrics(), env_steps)

    def films(self, bc=BC_SOLVED, online=ONLINE_SOLVED):
        for name, outcomes in {"bc": bc, "online": online}.items():
            save_rollouts(self.files.evaluation(name), [recorded(*each) for each in enumerate(outcomes)])

    def summary(self, **phases):
        summary = {"task": self.config.env.name, "seed": 0, "phases": {k: v.summary() for k, v in phases.items()}}
        summary |= {"wall_s": 150.0, "cpu_s": 290.0, "updates": 6000, "env_steps": 4000}
        write_json(self.files.summary, summary | {"breakdown": breakdown(SECONDS, 150.0)})


def finished_run(directory, **changes):
    """Imitation 15 of 50, offline 20, online 49."""
    run = Writer(directory, **changes)
    run.train(range(100, 2001, 100))
    run.evaluate(2000, "offline", 9, 20)
    run.evaluate(2000, "bc", 15, 50)
    run.evaluate(2000, "offline", 20, 50)
    run.train(range(2100, 6001, 100), "online")
    run.evaluate(4000, "online", 15, 20, env_steps=2000)
    run.evaluate(6000, "online", 49, 50, env_steps=4000)
    run.films()
    run.summary(bc=evaluation(15, 50), offline=evaluation(20, 50), online=evaluation(49, 50))
    return run


class Page(HTMLParser):
    """Balanced tags, or an error; attributes by name and the text outside style."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.source, self.open, self.attributes, self.words, self.tags = text, [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> on line {self.getpos()[0]}"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


def page(run):
    return Page(write_report(run.files.directory).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The page of a finished run, and the simulator that it was filmed in."""
    simulator = Walk()
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(simulator, monkeypatch)
        return page(finished_run(tmp_path_factory.mktemp("runs") / "demo")), simulator


def test_a_finished_run(finished):
    written, _ = finished
    assert "metaworld/drawer-open-v3, seed 0" in written.text
    assert (
        "Imitation solved 15 of 50 episodes, offline training solved 20 of 50; "
        "after 4,000 online steps the policy solves 49 of 50." in written.text
    )
    low, high = wilson(20, 50)
    assert f"20 of 50 40 % {100 * low:.0f} % to {100 * high:.0f} % 2,000" in written.text
    assert (
        "the online policy solved 2 of the 3 episodes that imitation failed, and failed 0 of the 1 that it solved."
        in written.text
    )
    assert {"Value", "Losses", "Disagreement", "Success while training"} <= set(written.values("aria-label"))
    assert "the training itself spent 33.3 % of its time" in written.text  # 1 - (60 + 20) / (150 - 20 - 10)
    assert "update gradient updates, with waiting for the device 1 min 0 s 40.0 %" in written.text
    assert "agent.critic.num_critics 10" in written.text


def test_the_page_needs_no_network(finished):
    written, _ = finished
    assert not re.search(r"https?://|@import|url\((?!#)", written.source)
    sources = written.values("src")
    assert len(sources) == 8 + 6  # twenty steps, and five
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert all(link.startswith("#") for name in ("href", "xlink:href") for link in written.values(name))
    assert not {"script", "link", "iframe"} & set(written.tags)
    assert len(written.source.encode()) < 1_500_000


def test_ids_are_unique_and_every_reference_has_one(finished):
    written, _ = finished
    ids = written.values("id")
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]+)\)", written.source) + [v[1:] for v in written.values("xlink:href")]
    assert references
    assert set(references) <= set(ids)


def test_colours_follow_the_page(finished):
    written, _ = finished
    charts = re.findall(r"<svg.*?</svg>", written.source, flags=re.DOTALL)
    assert charts
    assert not re.search(r"#[0-9a-f]{6}\b", "".join(charts))
    defined = set(re.findall(r"(--[\w-]+):", written.source))
    assert set(re.findall(r"var\((--[\w-]+)\)", written.source)) <= defined


def test_the_film_shows_a_seed_that_was_won(finished):
    written, walk = finished
    assert walk.seeds == [102, 102]  # 100 failed twice, 101 was solved by imitation already
    assert "seed 102" in written.text
    assert walk.pictures == [0, 3, 6, 9, 11, 14, 17, 20, 0, 1, 2, 3, 4, 5]  # no others are rendered
    assert walk.closed
    assert "Imitation: not solved in 20 steps." in written.text
    assert "Online: solved in 5 steps." in written.text
    assert "Executed again here" not in written.text
    last = Image.open(io.BytesIO(base64.b64decode(written.values("src")[-1].split(",")[1])))
    assert last.size == (films.FRAME_SIZE, films.FRAME_SIZE)
    assert last.getpixel((5, 5))[0] == pytest.approx(50, abs=4)  # the scene after the fifth step


def test_another_simulator_than_the_recorded_one_is_named(tmp_path, walk, monkeypatch):
    monkeypatch.setattr(walk, "step", lambda action: (np.zeros(1, np.float32), Outcome.GOING_ON))
    assert "Executed again here it ended otherwise" in page(finished_run(tmp_path / "demo")).text


def test_a_film_ends_where_the_simulation_gave_up():
    class Unstable(Walk):
        def step(self, action):
            if self.steps == 3:
                raise PhysicsError("unstable")
            return super().step(action)

    environment = SimulatedEnvironment(Unstable(), EnvConfig("walk/forward"))
    frames, solved = films.film(environment, 100, np.ones((4, 1), np.float32))
    assert list(frames) == [0, 1, 2, 3]
    assert not solved


def test_no_seed_was_won(tmp_path, walk):
    run = finished_run(tmp_path / "demo")
    run.films(bc=ONLINE_SOLVED, online=BC_SOLVED)
    assert (
        improved_seed(load_outcomes(run.files.evaluation("bc")), load_outcomes(run.files.evaluation("online"))) is None
    )
    assert "There is no seed on which imitation failed and the online policy succeeded." in page(run).text
    assert walk.seeds == []


def test_without_a_renderer_the_page_says_what_to_install(tmp_path, walk, monkeypatch):
    def unavailable(camera, size):
        raise RuntimeError("rendering is not possible: install libegl1 <and> set MUJOCO_GL=egl")

    monkeypatch.setattr(walk, "render", unavailable)
    written = page(finished_run(tmp_path / "demo"))
    assert "The films could not be made here." in written.text
    assert "install libegl1 <and> set MUJOCO_GL=egl" in written.text
    assert "img" not in written.tags
    assert walk.closed


def test_a_run_under_way(tmp_path, walk):
    run = Writer(tmp_path / "demo")
    run.train(range(100, 2001, 100))
    run.evaluate(2000, "bc", 15, 50)
    run.train(range(2100, 2501, 100), "online")
    run.evaluate(2500, "online", 12, 20, env_steps=500)
    written = page(run)
    assert "This run has not finished" in written.text
    assert "Imitation solved 15 of 50 episodes; after 500 online steps the policy solves 12 of 20." in written.text
    assert "Where the time went is known when the run has finished." in written.text
    assert "2,500" in written.text  # updates so far
    assert "A film needs the evaluations that end a phase" in written.text
    assert f"acrlpd train demo --run_dir {tmp_path} --name demo --resume" in written.text


def test_a_summary_of_an_earlier_stretch_is_not_the_last_word(tmp_path, walk):
    run = finished_run(tmp_path / "demo")
    run.train([6100], "online")
    run.evaluate(6100, "online", 20, 20, env_steps=4100)
    assert read_run(tmp_path / "demo").summary is None
    assert headline(read_run(tmp_path / "demo")).endswith("after 4,100 online steps the policy solves 20 of 20.")


def test_no_evaluations(tmp_path):
    run = Writer(tmp_path / "demo")
    run.train([100, 200])
    written = page(run)
    assert "No evaluation yet: the run is at update 200." in written.text
    assert "No evaluation was recorded" in written.text
    assert "Value" in written.values("aria-label")
    assert "acrlpd eval" not in written.text
    assert list(run.files.directory.glob(".*.tmp")) == []


def test_nothing_but_a_configuration(tmp_path):
    written = page(Writer(tmp_path / "demo"))
    assert "No evaluation yet: the run is at update 0." in written.text
    assert "No update was logged yet." in written.text
    assert "svg" not in written.tags


def test_values_that_are_not_finite_leave_gaps(tmp_path):
    run = Writer(tmp_path / "demo")
    run.train([100, 200])
    run.train([300], critic_loss=math.nan, q_mean=math.inf, total_loss=math.nan)
    assert "Not finite and left out: up to 1 of a curve's points." in page(run).text


def test_text_cannot_become_markup(tmp_path):
    evil = '<script>alert("1")</script>&amp;$style'
    run = Writer(tmp_path / "<b>run", env=EnvConfig("<img src=x>/task", instruction=evil), name=evil)
    run.evaluate(2000, "bc", 1, 2)
    run.films()
    written = page(run)
    assert not {"script", "b", "img"} & set(written.tags)
    assert "<img src=x>/task, seed 0" in written.text
    assert "unknown environment" in written.text  # a run of another version: said, like a missing renderer
    assert "&amp;amp;$style" in written.source


def test_a_run_without_an_environment(tmp_path):
    run = Writer(tmp_path / "aloha", env=None, online_steps=0, data=presets.get_preset("aloha").data)
    run.train([100, 200])
    written = page(run)
    assert "data/aloha, seed 0" in written.text
    assert "acrlpd eval" not in written.text


def test_commands_name_this_folder(tmp_path, walk):
    directory = tmp_path / "moved here" / "second"
    text = page(finished_run(directory)).text
    assert f"acrlpd eval --checkpoint '{directory}'" in text
    doubled = 2 * presets.get_preset("demo").online_steps
    assert f"acrlpd train demo --run_dir '{directory.parent}' --name second --resume --online_steps {doubled}" in text


def test_a_step_made_twice_counts_once(tmp_path):
    run = Writer(tmp_path / "demo")
    run.train([100, 200])
    run.train([200, 300], q_mean=7.0)  # resumed at 100
    steps = {record["step"]: record["train/q_mean"] for record in read_run(tmp_path / "demo").training}
    assert list(steps) == [100, 200, 300]
    assert steps[200] == 7.0


def test_of_two_evaluations_at_a_step_the_larger_is_drawn(tmp_path):
    run = Writer(tmp_path / "demo")
    run.evaluate(2000, "offline", 40, 50)
    run.evaluate(2000, "offline", 5, 20)
    (only,) = read_run(tmp_path / "demo").evaluations["offline"]
    assert (only.successes, only.episodes) == (40, 50)


def test_long_runs_stay_small(tmp_path):
    run = Writer(tmp_path / "demo")
    writer = JsonlWriter(run.files.metrics)
    for step in range(1, 3001):
        writer.write({"step": step, "phase": "offline", "env_steps": 0, "wall_s": 1.0} | training_record(step))
    writer.close()
    written = page(run)
    assert "500 of 3,000 points, evenly spaced." in written.text
    assert len(written.source) < 500_000


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json: expected the folder of a run"):
        write_report(tmp_path)


def full_evaluation(solved, **compared):
    rollouts = [recorded(*each) for each in enumerate(solved)]
    choices = {each.number: [Choice(-1.0 - each.length, -2.0 - each.length, 0.5)] * each.length for each in rollouts}
    trial = Trial(summarize(rollouts), rollouts)
    agreed = agreement(rollouts, choices, discount=0.99, execute_horizon=1)
    findings = Findings(trial, {0.05: trial}, {0.1: trial}, {4: trial}, {}, agreed)
    return {"step": 6000, "tasks": {"walk/forward": findings.to_dict() | compared}}


def test_a_full_evaluation_is_shown(tmp_path, walk):
    run = finished_run(tmp_path / "run")
    assert "Full evaluation" not in page(run).text
    before, after = ([recorded(*each) for each in enumerate(solved)] for solved in (ONLINE_SOLVED, BC_SOLVED))
    found = full_evaluation(ONLINE_SOLVED, comparison=compare(before, after).to_dict())
    write_json(run.files.full_evaluation, found | {"compare": "runs/<other>"})
    text = page(run).text
    for line in ("noise 0.05 on observations", "noise 0.1 on actions", "best of 4", "+0 points (+0 to +0)"):
        assert line in text
    assert "of an unsolved one 100% of the time" in text  # Q falls with the length, and the solved ones are short
    assert "this policy solved 3 and runs/<other> 1, a difference of -50 points" in text
    assert "2 seeds were solved by this policy alone, 0 by the other alone (exact McNemar test: p = 0.5)" in text
    assert "Calibration of Q" in text
