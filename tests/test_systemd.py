"""The ties to systemd: real descriptors in a real process, a notify socket that is read, a systemctl that is asked."""

import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllmd.edge import systemd
from vllmd.edge.systemd import Notifier, Unit, parse_jobs, pending_job, take, under_systemd, unit_of

LIMIT = 20.0  # seconds; far above what anything here needs
UNIT = Unit("vllmd.service", False, "/system.slice/vllmd.service")

# -- what we are given

#: Puts the descriptors it is given at 3, 4, ... and becomes the daemon, as systemd does: the pid stays.
EXEC = """
import fcntl, os, sys
fds, env, code = eval(sys.argv[1]), eval(sys.argv[2]), sys.argv[3]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 200) for fd in fds]
os.closerange(3, 200)
for at, fd in enumerate(high):
    os.dup2(fd, 3 + at)
    os.close(fd)
env = {k: v.replace("PID", str(os.getpid())) for k, v in env.items()}
os.execve(sys.executable, [sys.executable, "-c", code], os.environ | env)
"""

#: Tells what take() found, what is open afterwards, and what a careless child would see.
REPORT = """
import json, os, subprocess
from vllmd.edge.systemd import take
given = take(os.environ)
was = [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
child = subprocess.run(["ls", "/proc/self/fd"], close_fds=False, stdout=subprocess.PIPE, text=True).stdout.split()
print(json.dumps({
    "sockets": {n: [[s.getsockname(), s.gettimeout(), s.fileno()] for s in l] for n, l in given.sockets.items()},
    "pidfds": {n: [fd, os.readlink(f"/proc/self/fd/{fd}")] for n, fd in given.pidfds.items()},
    "watchdog": given.watchdog, "notify": given.notify.active, "closed": given.closed,
    "open": sorted(fd for fd in was if fd > 2), "child": [int(fd) for fd in child if int(fd) > 2],
    "env": sorted(k for k in os.environ if k.split("_")[0] in ("LISTEN", "NOTIFY", "WATCHDOG", "STATE", "CREDENTIALS")),
}))
"""


def given(fds: list[int], env: dict[str, str]) -> dict[str, Any]:
    """What a daemon started with these descriptors and variables finds; PID in a value stands for its own."""
    done = subprocess.run(
        [sys.executable, "-c", EXEC, repr(fds), repr(env), REPORT],
        pass_fds=fds, stdout=subprocess.PIPE, check=True, timeout=LIMIT,
    )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Callable[[str], socket.socket]]:
    """Makes listening unix sockets."""
    made: list[socket.socket] = []

    def make(name: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        made.append(sock)
        sock.bind(str(tmp_path / name))
        sock.listen()
        return sock

    yield make
    for sock in made:
        sock.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def test_descriptors_come_by_name_and_no_child_sees_them(
    listener: Callable[[str], socket.socket], sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Sockets and pidfds mixed in one list; two sockets of one name; the rest of the environment stays."""
    pidfd = os.pidfd_open(sleeper.pid)
    fds = [listener("a").fileno(), pidfd, listener("b").fileno(), listener("c").fileno()]
    env = {
        "LISTEN_PID": "PID", "LISTEN_FDS": "4", "LISTEN_FDNAMES": "http:pidfd-qwen3-vl.2:control:http",
        "NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "PID",
        "STATE_DIRECTORY": "/s", "CREDENTIALS_DIRECTORY": "/c",
    }  # fmt: skip
    report = given(fds, env)
    os.close(pidfd)
    assert report["sockets"] == {
        "http": [[str(tmp_path / "a"), 0.0, 3], [str(tmp_path / "c"), 0.0, 6]],
        "control": [[str(tmp_path / "b"), 0.0, 5]],
    }
    fd, link = report["pidfds"].pop("qwen3-vl.2")
    assert (fd, "pidfd" in link, report["pidfds"]) == (4, True, {})
    assert (report["watchdog"], report["notify"], report["closed"]) == (30.0, True, [])
    assert set(report["child"]) & {3, 4, 5, 6} == {3}  # 3 is the directory that `ls` itself has open
    assert report["env"] == ["CREDENTIALS_DIRECTORY", "STATE_DIRECTORY"]


def test_what_nobody_knows_is_closed(listener: Callable[[str], socket.socket]) -> None:
    """An unknown name, a socket that does not listen, something that is no socket, no pidfd: closed, and told."""
    left, right = socket.socketpair()
    null = os.open(os.devnull, os.O_RDONLY)
    with left, right:
        names = "vllmd.socket:control:http:pidfd-m"
        report = given(
            [listener("a").fileno(), left.fileno(), null, null],
            {"LISTEN_PID": "PID", "LISTEN_FDS": "4", "LISTEN_FDNAMES": names},
        )
    os.close(null)
    assert (report["sockets"], report["pidfds"]) == ({}, {})
    assert report["closed"] == names.split(":")
    assert report["open"] == []


@pytest.mark.parametrize("order", [("dead", "alive"), ("alive", "dead")])
def test_of_two_pidfds_of_one_name_the_living_one_is_kept(
    sleeper: subprocess.Popen[bytes], order: tuple[str, str]
) -> None:
    """The store may still hold the former attempt's; the other is closed."""
    with subprocess.Popen(["true"]) as ended:
        fds = {"dead": os.pidfd_open(ended.pid), "alive": os.pidfd_open(sleeper.pid)}
        ended.wait()  # reaped: nobody is there any more
    report = given(
        [fds[name] for name in order], {"LISTEN_PID": "PID", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "pidfd-m:pidfd-m"}
    )
    for fd in fds.values():
        os.close(fd)
    at = 3 + order.index("alive")
    assert [fd for fd, _ in report["pidfds"].values()] == [at]
    assert report["open"] == [at]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"LISTEN_PID": "1"}, []),
        ({"LISTEN_PID": ""}, []),
        ({"LISTEN_PID": "x"}, []),
        ({"LISTEN_FDS": "-1"}, []),
        ({"LISTEN_FDS": "one"}, []),
        ({"LISTEN_FDS": "9" * 30}, []),
        ({"LISTEN_FDS": "99999999", "LISTEN_FDNAMES": "control:http"}, None),
        ({"LISTEN_FDNAMES": ""}, None),
        ({"LISTEN_FDNAMES": "control:http"}, None),
        ({"LISTEN_FDS": "3", "LISTEN_FDNAMES": "control:http:http"}, ["control"]),  # announced, but not there
    ],
)
def test_malformed_values_count_as_absent(
    listener: Callable[[str], socket.socket], changes: dict[str, str], kept: list[str] | None
) -> None:
    """Nothing raises. What is not ours stays untouched (kept []), what has no known name is closed (None)."""
    env = {"LISTEN_PID": "PID", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "control"} | changes
    report = given([listener("a").fileno()], env)
    assert list(report["sockets"]) == (kept or [])
    assert (3 in report["open"]) is (kept is not None)
    assert report["env"] == []


@pytest.mark.parametrize(
    ("env", "seconds"),
    [
        ({"WATCHDOG_USEC": "1500000"}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "me"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_ours_or_none(env: dict[str, str], seconds: float | None) -> None:
    """Another process's watchdog is not fed by us."""
    assert take(env).watchdog == seconds
    assert env == {}


def test_who_started_us() -> None:
    """systemd names the pid that it executed; a shell below a service has the variable of another."""
    assert under_systemd({"SYSTEMD_EXEC_PID": str(os.getpid())})
    assert not under_systemd({"SYSTEMD_EXEC_PID": "1", "NOTIFY_SOCKET": "/run/n"})
    assert under_systemd({"NOTIFY_SOCKET": "/run/n"})
    assert not under_systemd({"INVOCATION_ID": "0"})


# -- what we say


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A systemd that listens; nothing is waited for: a datagram is there when send returns."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind(str(tmp_path / "notify"))
        yield sock


def heard(sock: socket.socket) -> list[str]:
    """All datagrams that wait there."""
    found = []
    while True:
        try:
            found.append(sock.recv(1 << 16).decode())
        except BlockingIOError:
            return found


@pytest.fixture
def notifier(manager: socket.socket) -> Notifier:
    return Notifier(manager.getsockname())


def test_each_call_is_one_message(manager: socket.socket, notifier: Notifier) -> None:
    """In the words of sd_notify(3)."""
    assert notifier.active
    before = time.monotonic_ns() // 1000
    notifier.ready()
    notifier.ready("2 of 3 models up")
    notifier.reloading()
    notifier.watchdog()
    notifier.extend(2.5)
    notifier.drop("ocr")
    notifier.stopping("draining")
    said = heard(manager)
    reloading, _, stamp = said.pop(2).partition("=1\nMONOTONIC_USEC=")
    assert reloading == "RELOADING"
    assert before <= int(stamp) <= time.monotonic_ns() // 1000
    assert said == [
        "READY=1", "READY=1\nSTATUS=2 of 3 models up", "WATCHDOG=1", "EXTEND_TIMEOUT_USEC=2500000",
        "FDSTOREREMOVE=1\nFDNAME=pidfd-ocr", "STOPPING=1\nSTATUS=draining",
    ]  # fmt: skip
    assert notifier.trouble == ""


def test_a_status_is_sent_when_it_changed(manager: socket.socket, notifier: Notifier) -> None:
    """The same one again costs systemd nothing, whichever call brings it."""
    for text in ("a", "a", "b", "b", "a"):
        assert notifier.status(text)
    notifier.ready("a")
    assert heard(manager) == ["STATUS=a", "STATUS=b", "STATUS=a", "READY=1"]


def test_a_status_cannot_say_anything_else(manager: socket.socket, notifier: Notifier) -> None:
    """Newlines and other controls become blanks, what is no text goes, and a long one is cut between letters."""
    notifier.status("up\nWATCHDOG=trigger\x00\x1b[1m\u2028é \udc80")
    notifier.status("é" * 5000)
    notifier.status("a" + "é" * 5000)
    first, second, third = heard(manager)
    assert first == "STATUS=up WATCHDOG=trigger  [1m é"
    assert second == "STATUS=" + "é" * 1024
    assert third == "STATUS=a" + "é" * 1023


def test_a_descriptor_is_stored(manager: socket.socket, notifier: Notifier) -> None:
    """It is the very process; a name that systemd would not take is not sent."""
    pidfd = os.pidfd_open(os.getpid())
    assert notifier.store("qwen3-vl.2", pidfd)
    os.close(pidfd)
    text, (copy,), _, _ = socket.recv_fds(manager, 4096, 4)
    assert text == b"FDSTORE=1\nFDNAME=pidfd-qwen3-vl.2"
    assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{copy}").read_text()
    os.close(copy)
    for bad in ("a:b", "a\nREADY=1", "", "é", "x" * 250):
        assert not notifier.store(bad, 0)
        assert not notifier.drop(bad)
    assert heard(manager) == []
    assert "not a name" in notifier.trouble


def test_an_abstract_address_is_reached() -> None:
    """A leading @ stands for NUL, as systemd's user manager in a container may say."""
    name = f"vllmd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind("\0" + name)
        assert Notifier("@" + name).watchdog()
        assert heard(sock) == ["WATCHDOG=1"]


@pytest.mark.parametrize("address", [None, "", "vsock:2:1234", "relative/path"])
def test_without_systemd_nothing_is_done(address: str | None) -> None:
    """Every call is False, and none raises."""
    notifier = Notifier(address)
    assert not notifier.active
    assert not notifier.ready("up")
    assert not notifier.status("up")
    assert not notifier.store("m", 0)
    assert bool(notifier.trouble) == bool(address)


def test_nobody_listening_is_trouble_and_no_error(tmp_path: Path) -> None:
    """No socket, or a path that no socket can have."""
    for path in (tmp_path / "none", tmp_path / ("x" * 200)):
        notifier = Notifier(str(path))
        assert not notifier.ready("up")
        assert notifier.trouble.startswith("cannot notify systemd: ")


def test_a_full_socket_does_not_block_and_the_state_is_said_again(manager: socket.socket, notifier: Notifier) -> None:
    """READY=1 that did not get through goes with the next message; so does the status, and neither twice."""
    while notifier.watchdog():
        pass
    assert os.strerror(errno.EAGAIN) in notifier.trouble
    assert not notifier.ready("up")
    assert not notifier.status("up")
    heard(manager)
    assert notifier.status("up")
    assert heard(manager) == ["READY=1\nSTATUS=up"]
    notifier.watchdog()
    assert heard(manager) == ["WATCHDOG=1"]


def test_a_state_is_not_held_back_by_a_status_that_is_known(manager: socket.socket, notifier: Notifier) -> None:
    """An unchanged status sends nothing, unless a state waits for it."""
    notifier.status("up")
    while notifier.watchdog():
        pass
    notifier.ready("up")
    heard(manager)
    assert notifier.status("up")
    assert heard(manager) == ["READY=1"]


# -- what is about to be done with us


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/system.slice/vllmd.service", UNIT),
        ("/system.slice/vllmd.service/supervisor", UNIT),
        (
            "/system.slice/system-vllmd.slice/vllmd@a.service/supervisor",
            Unit("vllmd@a.service", False, "/system.slice/system-vllmd.slice/vllmd@a.service"),
        ),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/vllmd.service/supervisor",
            Unit("vllmd.service", True, "/user.slice/user-1000.slice/user@1000.service/app.slice/vllmd.service"),
        ),
        (
            "/machine.slice/box.scope/system.slice/vllmd.service",
            Unit("vllmd.service", False, "/machine.slice/box.scope/system.slice/vllmd.service"),
        ),
        (  # a container of a user's, with a systemd of its own
            "/user.slice/user-1000.slice/user@1000.service/user.slice/pod.scope/system.slice/vllmd.service",
            Unit(
                "vllmd.service",
                False,
                "/user.slice/user-1000.slice/user@1000.service/user.slice/pod.scope/system.slice/vllmd.service",
            ),
        ),
        ("/user.slice/user-1000.slice/session-2.scope", None),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/app-terminal.scope", None),
        ("/user.slice/user-1000.slice/user@1000.service/init.scope", None),
        ("/user.slice/user-1000.slice/user@1000.service", None),
        ("/system.slice/docker.service/x.scope/supervisor", None),
        ("/", None),
    ],
)
def test_our_unit_is_read_from_our_cgroup(tmp_path: Path, path: str, unit: Unit | None) -> None:
    """The service that started us, by which manager; a terminal or a container below a service is none."""
    own = tmp_path / "cgroup"
    own.write_text(f"9:name=systemd:/other.service\n0::{path}\n")
    assert unit_of(own) == unit


def test_without_cgroup_v2_there_is_no_unit(tmp_path: Path) -> None:
    """Neither with the first version alone nor without /proc."""
    (tmp_path / "cgroup").write_text("1:name=systemd:/system.slice/vllmd.service\n")
    assert unit_of(tmp_path / "cgroup") is None
    assert unit_of(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("text", "job"),
    [
        ("1234 vllmd.service restart running\n", "restart"),
        ("  7 other.service start waiting\n 12 vllmd.service   try-restart   waiting\n", "try-restart"),
        ("● 12 vllmd.service stop running\n", "stop"),
        ("JOB UNIT TYPE STATE\n12 vllmd.service start running\n\n1 jobs listed.\n", "start"),
        ("12 xvllmd.service stop running\n13 vllmd.service.d stop running\n", None),
        ("12 vllmd.service\n", None),
        ("12 vllmd.service ???\n", None),
        ("No jobs running.\n", None),
        ("", None),
    ],
)
def test_the_job_is_read_from_the_list(text: str, job: str | None) -> None:
    """The unit's own row alone; a row that cannot be read is no job."""
    assert parse_jobs(text, "vllmd.service") == job


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in the place of systemctl."""

    def write(script: str) -> None:
        path = tmp_path / "bin" / "systemctl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return write


async def test_systemctl_is_asked_for_the_job(systemctl: Callable[[str], None], tmp_path: Path) -> None:
    """The user's own manager for a unit of his."""
    systemctl(f'echo "$@" >> {tmp_path}/asked; echo "12 vllmd.service restart running"')
    assert await pending_job(UNIT, LIMIT) == "restart"
    assert await pending_job(Unit("vllmd.service", True, "/"), LIMIT) == "restart"
    assert await pending_job(Unit("other.service", False, "/"), LIMIT) is None
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[0] for line in asked] == ["list-jobs", "--user", "list-jobs"]


async def test_no_answer_is_no_job(systemctl: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails (no bus), cannot be executed, or is not there."""
    systemctl('echo "12 vllmd.service restart running"; exit 1')
    assert await pending_job(UNIT, LIMIT) is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert await pending_job(UNIT, LIMIT) is None


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[int]:
    """The reading end of tmp_path/fifo: readable when somebody wrote, at its end when all who could write are dead."""
    os.mkfifo(tmp_path / "fifo")
    fd = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    yield fd
    os.close(fd)


async def read(fd: int) -> bytes:
    """What is written there; waits for it."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await asyncio.wait_for(event.wait(), LIMIT)
    finally:
        loop.remove_reader(fd)
    return os.read(fd, 100)


@pytest.mark.parametrize("how", ["limit", "cancelled"])
async def test_a_systemctl_that_hangs_is_killed(
    systemctl: Callable[[str], None], tmp_path: Path, fifo: int, how: str
) -> None:
    """At the limit, or when who asked is cancelled; with what it started, although that holds the pipe."""
    systemctl(f"trap '' TERM; exec 3>{tmp_path}/fifo; echo $$ >&3; sleep 1000; sleep 1000")
    task = asyncio.get_running_loop().create_task(pending_job(UNIT, 1.0 if how == "limit" else LIMIT * 5))
    pid = int(await read(fifo))
    if how == "cancelled":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, LIMIT)
    else:
        assert await asyncio.wait_for(task, LIMIT) is None
    assert await read(fifo) == b""
    assert not Path(f"/proc/{pid}").exists()  # reaped as well


def test_the_names_of_sockets_are_those_of_the_units() -> None:
    """A contract with the socket units."""
    assert {"control", "http"} == systemd.SOCKETS
