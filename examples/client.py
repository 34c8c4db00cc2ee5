"""A client of the policy server in forty lines, without acrlpd or jax. openpi's own client works as well.

    acrlpd serve --checkpoint runs/demo                 # in one terminal
    python examples/client.py --state-dim 39            # in another; needs numpy, msgpack, websockets

It prints the server's metadata, and how long each chunk of actions takes.
"""

import argparse
import os
import time

import msgpack
import numpy as np
from websockets.sync.client import connect


def encode(value):
    """Encode an array in openpi's form: a map with bytes as keys."""
    array = np.asarray(value)
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def decode(entry):
    if b"__ndarray__" in entry:
        return np.ndarray(entry[b"shape"], entry[b"dtype"], entry[b"data"])
    return entry


def ask(connection, observation):
    """Send one observation and return the answer; an error of the server comes as text."""
    connection.send(msgpack.packb(observation, default=encode))
    answer = connection.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return msgpack.unpackb(answer, object_hook=decode)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="ws://127.0.0.1:8000")
    parser.add_argument("--state-dim", type=int, required=True)
    parser.add_argument("--prompt", default="open the drawer")
    parser.add_argument("--count", type=int, default=5)
    arguments = parser.parse_args()
    key = os.environ.get("ACRLPD_API_KEY")
    headers = {"Authorization": f"Api-Key {key}"} if key else None
    with connect(arguments.url, compression=None, max_size=None, additional_headers=headers) as connection:
        print("server:", msgpack.unpackb(connection.recv(), object_hook=decode))
        for _ in range(arguments.count):
            observation = {"state": np.zeros(arguments.state_dim, np.float32), "prompt": arguments.prompt}
            start = time.monotonic()
            answer = ask(connection, observation | {"acrlpd": {"statistics": True}})
            ms = (time.monotonic() - start) * 1000
            q = answer["policy_statistics"].get("q")
            print(f"{answer['actions'].shape} actions in {ms:.1f} ms, Q {'unknown' if q is None else f'{q:.2f}'}")


if __name__ == "__main__":
    main()
