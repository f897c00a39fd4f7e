"""Server-sent events over real listeners: snapshot, resume, slow readers, logs, the end; and actions whose client leaves."""

import asyncio
import json
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.stub_backend import Lines, fronted, read_frame
from vllmd.edge.gate import Limits
from vllmd.edge.stream import EventLog
from vllmd.events import Answer

EVENTS = "/api/v1/events"


async def test_a_stream_begins_with_a_snapshot_and_goes_on(tmp_path: Path) -> None:
    """The whole status with the caller's access, then each event with its id."""
    async with fronted(tmp_path / "s") as front, front.tcp.get(EVENTS) as answer:
        assert answer.content_type == "text/event-stream"
        first = await read_frame(answer.content)
        assert first["event"] == "snapshot"
        assert json.loads(first["data"])["daemon"]["access"] == "read"
        front.events.publish("note", {"text": "a\nb"})
        second = await read_frame(answer.content)
        assert (second["event"], json.loads(second["data"])) == ("note", {"text": "a\nb"})
        assert int(second["id"]) == int(first["id"]) + 1 == front.events.last


@pytest.mark.parametrize("by", ["header", "query"])
async def test_a_stream_resumes_behind_an_id_without_a_snapshot(tmp_path: Path, by: str) -> None:
    """Last-Event-ID or ?after= gives what was missed, nothing twice."""
    async with fronted(tmp_path / "s") as front:
        front.events.publish("note", {"n": 1})
        seen = str(front.events.last)
        front.events.publish("note", {"n": 2})
        how = {"headers": {"Last-Event-ID": seen}} if by == "header" else {"params": {"after": seen}}
        async with front.tcp.get(EVENTS, **how) as answer:  # type: ignore[arg-type]
            frame = await read_frame(answer.content)
            assert (frame["event"], frame["data"]) == ("note", '{"n":2}')


@pytest.mark.parametrize("seen", ["1", "9007199254740991"])
async def test_an_id_that_is_not_remembered_gives_lost_and_a_snapshot(tmp_path: Path, seen: str) -> None:
    """Of an earlier run, or of a clock that was set back."""
    async with fronted(tmp_path / "s") as front, front.tcp.get(EVENTS, params={"after": seen}) as answer:
        assert [(await read_frame(answer.content))["event"] for _ in range(2)] == ["lost", "snapshot"]


async def test_an_odd_last_event_id_is_as_none(tmp_path: Path) -> None:
    """A browser sends back what it was given; anything else starts anew."""
    async with fronted(tmp_path / "s") as front, front.tcp.get(EVENTS, headers={"Last-Event-ID": "x²"}) as answer:
        assert (await read_frame(answer.content))["event"] == "snapshot"


async def test_what_is_remembered_can_be_had_as_json_lines(tmp_path: Path) -> None:
    """follow=0 answers and ends."""
    async with fronted(tmp_path / "s") as front:
        front.events.publish("note", {"n": 1})
        front.events.publish("model", {"n": 2})
        text = await (await front.tcp.get(EVENTS, params={"follow": "0"})).text()
        assert [(row["event"], row["data"]["n"]) for row in map(json.loads, text.splitlines())] == [
            ("note", 1),
            ("model", 2),
        ]


async def test_the_clock_is_sent_while_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that hears nothing for long has lost us, so we speak; the clock has no id, nobody resumes there."""
    monkeypatch.setattr("vllmd.edge.sse.CLOCK_EVERY", 0.05)
    async with fronted(tmp_path / "s") as front, front.tcp.get(EVENTS) as answer:
        await read_frame(answer.content)
        frame = await read_frame(answer.content)
        assert frame["event"] == "clock"
        assert json.loads(frame["data"])["time"] > 1e9
        assert "id" not in frame


async def test_the_clock_is_sent_while_much_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy stream carries it too."""
    monkeypatch.setattr("vllmd.edge.sse.CLOCK_EVERY", 0.05)
    async with fronted(tmp_path / "s") as front, front.tcp.get(EVENTS) as answer:
        for _ in range(10_000):
            front.events.publish("note", {})
            if (await read_frame(answer.content))["event"] == "clock":
                return
        raise AssertionError("no clock")


async def test_a_slow_reader_costs_no_memory_and_is_told_what_it_lost(tmp_path: Path) -> None:
    """While it does not read, the ring turns over many times; then it gets `lost` and a snapshot, and all that follows."""
    async with fronted(tmp_path / "s", log=EventLog(size=50)) as front:
        reader, writer = await front.connect("unix")
        writer.write(f"GET {EVENTS} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
        await read_frame(reader)
        for n in range(300):
            front.events.publish("note", {"n": n, "text": "x" * 20_000})
            await asyncio.sleep(0)
        kinds = []
        while "lost" not in kinds:
            kinds.append((await read_frame(reader))["event"])
        assert (await read_frame(reader))["event"] == "snapshot"
        front.events.publish("note", {"n": "last"})
        assert json.loads((await read_frame(reader))["data"])["n"] == "last"
        writer.transport.abort()


async def test_a_client_that_never_reads_is_cut_off(tmp_path: Path) -> None:
    """After `patience` its connection ends, and with it the handler."""
    async with fronted(tmp_path / "s", Limits(patience=0.2)) as front:
        reader, writer = await front.connect("unix")
        writer.write(f"GET {EVENTS} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
        await read_frame(reader)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(20):
            while front.listeners.connections:
                front.events.publish("note", {"text": "x" * 50_000})
                await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_a_client_that_never_reads_a_plain_answer_is_cut_off(tmp_path: Path) -> None:
    """The same for what is no stream: it would be held in memory for as long as the client likes."""
    async with fronted(tmp_path / "s", Limits(patience=0.2)) as front:
        front.stub.value["daemon"]["config"] = "x" * (8 << 20)
        _, writer = await front.connect("unix")
        writer.write(b"GET /api/v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(20):
            while not front.listeners.connections:
                await asyncio.sleep(0.01)
            while front.listeners.connections:
                await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_a_client_that_leaves_takes_its_stream_with_it(tmp_path: Path) -> None:
    """No handler is left behind."""
    async with fronted(tmp_path / "s") as front:
        async with front.unix.get(EVENTS) as answer:
            await read_frame(answer.content)
            answer.close()
        async with asyncio.timeout(20):
            while front.listeners.connections:
                await asyncio.sleep(0.01)


async def test_a_log_can_be_followed(tmp_path: Path) -> None:
    """First the tail, then what comes; the file is let go when the client leaves."""
    async with fronted(tmp_path / "s") as front:
        front.stub.lines = Lines([{"text": "a"}, {"text": "\x1b[31mb\n"}], [], [{"text": "c"}])
        async with front.tcp.get("/api/v1/models/alpha/logs", params={"follow": "1"}) as answer:
            frames = [await read_frame(answer.content) for _ in range(3)]
            assert [json.loads(frame["data"])["text"] for frame in frames] == ["a", "\x1b[31mb\n", "c"]
            assert {frame["event"] for frame in frames} == {"line"}
            answer.close()
        async with asyncio.timeout(20):
            await front.stub.lines.closed.wait()


@pytest.mark.parametrize("path", [EVENTS, "/api/v1/models/alpha/logs?follow=1"])
async def test_streams_end_with_bye_when_the_daemon_does(tmp_path: Path, path: str) -> None:
    """stop() takes less than a second, ends streams whole, and removes the socket file."""
    async with fronted(tmp_path / "s") as front, front.tcp.get(path) as answer:
        await read_frame(answer.content)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await front.listeners.stop()
        assert loop.time() - began < 1.0
        rest = (await answer.content.read()).decode()
        assert "event: bye\n" in rest
        assert not (tmp_path / "s").exists()


async def test_stop_is_quick_although_a_client_does_not_read(tmp_path: Path) -> None:
    """A stuck stream and a wish without an answer do not hold the daemon up."""
    async with fronted(tmp_path / "s") as front:
        front.stub.release = asyncio.Event()
        reader, stuck = await front.connect("unix")
        stuck.write(f"GET {EVENTS} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
        await read_frame(reader)
        stuck.transport.pause_reading()  # type: ignore[attr-defined]
        _, asking = await front.connect("unix")
        asking.write(b"POST /api/v1/models/alpha/start HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(20):
            while not front.stub.asked:
                await asyncio.sleep(0.01)
            for _ in range(40):  # more than any buffer on the way holds
                front.events.publish("note", {"text": "x" * 50_000})
                await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await front.listeners.stop()
        assert loop.time() - began < 1.0
        async with asyncio.timeout(20):  # their ends here are closed, whatever was still to be sent
            while any(c.laddr == str(front.path) for c in psutil.Process().net_connections("unix")):
                await asyncio.sleep(0.01)
        stuck.transport.abort()
        asking.transport.abort()


async def test_who_leaves_while_asking_is_let_go(tmp_path: Path) -> None:
    """The handler ends; the wish was handed over before."""
    async with fronted(tmp_path / "s") as front:
        front.stub.release = asyncio.Event()
        with pytest.raises(TimeoutError):
            await front.unix.post("/api/v1/models/alpha/start", timeout=aiohttp.ClientTimeout(total=0.3))
        async with asyncio.timeout(20):
            await front.stub.cancelled.wait()
        assert front.stub.asked


async def test_a_daemon_that_does_not_answer_in_time_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 and not a client that hangs."""
    monkeypatch.setattr("vllmd.edge.routes.ANSWER_WITHIN", 0.05)
    async with fronted(tmp_path / "s") as front:
        front.stub.release = asyncio.Event()
        answer = await front.unix.post("/api/v1/models/alpha/start")
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "busy")


async def test_an_error_in_a_stream_ends_it_and_is_reported(tmp_path: Path) -> None:
    """There is no way to say 500 in the middle: the connection breaks, the journal has the story."""
    async with fronted(tmp_path / "s") as front:
        front.stub.lines = Lines([{"text": "a"}])
        async with front.tcp.get("/api/v1/models/alpha/logs?follow=1") as answer:
            await read_frame(answer.content)
            front.stub.lines.batches.append(1)  # type: ignore[arg-type]
            with pytest.raises(aiohttp.ClientError):
                await answer.content.read()
        assert isinstance(front.stub.faults[0][2], TypeError)


async def test_an_answer_of_a_running_wish_waits_for_nobody(tmp_path: Path) -> None:
    """200 = nothing to do is passed on as such."""
    async with fronted(tmp_path / "s") as front:
        front.stub.answers["alpha"] = Answer(1, 200, "alpha is ready", "already")
        answer = await front.unix.post("/api/v1/models/alpha/start")
        assert (answer.status, (await answer.json())["kind"]) == (200, "already")
