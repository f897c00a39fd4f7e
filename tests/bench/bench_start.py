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

from tests.bench.bench_daemon import cpu
from tests.bench.figures import Figure, middle
from tests.bench.stage import daemon_in, scratch
from tests.e2e.daemon import ROOT, Daemon

ENGINE = ROOT / ".engine"
NAME = "alpha"
ASK_EVERY = 0.05  # seconds
ASK_LIMIT = 10.0  # seconds for one token
LIMIT = 300.0
BODY = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1})


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one engine was run with."""

    argv: tuple[str, ...]
    env: dict[str, str]


@dataclass(frozen=True, slots=True)
class Times:
    """Of one start and stop, in seconds: wish to answer, answer to `ready` in the status, CPU that the daemon took for
    it, and the stop until nothing is left. By hand there is no daemon."""

    start: float
    stop: float
    seen: float = 0.0
    cpu: float = 0.0


def run(pairs: int) -> list[Figure]:
    """The order alternates from pair to pair; one start of each kind before that fills the caches."""
    through: list[Times] = []
    bare: list[Times] = []
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


def figures(through: list[Times], bare: list[Times]) -> list[Figure]:
    """Two ratios: within pairs, whose runs met about the same load, and of the medians. Where they differ by more than
    what is asked for, as on a busy machine, neither shows anything: take more pairs."""
    starts, plain = [t.start for t in through], [t.start for t in bare]
    ratios = [ours.start / theirs.start for ours, theirs in zip(through, bare, strict=True)]
    return [
        Figure(
            "start through vllmd / by hand, real vLLM", median(ratios), "x", 1.02,
            f"median of {len(ratios)} pairs, {min(ratios):.3f} to {max(ratios):.3f}",
        ),
        Figure("... the same, ratio of the medians", median(starts) / median(plain), "x", 1.02),
        middle("... through vllmd", starts, "s"),
        middle("... by hand", plain, "s"),
        middle("... CPU of the daemon for a start", [t.cpu for t in through], "s"),
        middle("... first good answer to `ready` in the status", [t.seen for t in through], "ms"),
        middle("stop of real vLLM: drain, end, memory back", [t.stop for t in through], "s", 3.0),
        middle("... by hand, SIGTERM to the last process gone", [t.stop for t in bare], "s"),
    ]  # fmt: skip


def through_vllmd(daemon: Daemon, port: int) -> tuple[Recipe, Times]:
    """One start, and one stop until it is `stopped` with nothing reserved."""
    boss = int(daemon.client.get("/api/v1/status")["daemon"]["pid"])
    used, began = cpu(boss), time.monotonic()
    daemon.client.post(f"/api/v1/models/{NAME}/start")
    answered = await_answer(port)
    model = daemon.wait(NAME, lambda model: model["state"] == "ready")
    seen, used = time.monotonic() - answered, cpu(boss) - used
    recipe = recipe_of(int(model["pid"]))
    stop = time.monotonic()
    daemon.client.post(f"/api/v1/models/{NAME}/stop")
    daemon.wait(NAME, lambda model: model["state"] == "stopped" and not model["reserved"])
    return recipe, Times(answered - began, time.monotonic() - stop, seen, used)


def by_hand(recipe: Recipe, port: int, folder: Path) -> Times:
    """One start of bare `vllm serve`, and one stop until its process group is empty."""
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
        while lives(process.pid):
            assert time.monotonic() < stop + LIMIT, f"processes of {process.pid} do not end"
            time.sleep(ASK_EVERY)
        return Times(answered - began, time.monotonic() - stop)
    finally:
        if lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lives(group: int) -> bool:
    """Whether a process group has members."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


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
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ASK_LIMIT)
        try:
            connection.request("POST", "/v1/completions", BODY, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                return time.monotonic()
        except OSError:
            pass  # it does not listen yet, or cannot be asked yet
        finally:
            connection.close()
        time.sleep(ASK_EVERY)
    raise AssertionError(f"no answer within {LIMIT:.0f} s")


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
