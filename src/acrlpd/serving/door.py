"""The entrance for clients: the address, the certificate, the API keys and the server's limits.

``open_door`` finds every mistake in these before anything large is loaded.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import socket
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

from acrlpd.serving.limits import is_loopback

MAX_PORT = 65535
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # for an address of a name, such as localhost's ::1 without IPv6


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Address and limits of a server. The defaults are for robots on the same machine."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    max_batch_size: int = 8  # requests in one call of the policy
    batch_wait_s: float = 0.002  # how long a request waits for others to join it, if other clients are connected
    max_concurrent_requests: int = 64  # decoded, waiting and running; beyond that, only one per client is accepted
    request_timeout_s: float = 30.0
    max_requests_per_s: float | None = None  # per connection; None: no limit
    max_connections: int = 64
    max_connections_per_address: int = 64
    max_message_bytes: int = 16 * 1024**2
    max_picture_pixels: int = 1920 * 1080
    message_timeout_s: float = 10.0  # max. time for a handshake, for the rest of a message, and for reading an answer
    ping_interval_s: float = 20.0  # a peer that does not answer a ping within the same time counts as gone
    allow_anonymous: bool = False  # serve without a key on an address that others can reach
    tls_cert: str | None = None  # a PEM file, like tls_key
    tls_key: str | None = None
    reload_interval_s: float | None = None  # look for a newer checkpoint this often; None: never
    drain_timeout_s: float = 30.0  # for the requests in progress when the server is told to stop
    show_tracebacks: bool = False  # send them to clients, as openpi does

    def __post_init__(self):
        if not self.host.strip():
            raise ValueError("host is empty: name an address, 127.0.0.1 for this machine alone or 0.0.0.0 for all")
        if not 0 <= self.port <= MAX_PORT:
            raise ValueError(f"port must be from 0 (any free one) to {MAX_PORT}, got {self.port}")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in SECONDS:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("max_requests_per_s", "reload_interval_s"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number or absent, got {value}")
        if not 0 <= self.batch_wait_s < math.inf:
            raise ValueError(f"batch_wait_s must be 0 or a positive number, got {self.batch_wait_s}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and its key: give tls_cert and tls_key, or neither")

    def url(self, port: int) -> str:
        """Return the URL for clients on this machine."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self.tls_cert else 'ws'}://{host}:{port}"


COUNTS = (
    "max_batch_size",
    "max_concurrent_requests",
    "max_connections",
    "max_connections_per_address",
    "max_message_bytes",
    "max_picture_pixels",
)
SECONDS = ("request_timeout_s", "message_timeout_s", "ping_interval_s", "drain_timeout_s")


@dataclasses.dataclass(frozen=True)
class Door:
    """The certificate and the sockets, which are bound but do not listen yet."""

    sockets: tuple[socket.socket, ...]
    tls: ssl.SSLContext | None

    @property
    def port(self) -> int:
        return int(self.sockets[0].getsockname()[1])

    def close(self) -> None:
        for each in self.sockets:
            each.close()


def open_door(config: ServerConfig, api_keys: Sequence[str]) -> Door:
    """Check keys and certificate and bind the port.

    Raises:
        ValueError: one of them cannot be used; the message says which, and what to do.
    """
    check_keys(config, api_keys)
    tls = _ssl_context(config)
    return Door(tuple(_bound(config)), tls)


def check_keys(config: ServerConfig, api_keys: Sequence[str]) -> None:
    """Refuse keys that a header cannot hold, and an address that others can reach without a key."""
    if not all(key.isascii() and key.isprintable() and key.strip() == key != "" for key in api_keys):
        raise ValueError("an API key must be printable ASCII without spaces around it, and not empty")
    if not (api_keys or config.allow_anonymous or is_loopback(config.host)):
        raise ValueError(
            f"others can reach {config.host}, and without an API key anyone may move the robot. Give a key, bind "
            "to 127.0.0.1, or set allow_anonymous if the network itself is guarded."
        )


def _bound(config: ServerConfig) -> list[socket.socket]:
    """Return a socket for every address of the host that this machine has, all with one port."""
    sockets: list[socket.socket] = []
    port, failure = config.port, None
    for family, address in _addresses(config):
        try:
            sockets.append(_listener(family, (address[0], port, *address[2:])))
        except OSError as error:
            failure = error
            if error.errno not in NOT_HERE:
                break
        else:
            port = sockets[-1].getsockname()[1]
    if failure is None or (sockets and failure.errno in NOT_HERE):
        return sockets
    for each in sockets:
        each.close()
    raise ValueError(
        f"cannot serve on {config.host} port {config.port}: {failure.strerror or failure}. Choose another --port (0: "
        "any free one), or an address of this machine as --host."
    ) from failure


def _addresses(config: ServerConfig) -> list[tuple[int, tuple[object, ...]]]:
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"host {config.host!r} is no address of this machine ({error}); give a name or a number without a port or "
            "brackets, such as 127.0.0.1 or ::1"
        ) from error
    return list(dict.fromkeys((family, address) for family, *_, address in found))


def _listener(family: int, address: tuple[object, ...]) -> socket.socket:
    """Return a socket that is bound to the address."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _ssl_context(config: ServerConfig) -> ssl.SSLContext | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    for path in (config.tls_cert, config.tls_key):
        if not Path(path).is_file():
            raise ValueError(f"TLS: no file {path}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key, password=_no_password(config.tls_key))
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"TLS: {config.tls_cert} and {config.tls_key} are not a certificate in PEM and its key: {reason}"
        ) from error
    return context


def _no_password(key: str) -> Callable[[], str]:
    """Return a password callback that refuses encrypted keys; without it, the server would wait at the terminal."""

    def refuse() -> str:
        raise ValueError(f"{key} is encrypted; decrypt it first (openssl pkey), readable by this user alone")

    return refuse
