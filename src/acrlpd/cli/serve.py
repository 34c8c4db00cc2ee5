"""``acrlpd serve --checkpoint PATH``."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from acrlpd import deploy
from acrlpd.deploy import ActingOptions, OpenPIOptions
from acrlpd.deploy.options import refuse_unused
from acrlpd.serving.door import ServerConfig, open_door
from acrlpd.serving.production import PRODUCTION_SERVING_CONFIG, Platform
from acrlpd.serving.server import PolicyServer

API_KEY_VARIABLE = "ACRLPD_API_KEY"


@dataclasses.dataclass(frozen=True)
class ServeArguments:
    """Answer openpi's clients over a websocket until SIGTERM, then finish the requests in progress."""

    checkpoint: str  # a run (runs/demo), its checkpoints folder, one step; or a checkpoint of openpi's, also a URL
    server: Annotated[ServerConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ServerConfig)
    acting: Annotated[ActingOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ActingOptions)
    openpi: OpenPIOptions = dataclasses.field(default_factory=OpenPIOptions)
    api_key_file: str | None = None  # one key a line; None: the key in the variable ACRLPD_API_KEY, if it is set
    platform: Platform | None = None  # defaults of the production table: flow steps, candidates, requests, timeout


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv, None)
    if arguments.platform is not None:  # its numbers are defaults: flags win over them
        arguments = _parse(argv, arguments.platform)
    config, api_keys = arguments.server, _api_keys(arguments.api_key_file)
    door = open_door(config, api_keys)
    refresh = None
    if deploy.is_ours(arguments.checkpoint):
        refuse_unused(arguments.checkpoint, arguments.openpi)
        follower = deploy.Follower(arguments.checkpoint, arguments.acting)
        policy, refresh = follower.policy, follower.refresh
    else:
        policy = deploy.openpi_policy(arguments.checkpoint, arguments.openpi, arguments.acting)

    async def serve() -> None:
        server = PolicyServer(policy, config, api_keys=api_keys, refresh=refresh, door=door)
        await server.run(on_ready=lambda port: print(f"serving {config.url(port)}", flush=True))

    asyncio.run(serve())
    return 0


def _parse(argv: Sequence[str], platform: Platform | None) -> ServeArguments:
    default: ServeArguments = ServeArguments(checkpoint=tyro.MISSING)
    if platform is not None:
        table = PRODUCTION_SERVING_CONFIG[platform]
        limits = ServerConfig(
            max_concurrent_requests=table["max_concurrent_requests"], request_timeout_s=table["request_timeout"]
        )
        acting = ActingOptions(num_samples=table["best_of_n_samples"], num_steps=table["num_diffusion_steps"])
        default = ServeArguments(tyro.MISSING, limits, acting)
    config = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(ServeArguments, args=argv, default=default, prog="acrlpd serve", config=config)


def _api_keys(path: str | None) -> tuple[str, ...]:
    """Return the keys; they are never on the command line, which every user of a machine can read."""
    if path is not None:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
        keys = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not keys:
            raise ValueError(f"{path} holds no API key: expected one a line")
        if "\ufffd" in text:
            raise ValueError(f"{path} is no text in UTF-8: expected an API key a line, in printable ASCII")
        return keys
    return tuple(key for key in [os.environ.get(API_KEY_VARIABLE, "")] if key)
