"""Flags of ``acrlpd serve``: what a platform says, what the command line overrides, where the keys are."""

import shlex
import socket
import subprocess
import urllib.parse

import pytest

from acrlpd.cli import serve
from acrlpd.cli.main import main
from acrlpd.serving.door import open_door


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


SECONDS = ("request_timeout_s", "message_timeout_s", "ping_interval_s", "drain_timeout_s", "reload_interval_s")
COUNTS = ("max_batch_size", "max_concurrent_requests", "max_connections", "max_connections_per_address")
COUNTS = (*COUNTS, "max_message_bytes", "max_picture_pixels", "num_samples", "num_steps")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("--checkpoint no/such/folder --port 0", "no/such/folder"),
        ("--tls_cert a.pem", "both a certificate and its key"),
        ("--tls_cert {tmp}/none.pem --tls_key {key}", "no file {tmp}/none.pem"),
        ("--tls_cert {cert} --tls_key {tmp}/none.pem", "no file {tmp}/none.pem"),
        ("--tls_cert {tmp}/garbage --tls_key {key}", "{tmp}/garbage and {key} are not a certificate in PEM"),
        ("--tls_cert {cert} --tls_key {tmp}/garbage", "{cert} and {tmp}/garbage are not a certificate in PEM"),
        ("--tls_cert {cert} --tls_key {tmp}/other.pem", "{tmp}/other.pem are not a certificate in PEM and its key"),
        ("--tls_cert {cert} --tls_key {tmp}/encrypted.pem", "{tmp}/encrypted.pem is encrypted"),
        ("--port 70000", "port must be a whole number in [0, 65535], got"),
        ("--port -1", "port must be a whole number in [0, 65535], got"),
        ("--port {taken}", "cannot serve on 127.0.0.1 port {taken}: Address already in use"),
        ("--host localhost --port {taken}", "cannot serve on localhost port {taken}: Address already in use"),
        ("--host no.such.host.invalid --allow_anonymous", "host 'no.such.host.invalid' is no address of this machine"),
        ("--host 192.0.2.1 --allow_anonymous", "cannot serve on 192.0.2.1"),
        ("--host 127.0.0.1:80 --allow_anonymous", "without a port or brackets"),
        ("--host [::1] --allow_anonymous", "without a port or brackets"),
        ("--host ''", "host is empty"),
        ("--host 0.0.0.0", "anyone may move the robot"),
        ("--api_key_file {tmp}/none", "{tmp}/none"),
        ("--api_key_file {tmp}", "{tmp}"),
        ("--api_key_file {tmp}/empty", "{tmp}/empty holds no API key"),
        ("--api_key_file {tmp}/garbage", "{tmp}/garbage is no text in UTF-8"),
        ("--api_key_file {tmp}/greek", "printable ASCII"),
        *[
            (f"--{name} {bad}", f"{name} must be a number above 0")
            for name in SECONDS
            for bad in ("nan", "inf", "-1", "0")
        ],
        *[(f"--max_requests_per_s {bad}", "max_requests_per_s must be") for bad in ("nan", "-1", "inf")],
        *[(f"--batch_wait_s {bad}", "batch_wait_s must be") for bad in ("nan", "-1", "inf")],
        *[(f"--latency_budget_ms {bad}", "latency_budget_ms must be") for bad in ("nan", "-1", "inf", "0")],
        *[(f"--{name} {bad}", f"{name} must be a whole number of at least 1") for name in COUNTS for bad in (0, -1)],
        ("--seed -1", "seed must be a whole number in [0, 4294967296), got -1"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(arguments, hint, certificate, mistakes, capsys, monkeypatch):
    names = mistakes | dict(zip(("cert", "key"), certificate, strict=True))
    words = shlex.split(arguments.format(**names))
    if "--checkpoint" not in words:
        words += ["--checkpoint", "x"]
        monkeypatch.setattr(serve.deploy, "is_ours", lambda path: pytest.fail("the checkpoint was looked at"))
    assert main(["serve", *words]) == 2
    told = capsys.readouterr().err
    assert hint.format(**names) in told
    assert "Traceback" not in told
    assert told.startswith("acrlpd: ")
    assert told.count("\n") == 1


@pytest.fixture(scope="module")
def mistakes(certificate, tmp_path_factory):
    """Files that are wrong in some way, and a port that is taken."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "garbage").write_bytes(b"\xff\xfe" * 50)
    (folder / "empty").write_text("")
    (folder / "greek").write_text("αβγ\n", encoding="utf-8")
    for name, also in (("other.pem", ["-nodes"]), ("encrypted.pem", ["-passout", "pass:secret"])):
        make = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            *also,
            "-subj",
            "/CN=x",
            "-out",
            str(folder / "unused"),
        ]
        subprocess.run([*make, "-keyout", str(folder / name)], check=True, capture_output=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield {"tmp": folder, "taken": listener.getsockname()[1]}


@pytest.mark.parametrize(
    ("host", "tls", "url"),
    [
        ("127.0.0.1", False, "ws://127.0.0.1:80"),
        ("localhost", True, "wss://localhost:80"),
        ("::1", False, "ws://[::1]:80"),
        ("::", True, "wss://[::]:80"),
        ("fe80::1%eth0", False, "ws://[fe80::1%eth0]:80"),
    ],
)
def test_the_url_is_one_that_a_client_can_use(host, tls, url):
    files = {"tls_cert": "a", "tls_key": "b"} if tls else {}
    assert serve.ServerConfig(host=host, **files).url(80) == url


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "::"])
def test_the_url_of_a_server_on_ipv6_works(host):
    try:
        door = open_door(serve.ServerConfig(host=host, port=0), ["key"])
    except ValueError as error:
        pytest.skip(str(error))
    (listener,) = door.sockets
    listener.listen()
    parts = urllib.parse.urlsplit(serve.ServerConfig(host=host).url(door.port))
    with socket.create_connection((parts.hostname, parts.port), timeout=5):
        door.close()


def test_what_only_openpis_checkpoints_lack_is_refused_with_one_of_ours(monkeypatch, capsys):
    monkeypatch.setattr(serve.deploy, "is_ours", lambda path: True)
    assert main(["serve", "--checkpoint", "runs/x", "--tokenizer", "t.model", "--asset_id", "arm"]) == 2
    assert "--asset_id and --tokenizer say what a checkpoint of openpi's does not hold" in capsys.readouterr().err
