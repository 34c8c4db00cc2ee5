"""Each kind of attack in small: the limit that stops it, and a good client that is served meanwhile.

How much attackers slow others is measured by ``benchmarks/attack.py``.
"""

import contextlib
import os
import socket
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from acrlpd.serving import codec, connection
from acrlpd.serving import server as server_module
from acrlpd.serving.batching import Turns
from acrlpd.serving.connection import Hold, Pace
from acrlpd.serving.limits import RateLimit, check_size, client_address
from acrlpd.serving.request import OPTIONS_KEY
from acrlpd.serving.server import PolicyServer, ServerConfig

sys.path.insert(0, str(Path(__file__).parent))
from conftest import OBS, Running, running
from test_server import Slow, wait_until

REQUEST = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
PING, BINARY, BEGUN, CONTINUED = 0x89, 0x82, 0x02, 0x00
TIMEOUT_S = 0.5  # of servers whose attackers have to be waited for


def frame(first_byte: int, payload: bytes) -> bytes:
    """A frame from a client, whose mask is zero."""
    size = len(payload)
    length = struct.pack("!B", 0x80 | size) if size < 126 else struct.pack("!BQ", 0xFF, size)
    return bytes([first_byte]) + length + bytes(4) + payload


def tcp(server: Running, *, address: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30, source_address=(address, 0))


def upgraded(server: Running, **options) -> socket.socket:
    """A websocket after its handshake and the metadata."""
    raw = tcp(server, **options)
    raw.sendall(REQUEST + b"\r\n")
    received = b""
    while b"action_horizon" not in received:
        received += raw.recv(4096)
    return raw


def is_cut_off(raw: socket.socket) -> bool:
    """Whether the server ends the connection; what it says before does not count."""
    raw.settimeout(30)
    with contextlib.suppress(ConnectionError):
        while raw.recv(65536):
            pass
    return True


def is_open(raw: socket.socket) -> bool:
    raw.settimeout(0.2)
    try:
        return bool(raw.recv(65536))
    except TimeoutError:
        return True
    except ConnectionError:
        return False


# -- before the handshake ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", b"G", REQUEST, b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 50], ids=len)
def test_whoever_does_not_ask_is_cut_off(policy, said):
    with running(policy, message_timeout_s=TIMEOUT_S, api_keys=["key"]) as server:
        raw = tcp(server)
        raw.sendall(said)
        assert is_cut_off(raw)
        with server.client(additional_headers={"Authorization": "Api-Key key"}).connection:
            pass


def test_silence_gives_way_to_whoever_comes_later(policy, monkeypatch):
    """The oldest of the address goes, and a client that asks at once is served in the middle of it."""
    monkeypatch.setattr(connection, "MAX_SILENT_PER_ADDRESS", 3)
    with running(policy) as server:
        client = server.client()
        silent = [tcp(server) for _ in range(6)]
        assert "actions" in client.infer(OBS)
        assert all(map(is_cut_off, silent[:3]))
        assert "actions" in server.client().infer(OBS)
        assert [is_open(each) for each in silent[4:]] == [True, True]


def test_silence_is_limited_in_all(policy, monkeypatch):
    """The address that has the most silent connections loses one."""
    monkeypatch.setattr(connection, "MAX_SILENT", 4)
    with running(policy) as server:
        one = tcp(server, address="127.0.0.3")
        many = [tcp(server, address="127.0.0.2") for _ in range(5)]
        assert "actions" in server.client().infer(OBS)
        assert all(map(is_cut_off, many[:2]))
        assert is_open(one)
        assert is_open(many[-1])


def test_silence_before_tls_counts_and_ends(policy, monkeypatch, certificate):
    monkeypatch.setattr(connection, "MAX_SILENT_PER_ADDRESS", 2)
    cert, key = certificate
    with running(policy, tls_cert=cert, tls_key=key, message_timeout_s=2.0) as server:
        silent = [tcp(server) for _ in range(4)]
        assert all(map(is_cut_off, silent[:2]))
        assert is_open(silent[3])
        assert all(map(is_cut_off, silent))


def test_a_flood_of_connections_leaves_nothing_behind(policy):
    with running(policy) as server:
        client = server.client()
        for _ in range(200):
            tcp(server).close()
        assert "actions" in client.infer(OBS)
        assert "actions" in server.client().infer(OBS)
        descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        assert descriptors < 150


# -- crumbs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "crumbs",
    [
        frame(BEGUN, b"xx") + frame(CONTINUED, b"xx") * 100,
        frame(BEGUN, b"") + frame(CONTINUED, b"") * 100,
        frame(PING, b"x") * 100,
        frame(0x8A, b"") * 100,  # pongs that nobody asked for
        frame(BINARY, codec.pack(OBS)) * 100,
    ],
    ids=["fragments", "empty fragments", "pings", "pongs", "requests without waiting for answers"],
)
def test_crumbs_are_counted_and_their_sender_is_cut_off(policy, crumbs):
    with running(policy) as server:
        client, raw = server.client(), upgraded(server)
        raw.sendall(crumbs)
        assert is_cut_off(raw)
        assert "actions" in client.infer(OBS)


def test_crumbs_in_the_packet_of_the_handshake_count_too(policy):
    with running(policy) as server:
        raw = tcp(server)
        raw.sendall(REQUEST + b"\r\n" + frame(BEGUN, b"xx") + frame(CONTINUED, b"xx") * 20_000)
        assert is_cut_off(raw)
        assert "actions" in server.client().infer(OBS)


def test_a_message_in_large_fragments_is_a_message(policy):
    """A proxy may cut messages; so may a client, with a few small pieces."""
    message = codec.pack(OBS | {"other": np.zeros(2**18, np.uint8)})
    with running(policy) as server:
        client = server.client()
        for size in (2048, 65536):
            client.connection.send([message[k : k + size] for k in range(0, len(message), size)])
            assert "actions" in codec.unpack(client.connection.recv(timeout=60))
        for _ in range(5):
            client.connection.send([codec.pack(OBS)[k : k + 10] for k in range(0, len(codec.pack(OBS)), 10)])
            assert "actions" in codec.unpack(client.connection.recv(timeout=60))


def test_requests_one_after_the_other_are_no_crumbs(policy):
    with running(policy) as server:
        client = server.client()
        for _ in range(3 * connection.MAX_CRUMBS):
            assert "actions" in client.infer(OBS)


# -- who does not read -------------------------------------------------------------------------------------------------


def narrow(server: Running) -> socket.socket:
    """A websocket that has room for little, so that a peer that does not read is soon noticed."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(30)
    raw.connect(("127.0.0.1", server.port))
    raw.sendall(REQUEST + b"\r\n")
    return raw


def send_until_cut_off(raw: socket.socket, data: bytes) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        raw.sendall(data)


class Talkative:
    """A policy with long answers."""

    def __init__(self, policy):
        self.policy = policy

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def infer_batch(self, requests, **options):
        answers = self.policy.infer_batch(requests, **options)
        return [answer | {"more": np.zeros(10**6, np.uint8)} for answer in answers]


@pytest.mark.parametrize(
    "sent",
    [frame(PING, b"x" * 125) * 2000, frame(BINARY, codec.pack(OBS)) * 200],
    ids=["pings", "requests"],
)
def test_a_peer_that_does_not_read_is_cut_off(policy, sent, monkeypatch):
    """Whatever it sends: its pongs and answers are not kept for it."""
    monkeypatch.setattr(connection, "MAX_CRUMBS", 10**9)  # so that nothing else stops it
    with running(Talkative(policy), message_timeout_s=TIMEOUT_S) as server:
        client, raw = server.client(), narrow(server)
        with pytest.raises(ConnectionError):  # the server has hung up
            send_until_cut_off(raw, sent)
        assert "actions" in client.infer(OBS)


def test_what_is_written_for_a_peer_is_bounded(policy, monkeypatch):
    monkeypatch.setattr(connection, "MAX_UNREAD_BYTES", 1000)
    monkeypatch.setattr(connection, "MAX_CRUMBS", 10**9)
    with running(policy) as server:
        raw = narrow(server)
        with pytest.raises(ConnectionError):
            send_until_cut_off(raw, frame(PING, b"x" * 125) * 2000)
        assert "actions" in server.client().infer(OBS)


# -- large messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((101, 100, 3), "u1"), ((3, 101, 100), "u1"), ((101, 100), "u1"), ((101, 100, 1), "f4"), ((1, 101, 100), "f8")],
)
def test_a_picture_above_the_limit_is_refused_by_its_shape(policy, shape, dtype):
    with running(policy, max_picture_pixels=100 * 100) as server:
        client, other = server.client(), server.client()
        with pytest.raises(RuntimeError, match="10100 pixels; a picture has at most 10000"):
            client.infer(OBS | {"image": {"base": np.zeros(shape, dtype)}})
        assert "actions" in other.infer(OBS)


def test_pictures_up_to_the_limit_pass():
    check_size({"image": {"a": np.zeros((1080, 1920, 3), np.uint8)}, "state": np.zeros(10**7)}, 1920 * 1080)


@pytest.mark.parametrize(
    "whole", [frame(BINARY, bytes(5000)), frame(BEGUN, bytes(5000)) + frame(CONTINUED, bytes(5000))]
)
def test_a_message_that_has_begun_must_end(policy, whole):
    with running(policy, message_timeout_s=TIMEOUT_S) as server:
        client, raw = server.client(), upgraded(server)
        raw.sendall(whole[:-1])
        assert is_cut_off(raw)
        assert "actions" in client.infer(OBS)


def test_a_frame_above_the_limit_is_refused_by_its_header(policy):
    with running(policy, max_message_bytes=10_000) as server:
        raw = upgraded(server)
        raw.sendall(b"\x82\xff" + struct.pack("!Q", 10_001) + bytes(4))
        assert is_cut_off(raw)
        assert "actions" in server.client().infer(OBS)


def test_what_has_come_and_is_not_answered_is_bounded(policy, monkeypatch):
    """Whoever holds the most has to go: half messages here, each below the limit of one."""
    monkeypatch.setattr(server_module, "MAX_HELD_MESSAGES", 2)
    with running(policy, max_message_bytes=400_000) as server:
        client = server.client()
        attackers = [upgraded(server) for _ in range(4)]
        for raw in attackers:
            with contextlib.suppress(ConnectionError):
                raw.sendall(frame(BINARY, bytes(390_000))[:-1])
        assert "actions" in client.infer(OBS)
        assert sum(not is_open(raw) for raw in attackers) >= 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-50, 100)), max_size=60))
@settings(deadline=None, derandomize=True)
def test_those_who_hold_a_share_may_stay(changes):
    hold, held = Hold(100), [0] * 5
    for who, by in changes:
        held[who] = max(0, held[who] + by)
        may = hold.change(who, by)
        assert may or (sum(held) > 100 and held[who] > 100 / 5)
        if not may:
            hold.forget(who)
            held[who] = 0


# -- taking turns ------------------------------------------------------------------------------------------------------


def test_whoever_costs_much_rests_longer_the_more_others_rest():
    pace = Pace()
    assert pace.charge("a", "here", 0.3) == pytest.approx(0.3, rel=0.1)
    assert pace.charge("b", "here", 0.3) == pytest.approx(0.6, rel=0.1)
    assert pace.left("b") == pytest.approx(0.6, rel=0.1)
    assert pace.left("c") == 0
    assert pace.wait("there") == 0
    assert pace.wait("here") == pytest.approx(0.6, rel=0.1)  # by coming back nobody escapes
    pace.forget("b")
    assert pace.left("b") == 0
    for _ in range(10_000):
        pace.open("here")
        pace.charge("a", "here", 100.0)
    assert max(pace.left("a"), pace.wait("here")) <= connection.MAX_REST_S  # nobody is locked out for long


def test_a_connection_that_rests_is_read_again(policy, monkeypatch):
    monkeypatch.setattr(connection, "FREE_S", -1.0)  # everything costs a rest
    monkeypatch.setattr(connection, "REST", 100.0)
    with running(policy) as server:
        clients = server.client(), server.client()
        for client in clients:
            assert "actions" in client.infer(OBS)


@given(st.lists(st.integers(1, 30), min_size=2, max_size=5))
@settings(deadline=None, derandomize=True)
def test_clients_take_turns_however_much_one_asks(counts):
    """After any number of services, two clients that still wait have had equally many, give or take one."""
    turns = Turns()
    queue = [(turns.take(client), client) for client, count in enumerate(counts) for _ in range(count)]
    served = [0] * len(counts)
    for place, client in sorted(queue, key=lambda each: each[0]):
        turns.serve(place)
        served[client] += 1
        waiting = [other for other in range(len(counts)) if served[other] < counts[other]]
        assert max((served[k] for k in waiting), default=0) - min((served[k] for k in waiting), default=0) <= 1


def test_a_late_client_does_not_wait_for_those_who_came_before():
    turns = Turns()
    many = [turns.take("many") for _ in range(10)]
    turns.serve(many[3])
    assert turns.take("one") <= many[4]


def test_each_client_has_a_place_and_the_next_turn(policy):
    """One address fills all places; another is served next, not refused."""
    slow = Slow(policy)
    with running(slow, max_concurrent_requests=4, max_batch_size=1) as server:
        greedy = [upgraded(server, address="127.0.0.2") for _ in range(5)]
        for raw in greedy:
            raw.sendall(frame(BINARY, codec.pack(OBS)))
        wait_until(lambda: slow.calls and server.server.batcher.waiting == 3)
        client, order = server.client(), []
        client.connection.send(codec.pack(OBS | {OPTIONS_KEY: {"seed": 7}}))
        wait_until(lambda: server.server.batcher.waiting == 4)
        infer = slow.infer_batch
        slow.infer_batch = lambda requests, **options: (
            order.append(requests[0].options.seed) or infer(requests, **options)
        )
        slow.go.set()
        assert "actions" in codec.unpack(client.connection.recv(timeout=60))
        wait_until(lambda: len(slow.calls) == 5)
    assert order == [7, None, None, None]


def test_a_key_of_its_own_makes_a_client(policy):
    def owners(keys: list[str]) -> list:
        server = PolicyServer(policy, ServerConfig(), api_keys=keys)
        asked = [("1.1.1.1", "a"), ("2.2.2.2", "a"), ("1.1.1.1", "b")]
        return [server._owner(address, [f"Api-Key {key}"]) for address, key in asked]

    assert owners(["a", "b"]) == ["key 0", "key 0", "key 1"]
    assert owners(["a"]) == ["1.1.1.1", "2.2.2.2", None]
    assert owners([]) == ["1.1.1.1", "2.2.2.2", "1.1.1.1"]


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("10.0.0.1", 5), "10.0.0.1"),
        (("::ffff:10.0.0.1", 5, 0, 0), "10.0.0.1"),
        (("2001:db8::1", 5, 0, 0), "2001:db8::/64"),
        (("2001:db8::ffff:1", 5, 0, 0), "2001:db8::/64"),
        (("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
        (None, "gone"),
    ],
)
def test_what_counts_as_one_address(peer, address):
    assert client_address(peer) == address


def test_a_bucket_is_filled_again():
    limit = RateLimit(1e-9, burst=2)
    assert [limit.allows() for _ in range(3)] == [True, True, False]
    limit.refill()
    assert limit.allows()


def test_whoever_is_sent_away_and_goes_on_sending_takes_no_place(policy):
    """The server reads past what comes after its refusal, and sees that the peer has gone."""
    with running(policy, max_connections=2) as server:
        for _ in range(6):
            client = server.client()
            client.connection.send(codec.pack(["nonsense"]))
            client.connection.recv(timeout=60)
            with contextlib.suppress(ConnectionClosed):
                client.connection.send(codec.pack(OBS))
                client.connection.recv(timeout=0.5)
        assert "actions" in server.client().infer(OBS)


def test_nobody_stays_locked_out(policy):
    """All kinds one after the other; then a new client is served at once, and the server holds nothing of them."""
    with running(policy, message_timeout_s=TIMEOUT_S) as server:
        for sent in (b"", REQUEST, REQUEST + b"\r\n" + frame(BEGUN, b"xx") * 100):
            for _ in range(20):
                tcp(server).sendall(sent)
        assert "actions" in server.client().infer(OBS)
        for _ in range(20):
            with pytest.raises(RuntimeError, match="an observation is a dictionary"):
                server.client().infer(["nonsense"])
        assert "actions" in server.client().infer(OBS)
