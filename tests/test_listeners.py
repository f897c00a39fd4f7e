"""The listeners themselves: the socket file, who is let in, and which hosts and pages may ask."""

import asyncio
import os
import random
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from tests.stub_backend import Stub, fronted
from vllmd.edge import bind
from vllmd.edge.gate import Limits, host_name, own_names
from vllmd.edge.http import ListenError, Listeners
from vllmd.edge.stream import EventLog
from vllmd.spec import HttpSpec


def listeners(path: Path | None, *listen: tuple[str, int]) -> Listeners:
    """Not started yet."""
    return Listeners(Stub(), EventLog(), path, HttpSpec(listen))


async def test_the_socket_is_for_its_group_and_goes_with_the_daemon(tmp_path: Path) -> None:
    """Mode 0660 in a directory that is made; nothing is left after stop()."""
    path = tmp_path / "run" / "s.sock"
    async with fronted(path):
        assert stat.S_IMODE(path.stat().st_mode) == (0o660 if os.geteuid() == 0 else 0o600)
    assert not path.exists()


def test_the_socket_of_a_user_without_the_group_is_theirs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own group may be everybody's: only root's group, or vllmd's, is trusted."""
    monkeypatch.setattr(bind.os, "geteuid", lambda: 1000)
    sock, _ = bind.bind_unix(tmp_path / "run" / "s.sock", "no-such-group")
    sock.close()
    assert stat.S_IMODE((tmp_path / "run" / "s.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """One that a killed daemon left."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with fronted(path) as front:
        assert (await front.unix.get("/healthz")).status == 200


async def test_a_socket_on_which_somebody_answers_is_left_alone(tmp_path: Path) -> None:
    """The second daemon refuses to start, the first goes on."""
    async with fronted(tmp_path / "s") as front:
        with pytest.raises(ListenError, match="a running vllmd answers there"):
            await listeners(tmp_path / "s").start()
        assert (await front.unix.get("/healthz")).status == 200


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """A slip in the configuration destroys nothing."""
    (tmp_path / "s").write_text("mine")
    with pytest.raises(ListenError, match="it is no socket"):
        await listeners(tmp_path / "s").start()
    assert (tmp_path / "s").read_text() == "mine"


async def test_a_path_that_is_too_long_says_so(tmp_path: Path) -> None:
    """The kernel's limit is 107 bytes."""
    with pytest.raises(ListenError, match="at most 107 bytes"):
        await listeners(tmp_path / ("x" * 120)).start()


async def test_a_socket_that_another_daemon_put_there_stays(tmp_path: Path) -> None:
    """stop() removes only its own file."""
    path = tmp_path / "s"
    async with fronted(path):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


async def test_a_port_in_use_names_the_way_out_and_opens_nothing(tmp_path: Path) -> None:
    """All listeners or none."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}.*ss -ltnp"):
            await listeners(tmp_path / "s", ("127.0.0.1", port)).start()
    assert not (tmp_path / "s").exists()


async def test_no_tcp_listener_is_fine(tmp_path: Path) -> None:
    """listen = [] serves the socket only."""
    made = listeners(tmp_path / "s")
    await made.start()
    assert made.addresses == []
    await made.stop()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8400", "127.0.0.1", "[::1]:80", "192.0.2.7:1", "localhost."])
async def test_our_names_and_any_address_are_let_in(tmp_path: Path, host: str) -> None:
    """An address cannot be rebound to us by somebody's name server."""
    async with fronted(tmp_path / "s") as front:
        assert (await front.tcp.get("/api/v1/status", headers={"Host": host})).status == 200


async def test_the_name_of_this_machine_is_let_in(tmp_path: Path) -> None:
    """As others in its network call it."""
    async with fronted(tmp_path / "s") as front:
        assert (await front.tcp.get("/api/v1/status", headers={"Host": os.uname().nodename})).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8400", "localhost.evil.example", "127.0.0.1.evil.example", "", "["]
)
async def test_other_names_are_misdirected(tmp_path: Path, host: str) -> None:
    """421 on TCP, for everything, also what is open; the socket does not care."""
    async with fronted(tmp_path / "s") as front:
        for path in ("/api/v1/status", "/healthz", "/nothing"):
            answer = await front.tcp.get(path, headers={"Host": host})
            assert (answer.status, (await answer.json())["error"]["code"]) == (421, "bad-host")
        assert (await front.unix.get("/healthz", headers={"Host": host})).status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://[", "http://localhost:1", ""])
async def test_a_page_of_another_site_cannot_ask(tmp_path: Path, origin: str) -> None:
    """Whatever is not GET needs the page's own origin, where there is one."""
    async with fronted(tmp_path / "s") as front:
        for session in (front.tcp, front.unix):
            answer = await session.post("/api/v1/plan", headers={"Origin": origin, "Host": "localhost:8400"})
            assert (answer.status, (await answer.json())["error"]["code"]) == (403, "bad-origin")
        assert front.stub.asked == []


async def test_our_own_page_can_ask(tmp_path: Path) -> None:
    """Origin and Host are the same."""
    async with fronted(tmp_path / "s") as front:
        headers = {"Origin": "http://localhost:8400", "Host": "localhost:8400"}
        assert (await front.tcp.post("/api/v1/plan", headers=headers)).status == 200


async def test_answers_may_not_be_kept_nor_guessed_at(tmp_path: Path) -> None:
    """The headers that stop a cache and a browser's guess are on every answer, errors too."""
    async with fronted(tmp_path / "s") as front:
        for path in ("/api/v1/status", "/healthz", "/nothing"):
            headers = (await front.tcp.get(path)).headers
            assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
            assert "Access-Control-Allow-Origin" not in headers


def test_host_names_are_read_without_port_and_brackets() -> None:
    """In all their spellings."""
    assert [host_name(h) for h in ("A.b:1", "[::1]:2", "[::1]", "x.", "")] == ["a.b", "::1", "::1", "x", ""]
    assert "localhost" in own_names(["0.0.0.0"]) and "0.0.0.0" in own_names(["0.0.0.0"])


# -- before it serves, and when it goes -------------------------------------------------------------------------------


async def test_addresses_are_taken_before_anybody_is_served(tmp_path: Path) -> None:
    """Who connects between `open` and `start` waits and is answered; another daemon is refused meanwhile."""
    path = tmp_path / "s"
    first = listeners(path, ("127.0.0.1", 0))
    await first.open()
    port = first._web[0].getsockname()[1]
    with pytest.raises(ListenError, match="a running vllmd answers there"):
        await listeners(path).open()
    with pytest.raises(ListenError, match="ss -ltnp"):
        await listeners(None, ("127.0.0.1", port)).open()
    pairs = [await asyncio.open_unix_connection(path), await asyncio.open_connection("127.0.0.1", port)]
    for _, writer in pairs:
        writer.write(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
    await first.start()
    for reader, writer in pairs:
        assert (await reader.read()).startswith(b"HTTP/1.0 200")
        writer.close()
    await first.stop()


async def test_what_was_taken_and_never_served_is_given_back(tmp_path: Path) -> None:
    """A daemon that finds something else to be wrong."""
    path = tmp_path / "s"
    first = listeners(path, ("127.0.0.1", 0))
    await first.open()
    port = first._web[0].getsockname()[1]
    await first.stop()
    assert not path.exists()
    second = listeners(path, ("127.0.0.1", port))
    await second.start()
    await second.stop()


class Clients:
    """Many that connect, wait a moment, ask once and read the answer, one after the other."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        self.over = threading.Event()
        self.answers: list[bytes] = []
        self._threads = [threading.Thread(target=self._run, args=(random.Random(n),)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, rng: random.Random) -> None:
        while not self.over.is_set():
            got = b""
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(20)
                sock.connect(str(self._path))
                time.sleep(rng.choice((0, 0, 0.001, 0.01, 0.05)))
                try:
                    sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
                    time.sleep(rng.choice((0, 0, 0.001, 0.02)))
                    sock.sendall(b"Connection: close\r\n\r\n")
                    while chunk := sock.recv(4096):
                        got += chunk
                except OSError as error:
                    got += repr(error).encode()
            self.answers.append(got)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(20)


async def test_nobody_who_was_let_in_is_cut_when_the_socket_stays(tmp_path: Path) -> None:
    """systemd holds the socket over restarts: a client is answered by this daemon or by the next, but always answered."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(path))
        held.listen(512)
        clients = Clients(path, 12)
        try:
            for _ in range(8):
                given = held.dup()
                given.setblocking(False)
                made = Listeners(Stub(), EventLog(), path, HttpSpec(()), given=[given])
                await made.start()
                await asyncio.sleep(0.15)
                await made.stop()
            clients.over.set()
            made = Listeners(Stub(), EventLog(), path, HttpSpec(()), given=[held.dup()])
            await made.start()  # for those who still wait
            await asyncio.to_thread(clients.join)
            await made.stop()
        finally:
            clients.over.set()
    assert path.exists()
    assert len(clients.answers) > 100
    assert [answer for answer in clients.answers if not answer.startswith(b"HTTP/1.1 200")] == []


async def test_an_idle_client_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """One that keeps its connection for later, one that never asks: the end waits for the second, a moment."""
    async with fronted(tmp_path / "s", Limits(grace=0.2)) as front:
        assert (await front.unix.get("/healthz")).status == 200
        began = time.monotonic()
        await front.listeners.stop()
        assert time.monotonic() - began < 0.15
    async with fronted(tmp_path / "s", Limits(grace=0.2)) as front:
        _, writer = await front.connect("unix")
        began = time.monotonic()
        await front.listeners.stop()
        assert 0.15 < time.monotonic() - began < 0.5
        writer.close()
