"""A loop that blocks, a daemon that cannot start any more, requests during restarts, eight models to adopt: fake engines.
troubles.py DEB [STORY...]
"""

import http.client
import json
import socket
import sys
import threading
import time

from tests.box.stage import (
    BOX,
    CONFIG,
    UNIT,
    Service,
    active,
    dropin,
    fake_engine,
    install,
    journal,
    members,
    of_user,
    report,
    run,
    say,
    until,
)
from tests.e2e.chat import ask
from tests.remote import Model

BLOCKABLE = """#!/usr/bin/python3 -IS
import signal, sys, time
sys.path.insert(0, "/usr/lib/vllmd")
signal.signal(signal.SIGUSR2, lambda *_: time.sleep(600))
from vllmd.__main__ import main
sys.exit(main())
"""


def watchdog(service: Service) -> None:
    """The event loop blocks: systemd ends that daemon, its successor adopts, the journal says where it was."""
    path = BOX / "blockable"
    path.write_text(BLOCKABLE)
    path.chmod(0o755)
    dropin("block", f"[Service]\nExecStart=\nExecStart={path} --config {CONFIG}\nWatchdogSec=2\n")
    run("systemctl", "restart", UNIT)
    pids, pid = sorted(members()), service.pid
    began = time.monotonic()
    run("kill", "-USR2", str(pid))
    until(lambda: service.pid not in (0, pid) and active())
    report("watchdog of 2 s: a blocked loop until the next daemon serves", time.monotonic() - began)
    assert sorted(members()) == pids
    for name in service.models:
        service.wait(name, "ready")
    said = journal()
    assert "Watchdog timeout" in said and "Fatal Python error: Aborted" in said, said[-3000:]
    run("rm", f"/etc/systemd/system/{UNIT}.d/block.conf")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", UNIT)
    assert sorted(members()) == pids


def drain(service: Service) -> None:
    """A stop lets a request finish, longer than TimeoutStopSec would, and says how far it is; a reload is told too."""
    assert status_text() == "8 of 8 models up"
    run("systemctl", "reload", UNIT)
    assert status_text() == "8 of 8 models up" and active()
    dropin("short", "[Service]\nTimeoutStopSec=3\n")
    run("systemctl", "restart", UNIT)
    answer: list[int] = []
    talk = threading.Thread(target=lambda: answer.append(complete(service.look("m0"), 120)), daemon=True)
    talk.start()
    service.wait("m0", lambda m: m["requests_running"] == 1)
    began = time.monotonic()
    run("systemctl", "stop", "--no-block", UNIT)
    until(lambda: status_text() == "ending: 1 model left")
    talk.join()
    assert answer == [120]
    until(lambda: run("systemctl", "is-active", UNIT, check=False).out.strip() == "inactive")
    took = time.monotonic() - began
    assert took > 4.0 and run("systemctl", "show", "-p", "Result", "--value", UNIT).out.strip() == "success", took
    report("a stop that drains, with TimeoutStopSec=3", took)
    until(lambda: run("systemctl", "is-active", "vllmd.socket", check=False).out.strip() == "inactive")
    run("rm", f"/etc/systemd/system/{UNIT}.d/short.conf")
    run("systemctl", "daemon-reload")
    run("systemctl", "start", UNIT)
    service.up(*service.models)


def status_text() -> str:
    return run("systemctl", "show", "-p", "StatusText", "--value", UNIT).out.strip()


def complete(model: Model, tokens: int) -> int:
    """A request to the model itself; the tokens that came."""
    connection, response = ask(model, max_tokens=tokens, ignore_eos=True)
    try:
        return int(json.loads(response.read())["usage"]["completion_tokens"])
    finally:
        connection.close()


class Client(threading.Thread):
    """Asks for the status, each time on a connection of its own."""

    def __init__(self, path: str, count: int) -> None:
        super().__init__(daemon=True)
        self.path, self.count = path, count
        self.times: list[float] = []
        self.failed: list[str] = []

    def run(self) -> None:
        for _ in range(self.count):
            began = time.monotonic()
            try:
                status = self.ask()
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
                continue
            if status != 200:
                self.failed.append(str(status))
            self.times.append(time.monotonic() - began)

    def ask(self) -> int:
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(60)
        try:
            connection.sock.connect(self.path)
            connection.request("GET", "/api/v1/status")
            response = connection.getresponse()
            response.read()
            return response.status
        finally:
            connection.close()


def requests(service: Service) -> None:
    """On the control socket during three restarts: all answered, by this daemon or by the next."""
    clients = [Client(str(service.socket), 50) for _ in range(3)]
    for client in clients:
        client.start()
    restarts = 0
    while restarts < 3 or any(client.is_alive() for client in clients):
        run("systemctl", "restart", UNIT)
        restarts += 1
    for client in clients:
        client.join()
    failed = [text for client in clients for text in client.failed]
    times = sorted(t for client in clients for t in client.times)
    assert not failed and len(times) == 150, failed
    report(f"150 requests on the control socket during {restarts} restarts: answered", f"{len(times)}")
    report("... the slowest", times[-1])


def eight(service: Service) -> None:
    """How long a daemon takes to be ready with nothing to adopt, and with eight models."""

    def boot() -> float:
        run("systemctl", "restart", UNIT)
        said = run(
            "systemctl", "show", UNIT, "-p", "ExecMainStartTimestampMonotonic", "-p", "ActiveEnterTimestampMonotonic"
        )
        at = dict(line.split("=") for line in said.out.split())
        return (int(at["ActiveEnterTimestampMonotonic"]) - int(at["ExecMainStartTimestampMonotonic"])) / 1e6

    run("vllmctl", "stop", "--all")
    bare = sorted(boot() for _ in range(3))[1]
    run("vllmctl", "start", "--all")
    pids = sorted(members())
    full = sorted(boot() for _ in range(3))[1]
    assert sorted(members()) == pids
    assert all(model["state"] == "ready" for model in service.status()["models"])
    report("daemon: exec to READY, 8 models configured, none to adopt", bare)
    report("... 8 models adopted", full)
    assert full - bare <= 1.0, (bare, full)


def broken(service: Service) -> None:
    """A configuration that is wrong after a restart: it says where, the models are ended, nothing is left."""
    good = CONFIG.read_text()
    CONFIG.write_text(good + '\n[models.bad]\nvrm = "9 Gb"\n')
    refused = run("systemctl", "restart", UNIT, check=False)
    assert refused.code != 0
    until(lambda: not members() and not of_user())
    line = good.count("\n") + 3
    status = run("systemctl", "status", UNIT, "--no-pager", check=False).out
    assert f"{CONFIG}:{line}" in status and "vrm" in status, status
    assert run("systemctl", "show", "-p", "ExecMainStatus", "--value", UNIT).out.strip() == "78"
    CONFIG.write_text(good)
    run("systemctl", "start", UNIT)
    service.up("m0")

    say("a daemon that fails again and again")
    dropin("fail", "[Service]\nExecStart=\nExecStart=/bin/false\n")
    run("systemctl", "restart", UNIT, check=False)
    began = time.monotonic()
    until(lambda: not members() and not of_user())
    report("a daemon that cannot start any more: its models are swept after", time.monotonic() - began)
    run("rm", f"/etc/systemd/system/{UNIT}.d/fail.conf")
    run("systemctl", "daemon-reload")
    run("systemctl", "reset-failed", UNIT)
    run("systemctl", "start", UNIT)
    service.up("m0")


def main() -> None:
    only = sys.argv[2:]
    engine = fake_engine()
    install(sys.argv[1])
    service = Service(engine, model=BOX / "weights", vram="1500MiB", env={"FAKE_START_S": "0.3"})
    service.models = {f"m{number}": {} for number in range(8)}
    service.models["m0"] = {"env": {"FAKE_START_S": "0.3", "FAKE_TOKENS_PER_S": "10"}, "drain": "20s"}
    service.restart()
    service.up(*service.models)
    dropin("often", "[Unit]\nStartLimitIntervalSec=0\n")
    for story in (watchdog, drain, requests, eight):
        if not only or story.__name__ in only:
            say(story.__name__)
            story(service)
    run("rm", f"/etc/systemd/system/{UNIT}.d/often.conf")
    run("systemctl", "daemon-reload")
    say("broken")
    broken(service)
    run("systemctl", "stop", UNIT)
    assert not members() and not of_user()


if __name__ == "__main__":
    main()
