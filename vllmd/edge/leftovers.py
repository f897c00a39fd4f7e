"""What an engine leaves behind when it is killed: shared memory, its scratch directory, its socket.

Cleared with care, since /dev/shm is everybody's: only names that the parts of an engine give, only files that a
process of the engine was seen to have, only when nobody has them any more.
"""

import errno
import fcntl
import os
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Iterable
from pathlib import Path

SHM = Path("/dev/shm")
# Python's shared memory and semaphores, torch, NCCL. Any other name (weights put there by hand) is not ours to remove.
SHM_NAMES = ("psm_", "sem.mp-", "torch_", "nccl-", "cuda.shm.")

Inode = tuple[int, int]  # device and number


def shared_files(pids: Iterable[int]) -> frozenset[Path]:
    """The files of SHM_NAMES in /dev/shm that these processes have mapped or open. May block: not on the loop."""
    files = {_inode(path): path for path in SHM.glob("*") if path.name.startswith(SHM_NAMES)}
    held = frozenset[Inode]().union(*(_mapped(pid) | _open_files(pid) for pid in pids))
    return frozenset(files[inode] for inode in held & files.keys())


def note_files(note: Path, cookie: str, files: Iterable[Path]) -> None:
    """Write down which files are those of the engine with this cookie. Raises OSError; may block."""
    draft = note.with_name(f".{note.name}.new")
    draft.write_text("\n".join([cookie, *sorted(map(str, files))]))
    draft.replace(note)


def noted_files(note: Path, cookie: str) -> frozenset[Path]:
    """What was written down of that engine, as far as it may be true; nothing of another."""
    try:
        whose, *names = note.read_text(errors="replace").splitlines()
    except (OSError, ValueError):
        return frozenset()
    paths = frozenset(map(Path, names)) if whose == cookie else frozenset()
    return frozenset(path for path in paths if path.parent == SHM and path.name.startswith(SHM_NAMES))


def clear(files: Iterable[Path], scratch: str, endpoint: str) -> None:
    """Remove those of `files` that nobody uses, the directory `scratch`, the socket of a unix: endpoint. May block."""
    for path in files:
        _unlink_unused(path)
    if endpoint.startswith("unix:"):
        _unlink_socket(Path(endpoint.removeprefix("unix:")))
    if scratch and Path(scratch).is_dir():
        # Renamed first: if removing takes too long and is left to itself, a new scratch of that name is safe from it.
        doomed = Path(f"{scratch}.gone-{os.getpid()}-{threading.get_ident()}")
        Path(scratch).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clear_sockets(paths: Iterable[Path]) -> None:
    """Remove those of these sockets on which nobody listens. May block."""
    for path in paths:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.connect(str(path))
            except ConnectionRefusedError:
                _unlink_socket(path)
            except OSError:  # none is there, or it is busy
                continue


def _unlink_socket(path: Path) -> None:
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    except OSError:
        return


def _unlink_unused(path: Path) -> None:
    """Remove a file that nobody has open or mapped: only then the kernel grants a write lease (fcntl(2)), and asking
    costs one call, where looking through everybody's maps costs a second."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        # Who opens the file meanwhile breaks the lease, which is told by SIGIO: deadly by default. SIGURG is not.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        path.unlink()
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EINVAL, errno.ENOENT):
            raise
    finally:
        os.close(fd)


def _inode(path: Path) -> Inode:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def _mapped(pid: int) -> frozenset[Inode]:
    """By inode, not by name: glibc maps a semaphore under a passing name and links it to its own afterwards."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    device, _ = _inode(SHM)
    return frozenset((device, int(line.split(maxsplit=5)[4])) for line in lines if f" {SHM}/" in line)


def _open_files(pid: int) -> frozenset[Inode]:
    try:
        return frozenset(_inode(link) for link in Path(f"/proc/{pid}/fd").iterdir()) - {(0, 0)}
    except OSError:
        return frozenset()
