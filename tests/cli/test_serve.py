"""Flags of ``acrlpd serve``: what a platform says, what the command line overrides, where the keys are."""

import pytest

from acrlpd.cli import serve
from acrlpd.cli.main import main


def test_a_platforms_numbers_are_defaults():
    arguments = serve._parse(["--checkpoint", "runs/x", "--platform", "droid", "--num_steps", "7"], "droid")
    assert (arguments.server.max_concurrent_requests, arguments.server.request_timeout_s) == (4, 30)
    assert (arguments.acting.num_samples, arguments.acting.num_steps) == (8, 7)


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ACRLPD_API_KEY", "one")
    assert serve._api_keys(None) == ("one",)
    (tmp_path / "keys").write_text("two\n\nthree\n")
    assert serve._api_keys(str(tmp_path / "keys")) == ("two", "three")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="holds no API key"):
        serve._api_keys(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--checkpoint", "no/such/folder"], "no/such/folder"),
        (["--checkpoint", "x", "--max_connections", "0"], "max_connections must be at least 1"),
        (["--checkpoint", "x", "--tls_cert", "a.pem"], "both a certificate and its key"),
    ],
)
def test_a_mistake_is_one_line(arguments, hint, capsys):
    assert main(["serve", *arguments]) == 2
    assert hint in capsys.readouterr().err


def test_what_only_openpis_checkpoints_lack_is_refused_with_one_of_ours(monkeypatch, capsys):
    monkeypatch.setattr(serve.deploy, "is_ours", lambda path: True)
    assert main(["serve", "--checkpoint", "runs/x", "--tokenizer", "t.model", "--asset_id", "arm"]) == 2
    assert "--asset_id and --tokenizer say what a checkpoint of openpi's does not hold" in capsys.readouterr().err
