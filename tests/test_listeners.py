"""The listeners themselves: the socket file, who is let in, and which hosts and pages may ask."""

import os
import socket
import stat
from pathlib import Path

import pytest

from tests.stub_backend import Stub, fronted
from vllmd.edge import http
from vllmd.edge.gate import host_name, own_names
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
    monkeypatch.setattr(http.os, "geteuid", lambda: 1000)
    sock, _ = http.bind_unix(tmp_path / "run" / "s.sock", "no-such-group")
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
