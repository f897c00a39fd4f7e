"""Taking the addresses that the listeners are to serve: what cannot be had is told before anything else is done."""

import contextlib
import errno
import grp
import os
import socket
import ssl
import stat
from pathlib import Path
from typing import Any

from vllmd.edge.tasks import in_thread
from vllmd.spec import HttpSpec

BIND_LIMIT = 10.0  # seconds that a name or a directory may take
BACKLOG = 2048  # the default of 128 makes the rest of a burst wait a second for its SYN to be sent again

Addresses = list[tuple[Any, Any, int, str, Any]]
Inode = tuple[int, int]  # device and number


class ListenError(Exception):
    """A listener that cannot be opened: why, and what to do."""


async def bind_tcp(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on all addresses of `host`. Raises ListenError."""

    def look_up() -> Addresses | OSError:
        try:
            return socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            return error

    late: Addresses | OSError = TimeoutError(errno.ETIMEDOUT, "its name is not told in time")
    made: list[socket.socket] = []
    try:
        found = await in_thread(look_up, BIND_LIMIT, late)
        if isinstance(found, OSError):
            raise found
        for family, kind, proto, _, address in dict.fromkeys(found):
            made.append(socket.socket(family, kind, proto))
            made[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made[-1].setblocking(False)
            made[-1].bind(address)
            made[-1].listen(BACKLOG)
    except OSError as error:
        for sock in made:
            sock.close()
        hint = "change [http] listen"
        if error.errno == errno.EADDRINUSE:
            hint = f"ss -ltnp 'sport = :{port}' shows who has it; or {hint}"
        raise ListenError(f"cannot listen on {host}:{port}: {error.strerror or error} ({hint})") from None
    return made


def make_tls(spec: HttpSpec) -> ssl.SSLContext | None:
    """What TCP listeners need for TLS 1.2 and later; None without a certificate. Raises ListenError."""
    if spec.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    read_certificate(context, spec)
    return context


def read_certificate(context: ssl.SSLContext, spec: HttpSpec) -> None:
    """Have `context` show the certificate of `spec`. Raises ListenError; the context may then hold half of it."""
    cert, key = spec.tls_cert, spec.tls_key
    if cert is None or key is None:  # the configuration has both or none
        return
    for path in (cert, key):
        try:
            path.open("rb").close()  # what the ssl module raises for a file does not name it
        except OSError as error:
            hint = "[http] tls_cert and tls_key are files that vllmd's user may read"
            raise ListenError(f"cannot read {path}: {error.strerror or error} ({hint})") from None

    def no_phrase() -> str:
        raise ListenError(f"cannot use {key} for TLS: it has a passphrase (openssl pkey -in OLD -out NEW takes it off)")

    try:
        context.load_cert_chain(cert, key, no_phrase)  # without the third OpenSSL would ask at the terminal, and wait
    except OSError as error:  # ssl.SSLError is one
        why = getattr(error, "reason", None) or error.strerror or error
        hint = "the key must be the certificate's, both in PEM"
        raise ListenError(f"cannot use {cert} and {key} for TLS: {why} ({hint})") from None


async def bind_aside(path: Path, group: str) -> tuple[socket.socket, Inode]:
    """bind_unix, however long the directory takes. Raises ListenError."""
    nothing: tuple[socket.socket, Inode] | None = None
    made = await in_thread(lambda: bind_unix(path, group), BIND_LIMIT, nothing)
    if made is None:
        raise ListenError(f"cannot listen on {path}: its directory does not answer")
    return made


def bind_unix(path: Path, group: str) -> tuple[socket.socket, Inode]:
    """A listening socket at `path` for us and `group`, and its device and inode. Raises ListenError.

    Nobody can connect before it listens, so its mode is set in time. A file that is left of a dead daemon is replaced,
    one on which somebody answers is not.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        clear_stale(path)
        sock.bind(str(path))
        path.chmod(0o660 if give(path, group) else 0o600)
        sock.setblocking(False)
        sock.listen(BACKLOG)
        made = path.stat()
    except OSError as error:
        sock.close()
        hint = "a path of at most 107 bytes is needed" if len(os.fsencode(path)) > 107 else "change [daemon] socket"
        raise ListenError(f"cannot listen on {path}: {error.strerror or error} ({hint})") from None
    except ListenError:
        sock.close()
        raise
    return sock, (made.st_dev, made.st_ino)


def clear_stale(path: Path) -> None:
    """Remove a socket file on which nobody answers. Raises ListenError where somebody does, or it is no socket."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(f"cannot listen on {path}: it is no socket (move it away, or change [daemon] socket)")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
        raise ListenError(f"cannot listen on {path}: a running vllmd answers there (stop it first: vllmctl status)")


def give(path: Path, group: str) -> bool:
    """Give the file to `group`. Whether its group may be trusted with it: root's own may, another user's may not."""
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
    except (KeyError, PermissionError):
        return os.geteuid() == 0
    return True


def unlink(path: Path, inode: Inode) -> None:
    """Remove our socket file, unless another daemon has put its own there."""
    with contextlib.suppress(OSError):
        found = path.lstat()
        if (found.st_dev, found.st_ino) == inode:
            path.unlink()
