"""The client over a real socket: what it says when there is no vllmd, and when what answers is not one."""

import grp
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ctl_daemon import STREAM, Daemon, answer, chunk, event
from vllmd.config.paths import complete
from vllmd.ctl.client import Client, choose_socket, explain, places
from vllmd.ctl.faults import Garbled, Refused, Unreachable

STATUS = "GET /api/v1/status"


def test_a_request_is_answered_whole(tmp_path: Path) -> None:
    """A body larger than any buffer comes back as it was sent."""
    value = {"text": "x" * 3_000_000}
    with Daemon(tmp_path, {STATUS: value, "POST /p": {"ok": 1}}) as daemon:
        client = Client(str(daemon.path))
        assert client.get("/api/v1/status") == value
        assert client.post("/p", {"models": ["é"]}) == {"ok": 1}
        assert daemon.asked[-1] == ("POST /p", {"models": ["é"]})


def test_an_error_carries_its_sentence_and_remedies(tmp_path: Path) -> None:
    """The message is vllmd's; a hint that only joins the remedies is not said twice."""
    error = {"message": "no room", "code": "no-room", "hint": "a; b", "remedies": ["a", "b"], "type": "conflict"}
    with Daemon(tmp_path, {STATUS: (409, {"error": error})}) as daemon, pytest.raises(Refused) as caught:
        Client(str(daemon.path)).get("/api/v1/status")
    assert (caught.value.message, caught.value.hints, caught.value.code) == ("no room", ["a", "b"], 5)


ODD = {
    "not http": b"220 mail ready\r\n",
    "not json": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n<htm>",
    "half": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
    "nothing": b"",
    "half chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{",
    "deep": answer(0)[:-1].replace(b"Content-Length: 1", b"Content-Length: 200000") + b"[" * 200000,
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_answer_is_garbled(tmp_path: Path, kind: str) -> None:
    """Whatever answers that is not vllmd is told apart from vllmd's own errors."""
    with Daemon(tmp_path, {STATUS: ODD[kind]}) as daemon, pytest.raises(Garbled, match="cannot read"):
        Client(str(daemon.path)).get("/api/v1/status")


@pytest.mark.parametrize("body", [{}, {"error": "x"}, [], {"error": {"message": None, "hint": 5, "remedies": 3}}])
def test_an_error_without_the_usual_shape_is_still_one(tmp_path: Path, body: object) -> None:
    """A proxy's or an older vllmd's error does not raise anything else."""
    with Daemon(tmp_path, {STATUS: (502, body)}) as daemon, pytest.raises(Refused, match="HTTP 502"):
        Client(str(daemon.path)).get("/api/v1/status")


def test_silence_ends_at_the_timeout(tmp_path: Path) -> None:
    """The timeout bounds the whole request, also one that is answered by drops."""

    def drip(connection: socket.socket, _: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n")
        while not daemon.over.wait(0.02):
            connection.sendall(b" ")

    with Daemon(tmp_path, {STATUS: drip}) as daemon:
        began = time.monotonic()
        with pytest.raises(Unreachable, match="no answer in time"):
            Client(str(daemon.path), timeout=0.3).get("/api/v1/status")
        assert time.monotonic() - began < 5


def test_a_missing_socket_says_how_to_start_vllmd(tmp_path: Path) -> None:
    """No file: vllmd does not run there."""
    with pytest.raises(Unreachable, match="no such file") as caught:
        Client(str(tmp_path / "none.sock")).get("/")
    assert "systemctl start vllmd" in caught.value.hints and caught.value.code == 3


def test_a_users_own_socket_is_started_by_the_users_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under XDG_RUNTIME_DIR the command has --user."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(Unreachable) as caught:
        Client(str(tmp_path / "none.sock")).get("/")
    assert "systemctl --user start vllmd" in caught.value.hints


def test_a_left_behind_socket_says_that_nobody_listens(tmp_path: Path) -> None:
    """The file of a vllmd that was killed."""
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "left.sock"))
    left.close()
    with pytest.raises(Unreachable, match="nobody listens"):
        Client(str(tmp_path / "left.sock")).get("/")


def test_a_file_is_not_a_socket(tmp_path: Path) -> None:
    """--socket FILE."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Unreachable, match="not a socket"):
        Client(str(tmp_path / "file")).get("/")


def test_a_path_too_long_for_a_socket_is_said(tmp_path: Path) -> None:
    """The kernel takes 107 bytes."""
    with pytest.raises(Unreachable):
        Client(str(tmp_path / ("x" * 200))).get("/")


def test_who_runs_it_by_hand_is_told_how_too(tmp_path: Path) -> None:
    """Not everybody has a unit for it."""
    with pytest.raises(Unreachable) as caught:
        Client(str(tmp_path / "none.sock")).get("/")
    assert "vllmd --config FILE, if you run it by hand" in caught.value.hints


def denied(monkeypatch: pytest.MonkeyPatch, gid: int, mode: int = 0o660, groups: tuple[int, ...] = ()) -> Unreachable:
    """What is said to somebody in `groups` about a socket of root and the group `gid`."""
    info = os.stat_result((stat.S_IFSOCK | mode, 0, 0, 1, 0, gid, 0, 0, 0, 0))
    with monkeypatch.context() as patch:
        patch.setattr("os.stat", lambda _: info)
        patch.setattr("os.getegid", lambda: 1000)
        patch.setattr("os.getgroups", lambda: list(groups))
        return explain("/run/vllmd.sock", PermissionError(13, "Permission denied"))


def test_permission_denied_names_the_sockets_own_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may not connect learns who may, and how to become one."""
    name = grp.getgrgid(12).gr_name
    fault = denied(monkeypatch, gid=12)
    assert f"permission denied (owner root, group {name}, mode 0660)" in fault.message
    assert fault.hints == [f"sudo usermod -aG {name} $USER, then log in again", "or run it with sudo"]


@pytest.mark.parametrize(("gid", "mode", "groups"), [(0, 0o660, ()), (12, 0o600, ()), (12, 0o660, (12,))])
def test_permission_denied_proposes_no_group_that_would_not_help(
    monkeypatch: pytest.MonkeyPatch, gid: int, mode: int, groups: tuple[int, ...]
) -> None:
    """Not root's, not one without the right to write, not one's own."""
    assert denied(monkeypatch, gid, mode, groups).hints == ["run it with sudo"]


ENVIRONMENTS: list[dict[str, str]] = [
    {}, {"XDG_RUNTIME_DIR": "/run/user/7"}, {"TMPDIR": "/foo"}, {"TEMP": "/bar"}, {"XDG_RUNTIME_DIR": "relative"},
    {"XDG_RUNTIME_DIR": "/run/user/7", "TMPDIR": "/foo"},
]  # fmt: skip


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("env", ENVIRONMENTS, ids=str)
def test_vllmctl_looks_where_vllmd_would_listen(env: dict[str, str], uid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every user and environment the daemon's default is among the places, and the system's is the first."""
    for name in ("XDG_RUNTIME_DIR", "TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    monkeypatch.setattr("tempfile.gettempdir", lambda: env.get("TEMP", "/tmp"))
    found = places()
    assert found[0] == "/run/vllmd.sock"
    assert str(complete({}, env, root=uid == 0)["socket"]) in found


def bind(path: Path) -> str:
    """A socket file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    return str(path)


@pytest.fixture
def user(short: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody in particular, with directories of their own; the folder holds them."""
    monkeypatch.delenv("VLLMD_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short / "run"))
    monkeypatch.setenv("TMPDIR", str(short / "tmp"))
    monkeypatch.setattr("vllmd.ctl.client.SYSTEM", str(short / "system.sock"))
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() or 1000)
    uid = os.geteuid()
    monkeypatch.setattr("vllmd.ctl.client._is_ours", lambda path: Path(path).exists())
    (short / "tmp" / f"vllmd-{uid}").mkdir(parents=True)
    return short


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vc-") as folder:
        yield Path(folder)


def test_the_socket_is_the_named_one_or_the_first_that_is_there(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--socket, VLLMD_SOCKET, the system's, then the user's own ones; the system's where there is none."""
    assert choose_socket(None) == str(user / "system.sock")
    temporary = bind(user / "tmp" / f"vllmd-{os.geteuid()}" / "vllmd.sock")
    assert choose_socket(None) == temporary
    runtime = bind(user / "run" / "vllmd" / "vllmd.sock")
    assert choose_socket(None) == runtime
    system = bind(user / "system.sock")
    assert choose_socket(None) == system
    monkeypatch.setenv("VLLMD_SOCKET", "/x")
    assert choose_socket(None) == "/x"
    assert choose_socket("/y") == "/y"


def test_a_socket_that_we_may_not_use_gives_way_to_our_own(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's vllmd may be there for others; where there is no other socket it is the one to complain about."""
    system = bind(user / "system.sock")
    monkeypatch.setattr("os.access", lambda path, _: path != system)
    assert choose_socket(None) == system
    own = bind(user / "run" / "vllmd" / "vllmd.sock")
    assert choose_socket(None) == own


def test_a_strangers_socket_in_a_directory_for_all_is_not_used(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can make /tmp/vllmd-1000."""
    monkeypatch.delenv("VLLMD_SOCKET", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setattr("vllmd.ctl.client.SYSTEM", str(short / "system.sock"))
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 4711)
    bind(short / f"vllmd-{os.geteuid()}" / "vllmd.sock")
    assert choose_socket(None) == str(short / "system.sock")


def test_where_there_is_no_socket_all_places_are_named(user: Path) -> None:
    """So that nobody has to guess where vllmctl has looked."""
    with pytest.raises(Unreachable) as caught:
        Client(choose_socket(None)).get("/")
    assert f"no such file (nor {user}/run/vllmd/vllmd.sock, " in caught.value.message


def test_a_stream_gives_events_until_its_end(tmp_path: Path) -> None:
    """Events come as they are sent, the end is the end."""
    raw = STREAM + event("snapshot", {"a": 1}, 5) + chunk(b": alive\n\n") + event("bye", {}) + b"0\r\n\r\n"
    with Daemon(tmp_path, {"GET /e": raw}) as daemon:
        stream = Client(str(daemon.path)).stream("/e")
        kinds = [(each.kind, each.id) for each in stream.events(5.0)]
        stream.close()
    assert kinds == [("snapshot", "5"), ("", "5"), ("bye", "5")]


def test_a_stream_that_is_refused_says_why(tmp_path: Path) -> None:
    """An error in place of events is vllmd's sentence."""
    with (
        Daemon(tmp_path, {"GET /e": (403, {"error": {"message": "not you"}})}) as daemon,
        pytest.raises(Refused, match="not you"),
    ):
        Client(str(daemon.path)).stream("/e")


def test_a_silent_stream_is_noticed(tmp_path: Path) -> None:
    """Without even a keepalive the other side is gone, whatever TCP thinks."""

    def hold(connection: socket.socket, _: str) -> None:
        connection.sendall(STREAM)
        daemon.over.wait(20)

    with Daemon(tmp_path, {"GET /e": hold}) as daemon:
        stream = Client(str(daemon.path)).stream("/e")
        with pytest.raises(Unreachable, match="silent"):
            list(stream.events(0.2))
        stream.close()
