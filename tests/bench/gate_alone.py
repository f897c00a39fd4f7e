"""The gateway and its listener without the daemon behind them: to profile, and to measure what the daemon adds.

    python -m tests.bench.gate_alone --upstream 127.0.0.1:PORT|unix:PATH [--port 0] [--profile FILE]

Serves the model "bench" to who has the key "sk-bench". Prints "port N" once it listens, ends with SIGTERM. --profile writes
what cProfile saw, for `python -m pstats FILE`.
"""

import argparse
import asyncio
import cProfile
import hashlib
import signal
import traceback
from pathlib import Path

from tests.bench.peers import KEY
from tests.stub_backend import Stub
from vllmd.edge.http import Listeners
from vllmd.edge.stream import EventLog
from vllmd.events import Open
from vllmd.gateway.gateway import Gateway
from vllmd.gateway.waiting import Outlook
from vllmd.spec import ApiKey, HttpSpec, ModelSpec

NAME = "bench"
ROW = {"name": NAME, "model": NAME, "state": "ready", "category": []}


def gateway(endpoint: str) -> Gateway:
    """One whose only model is up."""
    made = Gateway(
        lambda event: None, lambda name: Outlook("ready", ""), lambda: [ROW],
        lambda ident, where, error: traceback.print_exception(error), asyncio.get_running_loop(),
    )  # fmt: skip
    made.configure({NAME: ModelSpec(NAME, NAME)}, HttpSpec())
    made.open(Open(NAME, 1, NAME, endpoint))
    return made


async def serve(endpoint: str, port: int, profile: Path | None) -> None:
    """Until SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    made = gateway(endpoint)
    keys = {NAME: ApiKey(NAME, hashlib.sha256(KEY.encode()).hexdigest())}
    listeners = Listeners(Stub(), EventLog(), None, HttpSpec((("127.0.0.1", port),)), front=made, keys=keys)
    await listeners.start()
    print("port", listeners.addresses[0][1], flush=True)
    watch = cProfile.Profile()
    if profile is not None:
        watch.enable()
    await ended.wait()
    if profile is not None:
        watch.disable()
        watch.dump_stats(profile)
    made.close()
    await listeners.stop()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gate_alone", description=__doc__)
    parser.add_argument("--upstream", required=True, help="the engine: 127.0.0.1:PORT, or unix:PATH")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="what cProfile sees, at the end")
    given = parser.parse_args()
    endpoint = given.upstream if given.upstream.startswith("unix:") else f"http://{given.upstream}"
    asyncio.run(serve(endpoint, given.port, given.profile))


if __name__ == "__main__":
    main()
