"""Answers and events are read the same however they are cut into pieces; what is not HTTP is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.ctl.faults import Garbled
from vllmd.ctl.http import EventReader, Response

WHOLE = {
    "length": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", b"hello"),
    "chunked": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nTrailer: 1\r\n\r\n",
        b"hello",
    ),
    "close": (b"HTTP/1.0 200 OK\r\n\r\nhello", b"hello"),
    "empty": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "zero": (b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n", b""),
}


@pytest.mark.parametrize("kind", WHOLE)
@given(data=st.data())
def test_an_answer_is_the_same_however_it_is_cut(kind: str, data: st.DataObject) -> None:
    """Any partition of the bytes gives the same body."""
    raw, body = WHOLE[kind]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))))
    response, got = Response(), b""
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        got += response.feed(raw[start:end])
    response.end()
    assert (got, response.done, response.status // 100) == (body, True, 2)


@pytest.mark.parametrize("kind", WHOLE)
def test_half_an_answer_is_no_answer(kind: str) -> None:
    """An answer that stops before its end raises, wherever that is, unless its end is the end of the connection."""
    raw, _ = WHOLE[kind]
    for size in range(len(raw) - (0 if kind != "close" else 5)):
        response = Response()
        response.feed(raw[:size])
        if kind == "close" and response.begun:
            continue
        with pytest.raises(Garbled, match="broke in the middle"):
            response.end()


GARBAGE = [
    b"SSH-2.0-OpenSSH_9.2\r\n", b"\x00\x01\x02\x03", b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/2 200\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5_0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9" + b"9" * 30 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 70000,
    b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000,
]  # fmt: skip


@pytest.mark.parametrize("raw", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_refused(raw: bytes) -> None:
    """What is not HTTP, or lies about its lengths, raises Garbled."""
    response = Response()
    with pytest.raises(Garbled):
        response.feed(raw)


@given(st.binary(max_size=200), st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", WHOLE["chunked"][0][:50]]))
def test_no_bytes_raise_anything_else(noise: bytes, start: bytes) -> None:
    """Whatever comes, the reader takes it or raises Garbled."""
    response = Response()
    try:
        response.feed(start + noise)
        response.end()
    except Garbled:
        pass


EVENTS = b": hello\nretry: 5\n\nid: 7\nevent: model\ndata: {\ndata: }\n\nevent: x\n\ndata:y\r\n\r\n"


@given(data=st.data())
def test_events_are_the_same_however_they_are_cut(data: st.DataObject) -> None:
    """Comments are keepalives, data lines join, an event without data is none, the id stays."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(EVENTS)))))
    reader, got = EventReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(EVENTS)], strict=True):
        got += reader.feed(EVENTS[start:end])
    assert [(e.kind, e.data, e.id) for e in got] == [("", "hello", ""), ("model", "{\n}", "7"), ("message", "y", "7")]
