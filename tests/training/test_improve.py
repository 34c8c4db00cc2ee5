"""``acrlpd improve``: critics for a policy whose weights nobody touches, and a choice among its samples."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from tests.training.conftest import make_episode

from acrlpd import deploy
from acrlpd.cli import improve
from acrlpd.cli.main import main
from acrlpd.data.formats import hdf5
from acrlpd.deploy import choosing, improving
from acrlpd.deploy.choosing import Setting, Tried
from acrlpd.models import gemma, recognize, siglip, weights
from acrlpd.serving.request import OPTIONS_KEY
from acrlpd.training import agreement, linking, loading, prior_data, run, setup
from acrlpd.training.faults import EXIT_INTERRUPTED, Interrupted

CRITICS = ["--agent.critic.num_critics", "4", "--agent.critic.hidden_dims", "8", "--data.batch_size", "8"]


@pytest.fixture(autouse=True)
def _few_settings(monkeypatch):
    monkeypatch.setattr(choosing, "COUNTS", (1, 3))
    monkeypatch.setattr(choosing, "SETTINGS", tuple(Setting(n, weight) for n in (1, 3) for weight in choosing.WEIGHTS))


def contents(folder):
    """The bytes of every file below a folder, and when each was written."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in paths}


def write_episodes(folder, successes):
    rng = np.random.default_rng(1)
    for number, success in enumerate(successes):
        path = hdf5.episode_path(folder, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        hdf5.write_episode(path, make_episode(rng, 10 + number, success=success))
    return folder


def test_a_run_is_improved_resumed_and_acts(copied_run, tmp_path, capsys, monkeypatch):
    """A stop, then all of it: the original stays as it was, and the new folder acts by what was chosen."""
    original = run.run_files(copied_run).directory
    data, better = write_episodes(tmp_path / "mixed", [True, False] * 4), tmp_path / "better"
    before = contents(original)
    words = ["improve", str(original), "--data.path", str(data), "--output_dir", str(better), "--steps", "6", *CRITICS]
    words += ["--data.validation_fraction", "0.5", "--env.name", "metaworld/drawer-open-v3"]
    real = setup.ACRLPDTrainer._update

    def stopped(self, phase):
        real(self, phase)
        if self.state.step == 4:
            self.save()
            raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(setup.ACRLPDTrainer, "_update", stopped)
        assert main(words) == EXIT_INTERRUPTED
    assert "--resume" in capsys.readouterr().err
    assert main(words) == 2
    assert "already exists" in capsys.readouterr().err
    chosen = Setting(3, 0.3)
    monkeypatch.setattr(choosing, "_choose", lambda tried, interval: (chosen, "so"))
    assert main([*words, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "training on 2 successes and 2 failures, 2 and 2 held out" in said
    assert "AUC" in said
    assert "N 3, guidance 0.3" in said
    assert contents(original) == before
    trained = deploy.load_trained(better)
    assert (trained.step, trained.config.agent.best_of_n_samples) == (6, 3)
    assert trained.config.agent.guidance_weights == (0.3,)
    assert trained.config.env is not None, "for evaluations"
    first, second = (loading.load_checkpoint(path).agent.acting_policy for path in (original, better))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    found = json.loads((better / improve.VERDICT).read_text())
    assert (found["successes"], found["failures"], len(found["tried"])) == (2, 2, 8)
    assert main([*words, "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_frozen_policy_has_no_optimiser_and_is_linked(copied_run, tmp_path):
    parameters = run.run_files(copied_run).checkpoints / "8" / "params"
    policy = dataclasses.replace(copied_run.policy, frozen=True, weights=str(parameters))
    config = dataclasses.replace(copied_run, name="frozen", policy=policy, critic_alone_steps=8)
    before = contents(parameters)
    trainer = setup.make_trainer(config)
    assert not jax.tree.leaves(trainer.agent.params["policy"])
    trainer.train()
    step = run.run_files(config).checkpoints / "8"
    shared = [path for path in before if path.name != linking.COMMITTED]
    assert shared
    for path in shared:
        assert os.path.samefile(path, step / "params" / path.relative_to(parameters))
    assert contents(parameters) == before
    with pytest.raises(ValueError, match="critics alone"):
        dataclasses.replace(config, critic_alone_steps=4)


def test_training_never_sees_what_is_held_out(copied_run, tmp_path):
    data = write_episodes(tmp_path / "mixed", [True] * 4 + [False] * 6)
    changed = dataclasses.replace(copied_run.data, path=str(data), validation_fraction=0.5)
    [train] = prior_data.open_sets(dataclasses.replace(copied_run, data=changed))
    [held] = prior_data.held_out_of([train])
    assert [each.num_episodes for each in (train, held)] == [5, 5]
    names = [{each.info(index).source for index in range(5)} for each in (train, held)]
    assert not names[0] & names[1]
    assert sum(bool(held.info(index).success) for index in range(5)) == 2
    episode = held.episode(2)
    np.testing.assert_array_equal(held.window(2, "state", 0, len(episode)), episode.state)


@pytest.mark.parametrize(
    ("successes", "flags", "said"),
    [
        ([True] * 3, [], "all 3 episodes succeeded"),
        ([False] * 3, [], "none of the 3 episodes succeeded"),
        ([True, False], ["--policy.hidden_dims", "8"], "does not hold the model"),
        ([True, False], ["--policy.action_horizon", "4"], "holds 3"),
        ([True, False], [], "none can be held out"),
        ([True, False], ["--data.validation_fraction", "0"], "held out"),
        ([True, False], ["--agent.critic.num_critics", "2"], "at least 4"),
        ([True, False], ["--agent.best_of_n_samples", "7"], "is chosen on held-out episodes"),
        ([True, False], ["--online_steps", "7"], "nothing acts here"),
        ([True, False], ["--policy.no-frozen"], "as it is"),
        ([True, False], ["--steps", "0"], "at least 1"),
        ([True, False], ["--robot", "libero"], "leave out --robot"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(successes, flags, said, copied_run, tmp_path, capsys):
    data = write_episodes(tmp_path / "set", successes)
    words = ["--data.path", str(data), "--output_dir", str(tmp_path / "better"), *flags]
    with mock.patch.object(setup, "make_trainer", side_effect=AssertionError("too late")):
        assert main(["improve", str(run.run_files(copied_run).directory), *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "better").exists()


def test_where_nothing_can_be_linked_files_are_copied(tmp_path, caplog, monkeypatch):
    (tmp_path / "from" / "d").mkdir(parents=True)
    for name in ("a", "d/b", linking.COMMITTED):
        (tmp_path / "from" / name).write_text(name)
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(errno.EXDEV, "another device")))
    assert not linking.link_folder(tmp_path / "from", tmp_path / "to")
    assert sorted(path.name for path in (tmp_path / "to").rglob("*") if path.is_file()) == ["a", "b"]
    assert "copied" in caplog.text
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(errno.ENOSPC, "no room")))
    with pytest.raises(OSError, match="no room"):
        linking.link_folder(tmp_path / "from", tmp_path / "other")


def test_nobody_deploys_noise():
    """Plain samples where Q knows nothing; else the smallest N within an error of the best."""

    def tried(n, gain, error=0.1):
        return Tried(Setting(n, 0.0), gain, gain, error, 1.0)

    settings = [tried(1, 0.0), tried(4, 0.95), tried(16, 1.0)]
    assert choosing._choose(settings, (0.6, 0.9))[0] == Setting(4, 0.0)
    for interval, each in ((None, settings), ((0.4, 0.9), settings), ((0.6, 0.9), [tried(1, 0.0), tried(4, 0.1)])):
        setting, reason = choosing._choose(each, interval)
        assert setting == Setting(1, 0.0)
        assert reason.startswith("plain samples")


def test_the_interval_of_an_area_is_never_a_point():
    low, high = agreement.auc_interval(1.0, 3, 17)
    assert 0.5 < low < 0.8
    assert high == 1.0
    low, high = agreement.auc_interval(0.5, 20, 20)
    assert low == pytest.approx(1 - high, abs=1e-6)
    narrow = agreement.auc_interval(0.5, 200, 200)
    assert low < narrow[0] < 0.5 < narrow[1] < high
    assert agreement.auc_interval(0.0, 3, 17)[0] == 0.0


def test_sizes_without_a_name_are_spelled():
    text = "width 64, depth 2, mlp_dim 48, num_heads 4, num_kv_heads 1, head_dim 16"
    assert gemma.get_config(text) == gemma.Config(64, 2, 48, 4, 1, 16)
    adapted = gemma.get_config(f"{text}, attention_lora 4, attention_lora_alpha 8, mlp_lora 3")
    assert (adapted.adapter_scaling, adapted.mlp_lora.rank) == (2.0, 3)
    for wrong, said in (
        (f"{text}, attention_lora 4", "alpha is not stored"),
        (f"{text}, width 3", "at most once"),
        (f"{text}, breadth 3", "found breadth"),
        ("width 64, depth 2", "mlp_dim"),
    ):
        with pytest.raises(ValueError, match=said):
            gemma.get_config(wrong)
    assert siglip.get_config("patch_size 14, depth 2, width 32, mlp_dim 48, num_heads 2").width == 32


# ---- checkpoints that openpi wrote

ADAPTED = ", attention_lora_alpha 8"


@pytest.fixture
def of_openpi(shared, tmp_path):
    """A function that copies one of openpi's checkpoints, and the words that improve it on DROID's episodes."""

    def copy(name):
        path = shutil.copytree(shared / "golden" / f"{name}_checkpoint" / "2", tmp_path / name)
        tokenizer = str(shared / "golden" / "tiny_sentencepiece.model")
        data = str(shared / "data" / "lerobot-v3.0" / "droid_video")
        words = ["improve", str(path), "--data.path", data, "--robot", "droid", "--policy.tokenizer", tokenizer]
        return path, [*words, "--output_dir", str(tmp_path / "better"), "--steps", "4", *CRITICS]

    return copy


@pytest.mark.golden
def test_alpha_is_asked_for_because_no_array_tells_it(of_openpi, capsys):
    _, words = of_openpi("pi0_lora")
    assert main(words) == 2
    assert "alpha is not stored with weights" in capsys.readouterr().err


@pytest.mark.golden
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policy.vocab_size", "500"], "holds 512"),
        (["--policy.kind", "pi05", "--data.action_normalization", "quantile"], "holds pi0"),
        (["--robot", "aloha"], "aloha"),
        (["--asset_id", "other"], "tiny_robot"),
        (["--policy.action_expert_variant", "nano_expert"], "does not hold the model"),
    ],
)
def test_a_contradiction_with_openpis_weights_is_refused(flags, said, of_openpi, capsys, tmp_path):
    _, words = of_openpi("pi0_ema")
    with mock.patch.object(setup, "make_trainer", side_effect=AssertionError("too late")):
        assert main([*words, *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "better").exists()


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("name", ["pi0_ema", "pi05_noema", "pi0_lora"])
def test_openpis_checkpoints_are_improved(name, of_openpi, tmp_path, capsys):
    """With nothing but paths and the robot (and alpha, of adapters): served, judged, and the original untouched."""
    path, words = of_openpi(name)
    before = contents(path)
    if name == "pi0_lora":
        found = recognize.recognize(weights.inspect(path))
        for part in ("paligemma_variant", "action_expert_variant"):
            words += [f"--policy.{part}", found[part] + ADAPTED]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "CANNOT TELL" in said, "one held-out episode tells nothing"
    assert contents(path) == before
    better = tmp_path / "better"
    step = better / "checkpoints" / "4"
    for file in (file for file in before if "params" in file.parts and file.name != linking.COMMITTED):
        assert os.path.samefile(file, step / file.relative_to(path))
    old, new = (weights.read_params(each) for each in (path, step))
    assert old.keys() == new.keys()
    assert all((old[key] == new[key]).all() for key in old)
    assert (step / "assets" / "tiny_robot" / "norm_stats.json").is_file()
    policy = deploy.trained_policy(deploy.load_trained(better), deploy.ActingOptions())
    picture = np.zeros((64, 48, 3), np.uint8)
    seen = {
        "observation/joint_position": np.zeros(7, np.float32),
        "observation/gripper_position": np.zeros(1, np.float32),
        "observation/exterior_image_1_left": picture,
        "observation/wrist_image_left": picture,
        "prompt": "pick up the cup",
        OPTIONS_KEY: {"seed": 3},
    }
    answer = policy.infer(seen)["actions"]
    assert answer.shape == (improving.ACTION_HORIZONS["droid", "pi05" if "05" in name else "pi0"], 8)
    assert np.isfinite(answer).all()
