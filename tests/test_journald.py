"""Into the journal: what a journald on a real socket gets, when it is slow, full, gone and back; and our log as fields."""

import fcntl
import io
import json
import logging
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from vllmd.core.logline import severity
from vllmd.edge import journald
from vllmd.edge.journal import Lines, configure, find_journal
from vllmd.edge.journald import Journald, available, encode, is_there, priority


def decode(data: bytes) -> dict[str, str]:
    """An entry, read as the protocol's description says."""
    fields = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", rest[:8])
            value, end, data = rest[8 : 8 + size], rest[8 + size : 9 + size], rest[9 + size :]
            assert end == b"\n"
        else:
            data = rest
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


class Fake:
    """A journald. What was sent is there when the sender returns: nothing is waited for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.sock.bind(str(path))
        self.files: list[int] = []  # seals of the files that came

    def take(self) -> list[dict[str, str]]:
        """The entries that wait, whichever way they came."""
        found: list[dict[str, str]] = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 16 << 20, 4)
            except BlockingIOError:
                return found
            for fd in fds:
                assert data == b""
                self.files.append(fcntl.fcntl(fd, fcntl.F_GET_SEALS))
                data = os.pread(fd, os.fstat(fd).st_size, 0)
                os.close(fd)
            found.append(decode(data))

    def end(self) -> None:
        self.sock.close()
        self.path.unlink(missing_ok=True)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    made = Fake(tmp_path / "socket")
    yield made
    made.sock.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the sender would have made."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


def fill_up(fake: Fake) -> None:
    """By somebody else: the queue is journald's, for all who send."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
        try:
            while True:
                other.sendto(b"MESSAGE=other\n", str(fake.path))
        except BlockingIOError:
            return


def descriptors() -> int:
    """How many are open here."""
    return len(list(Path("/proc/self/fd").iterdir()))


# -- the protocol


def test_fields_arrive_with_and_without_newlines(fake: Fake) -> None:
    """Values keep every sign; only what cannot be UTF-8 is replaced."""
    values: dict[str, str | int] = {
        "MESSAGE": "two\nlines\n", "PRIORITY": 3, "A": "a=b", "B": "", "C_1": "é\t\r", "D": "\n", "E": "\udc80",
    }  # fmt: skip
    assert Journald(fake.path).send(values)
    assert fake.take() == [{**values, "PRIORITY": "3", "E": "?"}]


def test_the_bytes_are_those_of_the_protocol() -> None:
    """The length is that of the bytes, 64 bits, little-endian."""
    assert encode({"A": "b", "M": "é\n"}) == b"A=b\nM\n\x03\0\0\0\0\0\0\0\xc3\xa9\n\n"


@pytest.mark.parametrize("name", ["", "a", "_PID", "1A", "A-B", "A=B", "A\nB", "É", "A" * 65])
def test_a_name_that_is_no_field_is_refused(name: str) -> None:
    """journald would drop the field, or take a part of its name for a value."""
    with pytest.raises(ValueError, match="no name of a journal field"):
        encode({name: "x"})


def test_a_large_entry_goes_as_one_datagram_and_a_huge_one_as_a_sealed_file(fake: Fake) -> None:
    """Whole both times; the file can neither be written nor resized nor unsealed any more."""
    journal = Journald(fake.path)
    assert journal.send({"MESSAGE": "x" * 100_000})
    assert fake.take() == [{"MESSAGE": "x" * 100_000}]
    assert fake.files == []
    huge = {"MESSAGE": "line\n" * (4 << 20), "PRIORITY": "6"}  # more than twice the buffer, which the kernel may double
    assert journal.send(huge)
    assert fake.take() == [huge]
    assert fake.files == [fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE]
    assert journal.lost == 0


def test_the_buffer_is_asked_for(fake: Fake) -> None:
    """What the kernel's default would not take goes as one datagram still, as far as the kernel allows."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as plain:
        default = plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, journald.BUFFER)
        allowed = plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    if allowed <= default + 1024:
        pytest.skip("this kernel allows no more than its default")
    assert Journald(fake.path).send({"MESSAGE": "x" * default})
    assert len(fake.take()) == 1
    assert fake.files == []


# -- a journald that does not listen


def test_a_busy_journald_is_asked_again(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads within milliseconds loses nothing."""
    journal = Journald(fake.path)
    fill_up(fake)
    read: list[int] = []
    monkeypatch.setattr(time, "sleep", lambda _: read.append(len(fake.take())))
    assert journal.send({"MESSAGE": "z"})
    assert len(read) == 1
    assert [entry["MESSAGE"] for entry in fake.take()] == ["z"]
    assert journal.lost == 0


def test_a_stuck_journald_costs_a_few_milliseconds_once(fake: Fake, pauses: list[float]) -> None:
    """What it does not take is counted; the next ones do not wait until it takes one again."""
    journal = Journald(fake.path)
    fill_up(fake)
    assert not journal.send({"MESSAGE": "x"})
    assert 0 < sum(pauses) < 0.006
    assert 2 <= len(pauses) < 10
    once = len(pauses)
    for _ in range(1000):
        assert not journal.send({"MESSAGE": "x"})
    assert len(pauses) == once
    assert journal.lost == 1001
    fake.take()
    assert journal.send({"MESSAGE": "back"})
    assert fake.take() == [{"MESSAGE": "back"}]
    fill_up(fake)
    assert not journal.send({"MESSAGE": "x"})
    assert len(pauses) == 2 * once


def test_a_huge_entry_for_a_stuck_journald_is_lost_as_well(fake: Fake, pauses: list[float]) -> None:
    """The file is let go of."""
    journal = Journald(fake.path)
    journal.send({"MESSAGE": "opens the socket"})
    fill_up(fake)
    before = descriptors()
    assert not journal.send({"MESSAGE": "x" * (20 << 20)})
    assert journal.lost == 1
    assert descriptors() == before


def test_a_journald_that_was_restarted_is_found_again(fake: Fake, tmp_path: Path) -> None:
    """Gone: counted, at once. Back under the same path: as before."""
    journal = Journald(fake.path)
    assert journal.send({"MESSAGE": "1"})
    fake.sock.close()
    assert not journal.send({"MESSAGE": "refused"})
    fake.path.unlink()
    assert not journal.send({"MESSAGE": "no file"})
    assert journal.lost == 2
    again = Fake(tmp_path / "socket")
    assert journal.send({"MESSAGE": "2"})
    assert again.take() == [{"MESSAGE": "2"}]
    again.end()


def test_a_way_that_is_let_go_of_leaves_no_descriptor(fake: Fake) -> None:
    """close() twice, a send after it, and one that is simply forgotten."""
    before = descriptors()
    journal = Journald(fake.path)
    journal.send({"MESSAGE": "1"})
    journal.close()
    journal.close()
    assert descriptors() == before
    assert journal.send({"MESSAGE": "2"})
    del journal
    assert descriptors() == before


def test_availability_is_systemds_word(fake: Fake, tmp_path: Path) -> None:
    """The stream that it names must be the one we have: a pipe put behind it is none, and the socket must exist."""
    reader, writer = os.pipe()
    status = os.fstat(writer)
    env = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    assert available(env, writer, fake.path)
    assert not available(env, writer, tmp_path / "none")
    assert not available(env, writer, tmp_path)
    assert not available({}, writer, fake.path)
    assert not available({"JOURNAL_STREAM": "1:2"}, writer, fake.path)
    assert not available({"JOURNAL_STREAM": "x"}, writer, fake.path)
    os.close(writer)
    os.close(reader)
    assert not available(env, writer, fake.path)
    assert is_there(fake.path)
    assert not is_there(tmp_path / "none")


# -- how serious


def test_levels_are_syslogs_numbers() -> None:
    """Those of structlog; anything else is information."""
    assert [priority(w) for w in ("debug", "info", "warning", "error", "critical", "?")] == [7, 6, 4, 3, 2, 6]


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("(EngineCore pid=123) ERROR 11-23 03:40:02 [file.py:1] msg", 3),
        ("(EngineCore pid=123) WARNING 11-23 03:40:02 [file.py:1] ERROR in words", 4),
        ("INFO 11-23 03:40:02 [file.py:1] ValueError: quoted", 6),
        ("(Worker_TP1 pid=9) DEBUG 11-23 03:40:02 [file.py:1] msg", 7),
        ("CRITICAL 11-23 03:40:02 [file.py:1] msg", 2),
        ("Loading: 50%|##  | 1/2(APIServer pid=1) ERROR 11-23 03:40:02 [file.py:1] msg", 3),
        ("INFO:     Started server process [1]", 6),
        ("WARNING:  Invalid HTTP request received.", 4),
        ("ERROR:    Exception in ASGI application", 3),
        ('{"levelname": "ERROR", "message": "x"}', 3),
        ('{"levelname": "ODD", "message": "x"}', 6),
        ("Traceback (most recent call last):", 3),
        ("(EngineCore pid=123) Traceback (most recent call last):", 3),
        ('(EngineCore pid=123)   File "/a b/c.py", line 12, in run', 3),
        ("ValueError: too large", 3),
        ("torch.OutOfMemoryError: CUDA out of memory.", 3),
        ("pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig", 3),
        ("RuntimeError", 3),
        ("Fatal Python error: Segmentation fault", 3),
        ("/srv/a.py:138: FutureWarning: `x` is deprecated", 4),
        ("[W1124 01:53:11.749398921 utils.cpp:68] Warning: NUMA binding", 4),
        ("[E1124 01:53:11.749398921 socket.cpp:68] failed", 3),
        ("Errors: none", 6),
        ("no error: fine", 6),
        ("Loading safetensors checkpoint shards: 100% Completed | 2/2", 6),
        ("", 6),
    ],
)
def test_a_line_of_a_models_log_tells_how_serious_it_is(line: str, number: int) -> None:
    """vLLM's own words, uvicorn's, JSON, bare tracebacks, Python's warnings, PyTorch's C++ side."""
    assert severity(line) == number


@pytest.mark.parametrize("piece", ["a", "a.", ":1: ", "(", "aError.", '  File "', "(x pid=1) ", "Warning"])
def test_no_line_takes_long_to_judge(piece: str) -> None:
    """The longest that a log reader hands on, of what patterns may stumble over."""
    line = (piece * (16 << 10))[: 16 << 10]
    began = time.process_time()
    severity(line)
    severity(f'  File "{line}')
    assert time.process_time() - began < 0.5


# -- our own log


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Logging is the process's: other tests find it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def under_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if systemd had connected standard error to the journal."""
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")


def test_an_event_becomes_fields(fake: Fake) -> None:
    """The words of the console, without time and level; each key a field; what is None is absent."""
    log = configure("info", "journal", socket=fake.path)
    log.warning("crashed", model="ocr", kind="state", attempt=3, phase="load", left=1.5, device=None, busy=True)
    log.info("listens", address="127.0.0.1:8400")
    log.debug("not shown")
    first, second = fake.take()
    assert first == {
        "MESSAGE": "ocr: crashed phase=load left=1.5 busy=True", "PRIORITY": "4", "SYSLOG_IDENTIFIER": "vllmd",
        "VLLMD_MODEL": "ocr", "VLLMD_KIND": "state", "VLLMD_ATTEMPT": "3", "VLLMD_PHASE": "load", "VLLMD_LEFT": "1.5",
        "VLLMD_BUSY": "True",
    }  # fmt: skip
    assert second == {
        "MESSAGE": "listens address=127.0.0.1:8400", "PRIORITY": "6", "SYSLOG_IDENTIFIER": "vllmd",
        "VLLMD_ADDRESS": "127.0.0.1:8400",
    }  # fmt: skip


def test_any_key_makes_a_legal_field(fake: Fake) -> None:
    """A log call never fails for the name of a key."""
    configure("info", "journal", socket=fake.path).info("x", **{"a-b é": 1, "k" * 100: 2, "_pid": 3})
    (entry,) = fake.take()
    assert {"VLLMD_A_B__", "VLLMD_" + "K" * 58, "VLLMD__PID"} < set(entry)


def test_an_exception_is_part_of_the_message(fake: Fake) -> None:
    """Ours, and that of a library which logs in Python's own way."""
    log = configure("info", "journal", socket=fake.path)
    try:
        raise KeyError("gone")
    except KeyError as error:
        log.error("internal error", exc_info=error)
        logging.getLogger("aiohttp").exception("unhandled")
    ours, theirs = fake.take()
    assert re.fullmatch(r"internal error\nTraceback .*\nKeyError: 'gone'", ours["MESSAGE"], re.S)
    assert (ours["PRIORITY"], set(ours)) == ("3", {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER"})
    assert theirs["MESSAGE"].startswith("unhandled library=aiohttp\nTraceback ")
    assert (theirs["PRIORITY"], theirs["VLLMD_LIBRARY"]) == ("3", "aiohttp")


def test_a_log_without_a_journald_does_not_fail(fake: Fake) -> None:
    """It may go while we run."""
    log = configure("info", "journal", socket=fake.path)
    fake.end()
    log.error("nobody hears")


def test_auto_is_the_journal_where_standard_error_is_the_journals(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere a console, also with a journal on the machine."""
    configure("info", "auto", socket=fake.path).info("to a console")
    assert fake.take() == []
    assert capsys.readouterr().err.endswith("to a console\n")
    under_journal(monkeypatch)
    configure("info", "auto", socket=fake.path).info("to the journal")
    assert [entry["MESSAGE"] for entry in fake.take()] == ["to the journal"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("form", ["auto", "journal"])
def test_without_a_journal_it_is_a_console(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for or not."""
    under_journal(monkeypatch)
    configure("info", form, socket=tmp_path / "none").warning("crashed", model="ocr", attempt=3)
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: ocr: crashed\n", capsys.readouterr().err)


@pytest.mark.parametrize("form", ["console", "json", "auto"])
def test_a_stream_that_is_given_is_written_to(form: str, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Console and JSON are as ever under systemd too."""
    under_journal(monkeypatch)
    stream = io.StringIO()
    configure("info", form, stream, fake.path).error("crashed", model="ocr", kind="state", attempt=3, n=1)
    assert fake.take() == []
    if form == "json":
        entry = json.loads(stream.getvalue())
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", entry.pop("timestamp"))
        assert entry == {
            "event": "crashed", "level": "error", "model": "ocr", "kind": "state", "attempt": 3, "n": 1,
        }  # fmt: skip
    else:
        assert re.fullmatch(r"\d\d:\d\d:\d\d error: ocr: crashed n=1\n", stream.getvalue())


# -- what models print


def test_a_models_line_has_its_name(fake: Fake) -> None:
    """Found by identifier and by field; without a phase there is no such field, and blank lines are passed over."""
    lines = Lines(Journald(fake.path))
    text = "(EngineCore pid=12) ERROR 11-23 03:40:02 [a.py:1] gone"
    assert lines.send(text, model="dots-ocr", attempt=2, phase="load", priority=severity(text))
    assert lines.send("ok", model="dots-ocr", attempt=2, phase=None, priority=6)
    assert lines.send("  ", model="dots-ocr", attempt=2, phase=None, priority=6)
    assert fake.take() == [
        {
            "MESSAGE": text, "PRIORITY": "3", "SYSLOG_IDENTIFIER": "vllmd/dots-ocr",
            "VLLMD_MODEL": "dots-ocr", "VLLMD_ATTEMPT": "2", "VLLMD_PHASE": "load",
        },
        {
            "MESSAGE": "ok", "PRIORITY": "6", "SYSLOG_IDENTIFIER": "vllmd/dots-ocr",
            "VLLMD_MODEL": "dots-ocr", "VLLMD_ATTEMPT": "2",
        },
    ]  # fmt: skip
    fake.end()
    assert not lines.send("x", model="dots-ocr", attempt=2, phase=None, priority=6)
    assert lines.journal.lost == 1


def test_lines_follow_the_form_of_the_log(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """One decision for both."""
    assert [find_journal(form, fake.path) is not None for form in ("auto", "console", "json", "journal")] == [
        False, False, False, True,
    ]  # fmt: skip
    under_journal(monkeypatch)
    assert find_journal("auto", fake.path) is not None
    assert find_journal("console", fake.path) is None
