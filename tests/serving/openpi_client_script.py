"""Run by test_openpi_client.py in an environment of its own, where openpi's client and its old numpy live.

Arguments: a port and the API key. Prints one JSON object a line, and waits for a line of input before the restart.
"""

import json
import sys
import time

import numpy as np
from openpi_client import action_chunk_broker, image_tools, msgpack_numpy, websocket_client_policy
from websockets.exceptions import ConnectionClosed, InvalidStatus

PORT, KEY = int(sys.argv[1]), sys.argv[2]
CAMERA = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
OBS = {
    "state": np.array([0.5, 1.5, 0.0], np.float32),
    "image": {"base": image_tools.resize_with_pad(CAMERA, 64, 64)},
    "prompt": "open the drawer",
}


def tell(name, value):
    print(json.dumps({name: value}), flush=True)


def client(key=KEY):
    return websocket_client_policy.WebsocketClientPolicy("127.0.0.1", PORT, api_key=key)


tell("numpy", np.__version__)
for wrong in ("wrong", None):
    try:
        client(wrong)
    except InvalidStatus as error:
        tell("refused", type(error).__name__ + " " + str(error))

policy = client()
tell("metadata", policy.get_server_metadata())
first = policy.infer(OBS)
tell("keys", sorted(first))
tell("dtype_shape", [str(first["actions"].dtype), list(first["actions"].shape)])
seeded = policy.infer({**OBS, "acrlpd": {"seed": 7}})
tell("seeded", seeded["actions"].tolist())
tell("timing", sorted(seeded["server_timing"]))

broker = action_chunk_broker.ActionChunkBroker(policy, action_horizon=5)
steps = [broker.infer(OBS)["actions"] for _ in range(6)]
tell("broker", [list(np.shape(step)) for step in steps])
tell("broker_chunks_differ", bool(not np.array_equal(steps[0], steps[5])))

try:
    policy.infer({"prompt": "no state"})
except RuntimeError as error:
    tell("error", str(error))

policy = client()
tell("connected", True)
sys.stdin.readline()  # the server is stopped now, and comes back while we wait
deadline = time.monotonic() + 300
while True:
    try:
        again = policy.infer(OBS)["actions"].shape
        break
    except (ConnectionClosed, OSError) as error:
        tell("lost", type(error).__name__)
    while time.monotonic() < deadline:
        try:
            policy = client()
            break
        except OSError:
            time.sleep(0.2)
tell("after_restart", list(again))
tell("unpacked_by_the_old_numpy", msgpack_numpy.unpackb(msgpack_numpy.packb(np.float32(1.5))) == 1.5)
