"""What must survive the daemon, in its state directory: learned needs and last good starts, each file written whole.

A file that cannot be read is set aside and named, never a reason not to start; a disk that is full costs what was to be
written, nothing else. One daemon per state directory: a lock that dies with its holder.
"""

import contextlib
import fcntl
import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllmd.facts import Learned, Proof

LARGEST = 1 << 60  # bytes; no machine has that


class Taken(Exception):
    """Another daemon uses this directory; the message names it."""


def take(path: Path, key: str) -> int:
    """Hold a lock file until the descriptor that is returned is closed. Raises Taken with the holder's pid, and `key` as what
    to set otherwise; OSError if it cannot be written."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise Taken(
                f"vllmd already runs on {path.parent} (pid {holder}): stop it, or set {key} to another one"
            ) from None
        if _bears(path, fd):
            break
        os.close(fd)  # its holder has just removed it
    with contextlib.suppress(OSError):  # a full disk: the lock holds, only its label is missing
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _bears(path: Path, fd: int) -> bool:
    """Whether the open file still has its name."""
    try:
        there, held = path.lstat(), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)


class Store:
    """The state directory, and the runtime directory as far as it is locked with it: who shares either with another daemon
    would take its models for leftovers. `complaints` collects what went wrong, for the operator; reading it empties it."""

    def __init__(self, directory: Path, runtime: Path | None = None) -> None:
        self.directory = directory
        self._runtime = runtime / "vllmd.lock" if runtime is not None else None
        self._locks: list[int] = []
        self._complaints: list[str] = []
        self._writing = threading.Lock()  # a write that hangs may be given up, and is not to be met by another one

    def lock(self) -> None:
        """Take the directories for this process, until it ends. Raises Taken with the holder's pid, OSError if unwritable."""
        wanted = [(self.directory / "lock", "daemon.state_dir")]
        wanted += [(self._runtime, "daemon.runtime_dir")] if self._runtime is not None else []
        try:
            for path, key in wanted:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
                self._locks.append(take(path, key))
        except BaseException:
            self._let_go()
            raise

    def unlock(self) -> None:
        """Give the directories back. In the runtime directory nothing is left of it."""
        if self._runtime is not None and self._locks:
            with contextlib.suppress(OSError):
                self._runtime.unlink()
        self._let_go()

    def _let_go(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def complaints(self) -> list[str]:
        """What could not be read or written since the last call."""
        said, self._complaints = self._complaints, []
        return said

    def learned(self) -> dict[str, Learned]:
        """All learned needs that make sense; {} when there are none or the file is damaged. One that does not would let more
        be promised than there is."""
        needs, odd = {}, []
        for key, value in self._read("needs.json").items():
            try:
                needs[key] = _need(value)
            except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
                odd.append(key)
        if odd:
            path = self.directory / "needs.json"
            shown = ", ".join(each[:80] for each in odd[:3]) + (", ..." if len(odd) > 3 else "")
            self._complaints.append(
                f"{path}: {len(odd)} of what was learned makes no sense and is learned anew: {shown}"
            )
        return needs

    def good(self) -> dict[str, dict[str, str]]:
        """What each model's last good start ran with."""
        return {
            name: {str(k): str(v) for k, v in words.items()}
            for name, words in self._read("good.json").items()
            if isinstance(words, dict)
        }

    def proofs(self) -> dict[str, Proof]:
        """All proofs of sleep that make sense; without one a model is ended instead, so none is missed for long."""
        found = {}
        for key, value in self._read("proofs.json").items():
            with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError, OverflowError):
                found[key] = _proof(value)
        return found

    def keep_proofs(self, proofs: Mapping[str, Proof]) -> None:
        """Write all proofs."""
        self._write("proofs.json", {key: asdict(value) for key, value in proofs.items()})

    def keep_learned(self, needs: Mapping[str, Learned]) -> None:
        """Write all learned needs."""
        self._write("needs.json", {key: asdict(value) for key, value in needs.items()})

    def keep_good(self, good: Mapping[str, Mapping[str, str]]) -> None:
        """Write the last good starts."""
        self._write("good.json", {name: dict(words) for name, words in good.items()})

    def _read(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        try:
            value = json.loads(path.read_bytes())
            if not isinstance(value, dict):
                raise ValueError("not a table")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            aside = path.with_suffix(".damaged")
            with contextlib.suppress(OSError):
                path.rename(aside)
            self._complaints.append(f"cannot read {path}: {error}; set aside as {aside.name}, starting without it")
            return {}
        return value

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        """Whole or not at all: temporary file, fsync, rename."""
        path, temporary = self.directory / name, self.directory / f".{name}.new"
        try:
            with self._writing, temporary.open("w") as file:
                json.dump(value, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
                temporary.rename(path)
                sync_directory(self.directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._complaints.append(f"cannot write {path}: {error.strerror}; it stays as it was")


def sync_directory(directory: Path) -> None:
    """Have the names in it on disk: a rename that is not may be undone by a power cut. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _need(value: Any) -> Learned:
    """One row of needs.json. Raises ValueError and its like for what no start can have taught."""
    phases = {str(phase): _seconds(seconds) for phase, seconds in value["phases"].items()}
    base, kv = int(value["base"]), int(value["kv"])
    if not (0 < base < LARGEST and 0 <= kv < LARGEST):
        raise ValueError(f"{base} and {kv} bytes")
    return Learned(base, kv, phases, _seconds(value["total"]))


def _proof(value: Any) -> Proof:
    """One row of proofs.json. Raises ValueError and its like for what no test can have shown."""
    level, residual, freed = int(value["level"]), int(value["residual"]), int(value["freed"])
    if level not in (1, 2) or not (0 <= residual < LARGEST and 0 <= freed < LARGEST):
        raise ValueError(f"level {level}, {residual} and {freed} bytes")
    return Proof(level, residual, freed, _seconds(value["sleep_s"]), _seconds(value["wake_s"]))


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{seconds} seconds")
    return seconds
