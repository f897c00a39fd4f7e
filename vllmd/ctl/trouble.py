"""Why vllmd cannot be reached, as seen from here, and what to do: for the vllmd of the system, of the user's systemd, and
of who runs it by hand."""

from __future__ import annotations

import os
import stat

from vllmd.ctl.client import places
from vllmd.ctl.faults import BY_HAND, Unreachable

ELSEWHERE = "vllmctl --socket PATH, or VLLMD_SOCKET=PATH, if it listens elsewhere"


def explain(path: str, error: OSError) -> Unreachable:
    """The fault of a socket that cannot be used."""
    head = f"cannot reach vllmd on {path}"
    start, journal = _commands(path)
    if isinstance(error, TimeoutError):
        return Unreachable(f"{head}: connected, but no answer in time (is it stopped or overloaded?)", *journal)
    try:
        info = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        looked = ", ".join(each for each in places()[1:4] if not os.path.exists(each))  # noqa: PTH110
        also = f" (nor {looked})" if looked and path == places()[0] else ""
        return Unreachable(f"{head}: no such file{also}, so vllmd does not run there", *start, BY_HAND, ELSEWHERE)
    except PermissionError:
        return Unreachable(
            f"{head}: you may not enter its directory", "run it as the user whose vllmd it is, or with sudo"
        )
    except OSError as wrong:
        return Unreachable(f"{head}: {wrong.strerror}")
    if not stat.S_ISSOCK(info.st_mode):
        return Unreachable(f"{head}: that is not a socket")
    match error:
        case PermissionError():
            return _denied(head, info)
        case ConnectionRefusedError():
            text = f"{head}: the file is there, but nobody listens: vllmd has ended"
            return Unreachable(text, *start, BY_HAND, *journal)
    return Unreachable(f"{head}: {error.strerror or error}")


def _commands(path: str) -> tuple[list[str], list[str]]:
    """What starts the vllmd of this socket, and what shows its log; nothing where no systemd has to do with it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or "/run/user/"
    user = path.startswith((f"{runtime.rstrip('/')}/", "/run/user/"))
    if path in places()[1:] and not user:  # in a directory for temporary files: no unit puts it there
        return [], []
    option = "--user " if user else ""
    return [f"systemctl {option}start vllmd"], [f"journalctl {option}-u vllmd -n 50"]


def _denied(head: str, info: os.stat_result) -> Unreachable:
    """Who may connect, and how to become one of them, if that is a thing to become."""
    import grp
    import pwd

    try:
        user = pwd.getpwuid(info.st_uid).pw_name
    except KeyError:
        user = str(info.st_uid)
    try:
        group = grp.getgrgid(info.st_gid).gr_name
    except KeyError:
        group = str(info.st_gid)
    hints = []
    if info.st_gid != 0 and info.st_mode & stat.S_IWGRP and info.st_gid not in (os.getegid(), *os.getgroups()):
        hints.append(f"sudo usermod -aG {group} $USER, then log in again")
    said = f"owner {user}, group {group}, mode {info.st_mode & 0o777:04o}"
    return Unreachable(f"{head}: permission denied ({said})", *hints, f"{'or ' if hints else ''}run it with sudo")
