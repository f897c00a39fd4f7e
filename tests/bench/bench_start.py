"""Real vLLM started through vllmd and by hand, in turns: same flags, same environment, same caches, same asking.

The run by hand is given the argument list and environment that vllmd gave its own, read from /proc. Time runs from the
wish (the request to vllmd, the exec by hand) to the first good answer of the engine itself.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench.figures import Figure, middle, spread
from tests.bench.stage import daemon_in, scratch
from tests.e2e.daemon import ROOT, Daemon

ENGINE = ROOT / ".engine"
NAME = "alpha"
ASK_EVERY = 0.05  # seconds
LIMIT = 300.0
BODY = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1})


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one engine was run with."""

    argv: tuple[str, ...]
    env: dict[str, str]


def run(pairs: int) -> list[Figure]:
    """The order alternates from pair to pair; one start of each kind before that fills the caches."""
    through: list[tuple[float, float, float]] = []
    bare: list[tuple[float, float]] = []
    with scratch() as folder:
        port = free_port()
        table = f'[models.{NAME}]\nmodel = "{{models}}/{NAME}"\nport = {port}\n'
        with daemon_in(folder, ENGINE, table) as daemon:
            daemon.start()
            recipe, _ = through_vllmd(daemon, port)
            by_hand(recipe, port, folder)
            for pair in range(pairs):
                if pair % 2:
                    bare.append(by_hand(recipe, port, folder))
                recipe, times = through_vllmd(daemon, port)
                through.append(times)
                if not pair % 2:
                    bare.append(by_hand(recipe, port, folder))
    return figures(through, bare)


def figures(through: list[tuple[float, float, float]], bare: list[tuple[float, float]]) -> list[Figure]:
    ratios = [ours[0] / theirs[0] for ours, theirs in zip(through, bare, strict=True)]
    ours, theirs = [t[0] for t in through], [t[0] for t in bare]
    stops, plain = [t[2] for t in through], [t[1] for t in bare]
    whole = median(ours) / median(theirs)
    detail = f"of the medians; pairs: median {median(ratios):.3f}, {spread(ratios)}"
    return [
        Figure("start through vllmd / by hand", whole, "x", 1.02, detail),
        middle("... through vllmd", ours, "s"),
        middle("... by hand", theirs, "s"),
        middle("... first good answer to `ready` in the status", [t[1] for t in through], "ms"),
        middle("stop: drain, end, memory back", stops, "s", 3.0),
        middle("... by hand, SIGTERM to exit", plain, "s"),
    ]


def through_vllmd(daemon: Daemon, port: int) -> tuple[Recipe, tuple[float, float, float]]:
    """One start and stop: wish to answer, answer to `ready`, stop to `stopped` with nothing reserved."""
    began = time.monotonic()
    daemon.client.post(f"/api/v1/models/{NAME}/start")
    answered = await_answer(port)
    model = daemon.wait(NAME, lambda model: model["state"] == "ready")
    seen = max(time.monotonic(), answered)
    recipe = recipe_of(int(model["pid"]))
    stop = time.monotonic()
    daemon.client.post(f"/api/v1/models/{NAME}/stop")
    daemon.wait(NAME, lambda model: model["state"] == "stopped" and not model["reserved"])
    return recipe, (answered - began, seen - answered, time.monotonic() - stop)


def by_hand(recipe: Recipe, port: int, folder: Path) -> tuple[float, float]:
    """One start and stop of bare `vllm serve`: exec to answer, SIGTERM to exit."""
    own = folder / "bare"
    own.mkdir(exist_ok=True)
    env = recipe.env | {"TMPDIR": str(own), "VLLM_RPC_BASE_PATH": str(own)}
    with (folder / "bare.log").open("wb") as log:
        began = time.monotonic()
        process = subprocess.Popen(
            recipe.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=own, env=env, start_new_session=True
        )
    try:
        answered = await_answer(port)
        stop = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT)
        return answered - began, time.monotonic() - stop
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def recipe_of(pid: int) -> Recipe:
    """The argument list and environment of a running engine, without the mark that makes it vllmd's."""
    folder = Path(f"/proc/{pid}")
    words, pairs = ((folder / name).read_text().rstrip("\0").split("\0") for name in ("cmdline", "environ"))
    env = dict(pair.split("=", 1) for pair in pairs)
    env.pop("VLLMD_COOKIE")
    return Recipe(tuple(words), env)


def await_answer(port: int) -> float:
    """When the engine gave its first good answer."""
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
        try:
            connection.request("POST", "/v1/completions", BODY, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                return time.monotonic()
        except OSError:
            pass  # it does not listen yet
        finally:
            connection.close()
        time.sleep(ASK_EVERY)
    raise AssertionError(f"no answer within {LIMIT:.0f} s")


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
