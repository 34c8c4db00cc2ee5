"""The server as its clients meet it: openpi's protocol, the same actions as the agent, limits, reload, drain."""

import contextlib
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import connect

from acrlpd import deploy
from acrlpd.data.view.transforms import to_observation
from acrlpd.serving import codec
from acrlpd.serving.batching import batch_sizes
from acrlpd.serving.request import OPTIONS_KEY
from acrlpd.serving.server import PolicyServer, ServerConfig

sys.path.insert(0, str(Path(__file__).parent))
from conftest import OBS, STATS, Client, running, save


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def seeded(seed: int, **options) -> dict:
    return OBS | {OPTIONS_KEY: {"seed": seed, **options}}


# -- the protocol ------------------------------------------------------------------------------------------------------


def test_a_conversation_is_openpis(served):
    client = served.client()
    assert client.metadata == {"acrlpd": {"step": 3, "action_horizon": 5}}
    first, second = client.infer(OBS), client.infer(OBS)
    assert list(first) == ["actions", "policy_timing", "server_timing"]
    assert first["actions"].shape == (5, 2)
    assert list(first["server_timing"]) == ["infer_ms"]
    assert list(second["server_timing"]) == ["infer_ms", "prev_total_ms"]
    assert not np.array_equal(first["actions"], second["actions"])  # each answer draws anew


def test_agent_policy_and_server_give_the_same_actions(served, trained, policy):
    """Whatever company a request has in its batch."""
    normalized = (OBS["state"] - STATS["state"].mean) / (STATS["state"].std + 1e-6)
    observation = to_observation({"state": normalized[None]})
    chunk = np.asarray(trained.agent.sample_actions(observation, jax.random.key(7))[0])
    expected = chunk * (STATS["actions"].std + 1e-6) + STATS["actions"].mean
    np.testing.assert_allclose(policy.infer(seeded(7))["actions"], expected, atol=1e-5)
    answers = in_threads([lambda seed=seed: served.client().infer(seeded(seed)) for seed in (7, 1, 2, 7, 3)])
    np.testing.assert_allclose(answers[0]["actions"], expected, atol=1e-5)
    np.testing.assert_allclose(answers[3]["actions"], expected, atol=1e-5)
    assert not np.allclose(answers[1]["actions"], expected)


def in_threads(calls):
    results = [None] * len(calls)

    def run(index):
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_statistics_tell_what_the_critic_thought(served):
    told = served.client().infer(seeded(7, statistics=True))["policy_statistics"]
    assert len(told["q_candidates"]) == told["num_samples"] == 4
    assert told["q"] == max(told["q_candidates"]) == told["q_candidates"][told["chosen"]]
    assert told["q_mean"] == pytest.approx(np.mean(told["q_candidates"]), rel=1e-5)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (b"\xc1", "expected one MessagePack message"),
        ("text", "got a text frame"),
        (codec.pack([1]), "an observation is a dictionary, got list"),
        (codec.pack({}), "It has nothing"),
        (codec.pack({"state": np.zeros(4, np.float32)}), "It has state float32 \\(4,\\)"),
        (codec.pack({"state": np.zeros(2, np.float32)}), "state must be float32 of shape \\(3,\\)"),
        (codec.pack({"state": np.array([0, np.nan, 0], np.float32)}), "not finite"),
        (codec.pack({"state": np.zeros((1, 1, 1, 3), np.float32)}), "without a batch axis"),
        (codec.pack(OBS | {OPTIONS_KEY: {"sed": 1}}), "did you mean seed"),
        (codec.pack(OBS | {OPTIONS_KEY: {"seed": -1}}), "seed must be a whole number"),
        (codec.pack([[1]] * 6000), "at most 10000"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_nonsense_is_answered_with_its_reason_and_no_traceback(served, message, complaint):
    client = served.client()
    client.connection.send(message)
    answer = client.connection.recv(timeout=60)
    assert isinstance(answer, str)
    with pytest.raises(RuntimeError, match=complaint):
        raise RuntimeError(answer)
    assert "Traceback" not in answer
    with pytest.raises(ConnectionClosed) as closed:
        client.connection.recv(timeout=60)
    assert closed.value.rcvd.code == 1011


def test_health_readiness_and_metrics(served):
    served.client().infer(OBS)
    assert get(served.port, "/healthz") == (200, "OK\n")
    assert get(served.port, "/readyz") == (200, "OK\n")
    assert get(served.port, "/")[0] == 426
    status, text = get(served.port, "/metrics")
    assert status == 200
    counted = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(counted['acrlpd_requests_total{outcome="ok"}']) >= 1
    assert float(counted["acrlpd_checkpoint_step"]) == 3
    assert float(counted["acrlpd_model_seconds_count"]) >= 1


# -- the door ----------------------------------------------------------------------------------------------------------


def test_api_key(policy):
    with running(policy, api_keys=["right", "other"]) as server:
        for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "right"}):
            with pytest.raises(InvalidStatus) as refused:
                server.connect(additional_headers=headers)
            assert refused.value.response.status_code == 401
        assert get(server.port, "/healthz")[0] == 200
        assert get(server.port, "/metrics")[0] == 401
        for key in ("right", "other"):
            client = server.client(additional_headers={"Authorization": f"Api-Key {key}"})
            assert client.infer(OBS)["actions"].shape == (5, 2)
        assert get(server.port, "/metrics", Authorization="Api-Key right")[0] == 200


def test_an_address_that_others_reach_needs_a_key(policy):
    with pytest.raises(ValueError, match="anyone may move the robot"):
        PolicyServer(policy, ServerConfig(host="0.0.0.0"))
    PolicyServer(policy, ServerConfig(host="0.0.0.0"), api_keys=["key"])
    PolicyServer(policy, ServerConfig(host="0.0.0.0", allow_anonymous=True))


def test_tls(policy, certificate):
    cert, key = certificate
    trusting = ssl.create_default_context(cafile=cert)
    with running(policy, tls_cert=cert, tls_key=key, max_batch_size=1) as server:
        secure = connect(f"wss://localhost:{server.port}", ssl=trusting, compression=None, max_size=None, legacy=True)
        assert Client(secure).infer(OBS)["actions"].shape == (5, 2)
        with pytest.raises((InvalidMessage, OSError, EOFError)):
            server.connect(open_timeout=5)  # without TLS


def test_limits_refuse_with_a_reason(policy):
    limits = {"max_connections": 2, "max_requests_per_s": 1.0, "max_message_bytes": 2000}
    with running(policy, **limits) as server:
        client, other = server.client(), server.client()
        with pytest.raises(InvalidStatus) as refused:
            server.connect()
        assert refused.value.response.status_code == 503
        assert b"max_connections" in refused.value.response.body
        client.infer(OBS)
        with pytest.raises(RuntimeError, match="rate limit: more than 1 requests a second"):
            client.infer(OBS)
        time.sleep(1.1)
        assert "actions" in client.infer(OBS)  # a refusal leaves the connection open
        with pytest.raises(ConnectionClosed) as closed:
            other.infer({"state": np.zeros(1000)})
        assert closed.value.rcvd.code == 1009


def test_one_address_has_so_many_connections(policy):
    with running(policy, max_connections_per_address=1) as server:
        client = server.client()
        with pytest.raises(InvalidStatus) as refused:
            server.connect()
        assert refused.value.response.status_code == 429
        assert b"max_connections_per_address" in refused.value.response.body
        assert "actions" in client.infer(OBS)


class Slow:
    """A policy whose calls take as long as the test likes."""

    def __init__(self, policy):
        self.policy, self.go, self.calls = policy, threading.Event(), []

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def infer_batch(self, requests, **options):
        self.calls.append((len(requests), options["size"]))
        assert self.go.wait(60)
        return self.policy.infer_batch(requests, **options)


def test_requests_that_wait_share_one_call_and_too_many_are_refused(policy):
    slow = Slow(policy)
    with running(slow, max_concurrent_requests=5, max_batch_size=4) as server:
        clients = [server.client() for _ in range(6)]
        clients[0].connection.send(codec.pack(OBS))
        wait_until(lambda: slow.calls)
        for client in clients[1:]:
            client.connection.send(codec.pack(OBS))
        refusal = next(answer for client in clients if isinstance(answer := receive(client), str))
        assert refusal.startswith("busy: 5 requests")
        slow.go.set()
        wait_until(lambda: len(slow.calls) == 2)
    assert slow.calls == [(1, 1), (4, 4)]


def receive(client: Client):
    with contextlib.suppress(TimeoutError):
        return client.connection.recv(timeout=1)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("seconds", "sizes"), [(0.0, [1, 1]), (5.0, [2])])
def test_a_request_waits_for_company(policy, seconds, sizes):
    slow = Slow(policy)
    slow.go.set()
    with running(slow, batch_wait_s=seconds, max_batch_size=2) as server:
        clients = server.client(), server.client()
        slow.calls.clear()
        clients[0].connection.send(codec.pack(OBS))
        if not seconds:
            wait_until(lambda: slow.calls)
        clients[1].connection.send(codec.pack(OBS))
        assert all("actions" in codec.unpack(client.connection.recv(timeout=60)) for client in clients)
    assert [requests for requests, _ in slow.calls] == sizes


def test_a_request_that_waits_too_long_is_given_up(policy):
    slow = Slow(policy)
    with running(slow, request_timeout_s=0.2) as server:
        client = server.client()
        with pytest.raises(RuntimeError, match=r"timeout: no answer within 0\.2 s"):
            client.infer(OBS)
        slow.go.set()
        assert "actions" in client.infer(OBS)


def test_a_fault_of_the_policy_is_not_the_clients_to_read(policy, caplog):
    class Broken(Slow):
        def infer_batch(self, requests, **options):
            raise RuntimeError("secret path")

    with running(Broken(policy)) as server:
        with pytest.raises(RuntimeError, match="internal error") as told:
            server.client().infer(OBS)
        assert "secret" not in str(told.value)
    assert "secret path" in caplog.text
    with running(Broken(policy), show_tracebacks=True) as server, pytest.raises(RuntimeError, match="secret path"):
        server.client().infer(OBS)


@pytest.mark.parametrize(("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_batch_sizes(largest, sizes):
    assert batch_sizes(largest) == sizes


# -- while it runs -----------------------------------------------------------------------------------------------------


def test_clients_wait_for_the_compilation(policy):
    slow = Slow(policy)
    slow.warm_up = lambda sizes: slow.go.wait(60)
    with running(slow, wait=False) as server:
        connection = server.connect()
        assert get(server.port, "/healthz")[0] == 200
        assert get(server.port, "/readyz") == (503, "compiling\n")
        slow.go.set()
        assert "actions" in Client(connection).infer(OBS)
        assert get(server.port, "/readyz")[0] == 200


def test_a_newer_checkpoint_is_served_without_a_pause(tmp_path):
    save(tmp_path, 1)
    follower = deploy.Follower(tmp_path, deploy.ActingOptions())
    with running(follower.policy, refresh=follower.refresh, reload_interval_s=0.1) as server:
        client = server.client()
        before = client.infer(seeded(1))["actions"]
        save(tmp_path, 2, seed=1)
        deadline = time.monotonic() + 60
        while np.array_equal(after := client.infer(seeded(1))["actions"], before):
            assert time.monotonic() < deadline
        assert server.client().metadata["acrlpd"]["step"] == 2
    expected = deploy.trained_policy(deploy.load_trained(tmp_path), deploy.ActingOptions()).infer(seeded(1))["actions"]
    np.testing.assert_allclose(after, expected, atol=1e-6)


def test_stopping_finishes_what_has_begun(policy):
    slow = Slow(policy)
    with running(slow) as server:
        idle, busy = server.client(), server.client()
        busy.connection.send(codec.pack(OBS))
        wait_until(lambda: slow.calls)
        server.stop.set()
        with pytest.raises(ConnectionClosed) as closed:
            idle.connection.recv(timeout=60)
        assert closed.value.rcvd.code == 1001
        with pytest.raises((OSError, InvalidStatus)):
            server.connect()
        slow.go.set()
        assert "actions" in codec.unpack(busy.connection.recv(timeout=60))


def test_stopping_does_not_wait_for_ever(policy, caplog):
    slow = Slow(policy)
    with running(slow, drain_timeout_s=0.1) as server:
        client = server.client()
        client.connection.send(codec.pack(OBS))
        wait_until(lambda: slow.calls)
        server.stop.set()
        wait_until(lambda: "cut off after 0.1 s" in caplog.text)
        slow.go.set()
