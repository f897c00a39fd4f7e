"""The daemon's ties to systemd: what it was given at its start, what it says, and what is about to be done with it.

Each tie is optional, and none raises for the other side: without systemd, or with one that does not listen, everything
here does nothing. The variables that name a tie are taken out of the environment as they are read, so that no child
believes that they are meant for it.
"""

import asyncio
import errno
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

#: Names of listening sockets that we know what to do with (FileDescriptorName= of the socket units).
SOCKETS = frozenset({"control", "http"})

_FIRST_FD = 3
_PIDFD = "pidfd-"
_NAMES = (
    "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID",
)  # fmt: skip
_FD_NAME = re.compile(r"[!-9;-~]{1,249}")  # with the prefix at most 255; ":" separates names in LISTEN_FDNAMES
_STATUS_BYTES = 2048  # systemd drops a message of more than 4096 bytes, whole
_USER_MANAGER = re.compile(r"user@\d+\.service")
_JOB_TYPE = re.compile(r"[a-z]+(?:-[a-z]+)*")
_KILLED_WITHIN = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Given:
    """What systemd handed over. All descriptors are ours to close, and no child inherits them.

    `sockets`: listening, not blocking, by name. `pidfds`: what was stored, by the name given to Notifier.store.
    `watchdog`: seconds within which it must be fed, None when nobody watches. `closed`: names of what came and was
    closed, because nothing here knows it (a socket unit without FileDescriptorName=, for one).
    """

    sockets: Mapping[str, tuple[socket.socket, ...]]
    pidfds: Mapping[str, int]
    notify: "Notifier"
    watchdog: float | None
    closed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unit:
    """The service that this process belongs to. `user`: of a user's own manager. `cgroup`: its path below the mount."""

    name: str
    user: bool
    cgroup: str


def under_systemd(environ: Mapping[str, str]) -> bool:
    """Whether a service manager started this very process, and not a shell or program somewhere below a service.

    Ask before `take`: a systemd before 248 is known by NOTIFY_SOCKET alone.
    """
    pid = environ.get("SYSTEMD_EXEC_PID")
    return "NOTIFY_SOCKET" in environ if pid is None else _number(pid) == os.getpid()


# -- what we are given


def take(environ: MutableMapping[str, str]) -> Given:
    """What systemd handed to this process; nothing of it is left in `environ`. Values that make no sense count as absent.

    To be called once, before anything else opens a descriptor.
    """
    told = {name: environ.pop(name, "") for name in _NAMES}
    sockets: dict[str, tuple[socket.socket, ...]] = {}
    pidfds: dict[str, int] = {}
    closed: list[str] = []
    for name, fd in _passed(told):
        if name in SOCKETS and (sock := _listening(fd)) is not None:
            sockets[name] = (*sockets.get(name, ()), sock)
        elif name.startswith(_PIDFD) and (lives := _lives(fd)) is not None:
            key = name.removeprefix(_PIDFD)
            # Two of one name: an older process was not dropped from the store before the next came.
            spare: int | None = fd
            if lives or key not in pidfds:
                spare = pidfds.get(key)
                pidfds[key] = fd
            if spare is not None:
                os.close(spare)
        else:
            os.close(fd)
            closed.append(name)
    watched = told["WATCHDOG_PID"] == "" or _number(told["WATCHDOG_PID"]) == os.getpid()
    limit = _number(told["WATCHDOG_USEC"]) / 1e6 if watched else 0.0
    return Given(sockets, pidfds, Notifier(told["NOTIFY_SOCKET"] or None), limit or None, tuple(closed))


def _passed(told: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Name and number of each descriptor that is there, closed on exec from now on."""
    count = _number(told["LISTEN_FDS"])
    if _number(told["LISTEN_PID"]) != os.getpid() or count == 0:
        return
    names = told["LISTEN_FDNAMES"].split(":")
    for fd in range(_FIRST_FD, _FIRST_FD + count):
        try:
            os.set_inheritable(fd, False)
        except OSError:  # fewer than were announced
            return
        yield (names[fd - _FIRST_FD] if len(names) == count else "unknown"), fd


def _listening(fd: int) -> socket.socket | None:
    """The socket; None for what does not listen, which stays open."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return None
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.detach()
        return None
    sock.setblocking(False)
    return sock


def _lives(pidfd: int) -> bool | None:
    """Whether its process is there; None for a descriptor of another kind."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except OSError as error:
        return None if error.errno == errno.EBADF else error.errno == errno.EPERM
    return True


def _number(text: str) -> int:
    """0 for what is no number."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else 0


# -- what we say


class Notifier:
    """sd_notify. Each call is one datagram that never blocks; True when systemd has it, and `trouble` is the last
    problem. Without an address all calls do nothing.

    A state that systemd would wait for (ready, reloading, stopping) and that did not get through is said again with
    whatever is said next: a lost READY=1 would cost the daemon its life.
    """

    def __init__(self, address: str | None) -> None:
        self.trouble = ""
        self._address: str | None = None
        self._owed = ""  # the state that did not get through
        self._said: str | None = None  # the status that did
        if address and address[0] in "/@":
            self._address = "\0" + address[1:] if address[0] == "@" else address
        elif address:
            self.trouble = f"cannot notify {address}: neither a path nor an abstract socket"

    @property
    def active(self) -> bool:
        """Whether there is somebody to tell."""
        return self._address is not None

    def ready(self, status: str = "") -> bool:
        """Started, or reloaded."""
        return self._declare("READY=1", status)

    def reloading(self) -> bool:
        """`ready` must follow."""
        return self._declare(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, text: str = "") -> bool:
        """The end has begun."""
        return self._declare("STOPPING=1", text)

    def status(self, text: str) -> bool:
        """One line for `systemctl status`; sent only when it is another than the last."""
        text = _one_line(text)
        if text == self._said and not self._owed:
            return self.active
        return self._send(status=text)

    def watchdog(self) -> bool:
        """Alive; due within every `Given.watchdog` seconds."""
        return self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> bool:
        """The start or the stop in progress may take so long from now, whatever the unit says."""
        return self._send(f"EXTEND_TIMEOUT_USEC={max(0, int(seconds * 1e6))}")

    def store(self, name: str, fd: int) -> bool:
        """Have systemd keep a copy of a pidfd for the daemon after us to `take`. One process per name: `drop` the former
        first, as systemd keeps both and gives them in any order."""
        return self._keep("FDSTORE=1", name, fd)

    def drop(self, name: str) -> bool:
        """End the keeping of what was stored under that name. systemd by itself drops a pidfd whose process ended."""
        return self._keep("FDSTOREREMOVE=1", name)

    def _keep(self, what: str, name: str, *fds: int) -> bool:
        if _FD_NAME.fullmatch(name) is None:
            self.trouble = f"cannot store a descriptor as {name!r}: not a name that systemd takes"
            return False
        return self._send(f"{what}\nFDNAME={_PIDFD}{name}", fds)

    def _declare(self, state: str, status: str = "") -> bool:
        self._owed = state
        return self._send(status=_one_line(status) or None)

    def _send(self, line: str = "", fds: tuple[int, ...] = (), status: str | None = None) -> bool:
        if self._address is None:
            return False
        news = f"STATUS={status}" if status is not None and status != self._said else ""
        data = "\n".join(filter(None, (self._owed, line, news))).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.connect(self._address)  # send_fds of Python 3.11 forgets the address it is given
                if fds:
                    socket.send_fds(sock, [data], fds)
                elif data:
                    sock.send(data)
        except OSError as error:
            self.trouble = f"cannot notify systemd: {error.strerror or error}"
            return False
        self._owed = ""
        if news:
            self._said = status
        return True


def _one_line(text: str) -> str:
    """A newline would begin another assignment, and a message with a NUL is dropped whole."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return plain.encode()[:_STATUS_BYTES].decode(errors="ignore").strip()


# -- what is about to be done with us


def unit_of(own: Path = Path("/proc/self/cgroup")) -> Unit | None:
    """The service we were started in, also from a cgroup of our own below it; None in a login session or container."""
    try:
        line = next(line for line in own.read_text().splitlines() if line.startswith("0::/"))
    except (OSError, UnicodeDecodeError, StopIteration):
        return None
    parts = line.removeprefix("0::/").split("/")
    kinds = [at for at, part in enumerate(parts) if part.endswith((".service", ".scope", ".slice"))]
    if not kinds or not parts[kinds[-1]].endswith(".service") or _USER_MANAGER.fullmatch(parts[kinds[-1]]):
        return None  # in a scope a shell started us, or it is the manager itself
    at = kinds[-1]
    above = next((part for part in reversed(parts[:at]) if part.endswith((".service", ".scope"))), "")
    return Unit(parts[at], _USER_MANAGER.fullmatch(above) is not None, "/" + "/".join(parts[: at + 1]))


async def pending_job(unit: Unit, limit: float = 3.0) -> str | None:
    """What systemd is doing with the unit: "restart", "stop", "start", "try-restart" ...; None for nothing.

    None as well when systemctl is not there, fails, or has not answered within `limit` seconds; then it is killed.
    """
    scope = ("--user",) if unit.user else ()
    try:
        process = await asyncio.create_subprocess_exec(
            "systemctl", *scope, "list-jobs", "--no-legend", "--no-pager", "--full", process_group=0,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return None
    try:
        async with asyncio.timeout(limit):
            text, _ = await process.communicate()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            await _kill(process)
    return parse_jobs(text.decode(errors="replace"), unit.name) if process.returncode == 0 else None


async def _kill(process: asyncio.subprocess.Process) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
        async with asyncio.timeout(_KILLED_WITHIN):
            await process.wait()
    except (ProcessLookupError, TimeoutError):
        return


def parse_jobs(text: str, unit: str) -> str | None:
    """The type of the unit's job in what `systemctl list-jobs` prints: JOB UNIT TYPE STATE."""
    for line in text.splitlines():
        words = line.split()
        if unit in words[:-1]:
            kind = words[words.index(unit) + 1]
            return kind if _JOB_TYPE.fullmatch(kind) else None
    return None
