"""An extraction of one's own, by ``FILE.py:NAME`` or ``MODULE:NAME``: the same as one that is built in."""

import dataclasses

import jax
import numpy as np
import pytest

from acrlpd.agents import agent as agent_module
from acrlpd.agents.config import AgentConfig
from acrlpd.agents.extraction import QGradient, make_own
from acrlpd.config import from_stored, to_dict
from acrlpd.named_code import StoredName, names_code
from acrlpd.presets import get_preset

NAME = "acrlpd.agents.extraction:QGradient"


@pytest.mark.parametrize("changes", [{}, {"candidate_flow_steps": 1, "action_clip": 0.5, "actor_samples": 3}])
def test_one_of_ones_own_learns_and_acts_as_the_built_in_one(toys, changes):
    agents = [toys.agent(toys.config(extraction=name, **changes)) for name in ("q_gradient", NAME)]
    batch, rng = toys.batch(), toys.key(1)
    learned = [toys.update(agent, batch, rng, agent.config.loss_weights) for agent in agents]
    for one, other in zip(*map(jax.tree.leaves, ((a.params, m) for a, m in learned)), strict=True):
        np.testing.assert_array_equal(one, other)
    observations = batch.observations
    chunks = [agent_module.choose_chunks(agent, observations, rng, mode="explore")[0] for agent, _ in learned]
    np.testing.assert_array_equal(*chunks)


def write(folder, text):
    file = folder / "own.py"
    file.write_text(text)
    return f"{file}:make"


def test_a_file_runs_once_in_a_process(tmp_path):
    name = write(
        tmp_path, "from acrlpd.agents.extraction import QGradient as make\nopen(__file__ + '.ran', 'a').write('x')"
    )
    config = AgentConfig(extraction=name, action_clip=2.0)
    assert config.make_extraction(3) == QGradient(3, 2.0)
    assert config.make_extraction(4) == QGradient(4, 2.0)
    assert (tmp_path / "own.py.ran").read_text() == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def make(num_steps, action_clip): return 3", "int has no propose and no actor_loss"),
        ("class make:\n def __init__(self, **_): pass\n def propose(self): pass", "make has no actor_loss"),
        ("other = 3", "has no function 'make'"),
    ],
)
def test_what_is_no_extraction_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        AgentConfig(extraction=write(tmp_path, text)).make_extraction(3)


def test_a_file_that_is_not_there_is_said_when_it_is_needed():
    config = AgentConfig(extraction="no/such.py:Own")
    with pytest.raises(ValueError, match=r"no/such\.py: there is no such file"):
        config.make_extraction(3)


@pytest.mark.parametrize("name", ["best_of_m", "own.py", "own.py:", ":Own", "own.py:not a name", ""])
def test_other_names_are_refused(name):
    assert not names_code(name)
    with pytest.raises(ValueError, match=r"agent\.extraction must be one of .* or FILE\.py:NAME"):
        AgentConfig(extraction=name)


@pytest.mark.parametrize("name", ["no/file.py:Own", "os:abort"])
def test_a_stored_name_is_never_run(name):
    preset = get_preset("demo")
    config = dataclasses.replace(preset, agent=dataclasses.replace(preset.agent, extraction=name))
    stored = from_stored(to_dict(config))
    assert stored == config.with_critic_horizon(config.critic_horizon)
    assert isinstance(stored.agent.extraction, StoredName)
    assert type(to_dict(stored)["agent"]["extraction"]) is str
    with pytest.raises(ValueError, match=r"a checkpoint runs no code by itself.*--extraction"):
        stored.agent.make_extraction(3)
    with pytest.raises(ValueError, match="runs no code by itself"):
        make_own(dataclasses.replace(stored.agent, discount=0.5).extraction, 3, None)
