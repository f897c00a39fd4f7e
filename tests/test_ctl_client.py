"""The client over a real socket: what it says when there is no vllmd, and when what answers is not one."""

import os
import socket
import time
from pathlib import Path

import pytest

from tests.ctl_daemon import STREAM, Daemon, answer, chunk, event
from vllmd.ctl.client import Client, choose_socket
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


def test_permission_denied_names_owner_and_group(tmp_path: Path) -> None:
    """Who may not connect learns who may, and how to become one."""
    from vllmd.ctl.client import explain

    with Daemon(tmp_path) as daemon:
        daemon.path.chmod(0o660)
        fault = explain(str(daemon.path), PermissionError(13, "Permission denied"))
    assert "mode 0660" in fault.message and "owner" in fault.message
    assert any("usermod -aG vllmd" in hint for hint in fault.hints)


@pytest.mark.skipif(os.path.exists("/run/vllmd.sock"), reason="a vllmd of the machine is there")  # noqa: PTH110
def test_the_socket_is_the_named_one_or_the_one_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--socket, VLLMD_SOCKET, the system's, the user's own if only that is there."""
    monkeypatch.delenv("VLLMD_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert choose_socket(None) == "/run/vllmd.sock"
    own = tmp_path / "vllmd" / "vllmd.sock"
    own.parent.mkdir()
    own.touch()
    assert choose_socket(None) == str(own)
    monkeypatch.setenv("VLLMD_SOCKET", "/x")
    assert choose_socket(None) == "/x"
    assert choose_socket("/y") == "/y"


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
