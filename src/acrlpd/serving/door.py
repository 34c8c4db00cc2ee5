"""The entrance for clients: the address, the certificate, the API keys and the server's limits.

``open_door`` finds every mistake in these before anything large is loaded.
"""

from __future__ import annotations

import dataclasses
import errno
import socket
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from acrlpd import fields
from acrlpd.fields import Interval, NonNegativeFloat, PositiveFloat, PositiveInt
from acrlpd.serving.limits import is_loopback

# this machine lacks an address that a name has, such as ::1 of localhost without IPv6; the name's others will do
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Address and limits of a server. The defaults are for robots on the same machine."""

    host: str = "127.0.0.1"
    port: Annotated[int, Interval("[0, 65535]")] = 8000  # 0: any free port
    max_batch_size: PositiveInt = 8  # requests in one call of the policy
    # how long a request waits for others to join it, if other clients are connected
    batch_wait_s: NonNegativeFloat = 0.002
    # decoded, waiting and running; beyond that, only one per client is accepted
    max_concurrent_requests: PositiveInt = 64
    request_timeout_s: PositiveFloat = 30.0
    max_requests_per_s: PositiveFloat | None = None  # per connection; None: no limit
    max_connections: PositiveInt = 64
    max_connections_per_address: PositiveInt = 64
    max_message_bytes: PositiveInt = 16 * 1024**2
    max_picture_pixels: PositiveInt = 1920 * 1080
    # max. time for a handshake, for the rest of a message, and for reading an answer
    message_timeout_s: PositiveFloat = 10.0
    ping_interval_s: PositiveFloat = 20.0  # a peer that does not answer a ping within the same time counts as gone
    allow_anonymous: bool = False  # serve without a key on an address that others can reach
    tls_cert: str | None = None  # a PEM file, like tls_key
    tls_key: str | None = None
    reload_interval_s: PositiveFloat | None = None  # look for a newer checkpoint this often; None: never
    drain_timeout_s: PositiveFloat = 30.0  # for the requests in progress when the server is told to stop
    show_tracebacks: bool = False  # send them to clients, as openpi does

    def __post_init__(self):
        fields.check(self)
        if not self.host.strip():
            raise ValueError("host is empty: name an address, 127.0.0.1 for this machine alone or 0.0.0.0 for all")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and its key: give tls_cert and tls_key, or neither")

    def url(self, port: int) -> str:
        """Return the URL for clients on this machine."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self.tls_cert else 'ws'}://{host}:{port}"


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
