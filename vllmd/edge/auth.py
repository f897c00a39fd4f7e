"""Who asks: the kernel's word on a unix socket, a key over TCP, or nobody in particular on this machine.

Keys are kept as digests, in the configuration and here; what a client shows is hashed and looked up. The verdicts on the last
few values are remembered, as clients show the same one with each request.
"""

import hashlib
import ipaddress
import socket
import struct
from collections.abc import Mapping
from typing import Final

from aiohttp import web

from vllmd.edge.backend import Access, Caller, Refused
from vllmd.spec import ApiKey, HttpSpec, Scope

REMEMBERED: Final = 256  # values whose verdict is kept
KEY_LONGEST: Final = 500  # characters
CHALLENGE: Final = {"WWW-Authenticate": "Bearer"}


class Guard:
    """Tells who a request comes from. `reconfigure` changes the keys; a verdict of before is not used any more."""

    def __init__(self, http: HttpSpec, keys: Mapping[str, ApiKey]) -> None:
        self._keys: dict[str, ApiKey] = {}
        self._open_loopback = True
        self._shown: dict[str, ApiKey | None] = {}
        self.reconfigure(http, keys)

    def reconfigure(self, http: HttpSpec, keys: Mapping[str, ApiKey]) -> None:
        """These keys from now on."""
        self._keys = {key.digest: key for key in keys.values()}
        self._open_loopback = http.open_loopback
        self._shown = {}

    def key_of(self, request: web.BaseRequest) -> ApiKey | None:
        """The key that a request over TCP shows; None where it comes from this machine and needs none. Raises Refused(401)."""
        headers = request.headers
        shown = headers.get("Authorization") or headers.get("x-api-key")
        if shown is None:
            if self._open_loopback and is_local(request):
                return None
            raise Refused(401, "no-key", "an API key is needed", 'send "Authorization: Bearer KEY"', headers=CHALLENGE)
        if shown in self._shown:
            key = self._shown[shown]
        else:
            key = self._look_up(shown)
            if len(self._shown) >= REMEMBERED:
                self._shown.clear()
            self._shown[shown] = key
        if key is not None:
            return key
        if not self._keys and self._open_loopback and is_local(request):
            return None  # clients send some key because they must; where none is configured none is wrong
        hint = "`vllmctl key NAME` makes one for the configuration"
        raise Refused(401, "wrong-key", "this API key is not known", hint, headers=CHALLENGE)

    def _look_up(self, shown: str) -> ApiKey | None:
        scheme, _, rest = shown.partition(" ")
        key = rest.strip() if rest and scheme.lower() == "bearer" else shown
        if len(key) > KEY_LONGEST:
            return None
        return self._keys.get(hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest())

    def caller(self, request: web.BaseRequest) -> Caller:
        """Who asks the API, and what he may do there. Raises Refused(401), ConnectionError when nobody is there any more."""
        transport = request.transport
        peer = None if transport is None else transport.get_extra_info("socket")
        if peer is None:
            raise ConnectionResetError("the client is gone")
        if peer.family == socket.AF_UNIX:
            # Only root, our own user and group vllmd get through the socket file's mode.
            pid, uid, _ = struct.unpack(
                "3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            )
            return Caller(Access.ADMIN, "unix", uid, pid)
        key = self.key_of(request)
        return Caller(access_of(key), str(request.remote or ""), key=key)


def access_of(key: ApiKey | None) -> Access:
    """What a caller over TCP may do with the API: who needs no key may look."""
    if key is None or Scope.READ in key.scopes:
        return Access.ADMIN if key is not None and Scope.ADMIN in key.scopes else Access.READ
    return Access.ADMIN if Scope.ADMIN in key.scopes else Access.OPEN


def is_local(request: web.BaseRequest) -> bool:
    """Whether the request comes from this machine. Of one that has gone meanwhile nobody knows it: it does not."""
    transport = request.transport
    peer = None if transport is None else transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return isinstance(peer, str | bytes)  # a unix socket
    host = str(peer[0])
    if host == "127.0.0.1":
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
