"""The benchmarks' own arithmetic, and that the core's script of events and the gateway's stub and clients still run."""

import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from tests.bench import router
from tests.bench.bench_core import live
from tests.bench.bench_gateway import C1
from tests.bench.figures import Figure, at_most, middle, table
from tests.bench.native import Load, fetch, load, stub, tagged
from tests.bench.peers import ALONE, DIRECT, VLLMD, Peer, environment, memory, peers
from tests.bench.sampling import GIVEN_UP, QUIET, Cell, Run, Sample, leave_once, turned
from tests.bench.usage import Moment, Row, moment

compiled = pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="needs a C compiler")
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(("part", "value"), [(0.5, 10), (0.95, 19), (1.0, 20), (0.01, 1)])
def test_quantile_is_one_of_the_values(part: float, value: float) -> None:
    """The nearest rank: of 20, 19 are at most the 95th percentile."""
    assert at_most(list(range(20, 0, -1)), part) == value


def test_verdict_follows_the_target() -> None:
    """The target itself is still good; a figure without one is not judged."""
    assert [Figure("", 1.0, "s", target).verdict for target in (1.0, 0.9, None)] == ["ok", "over", ""]


def test_table_shows_value_and_target_in_one_unit() -> None:
    """Seconds become what the figure is told in, the target already is."""
    row = table([middle("a start", [0.010, 0.012, 0.5], "ms", 90.0)]).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:5]] == ["a start", "12.0 ms", "90.0 ms", "ok"]


def test_core_lives_through_the_script() -> None:
    """Every kind of report is among its events, and all models are up at the end."""
    assert set(live(10).took) >= {"Progress", "Ready", "Pulse", "DevicesRead", "Broken", "Gone", "Stop", "CanaryBack"}


# -- the gateway's ------------------------------------------------------------------------------------------------------


def sample(p50: float, others: float) -> Sample:
    """A sample that took a second."""
    return Sample(Load(10, 0, 20, 0, "", 0.5, p50, p50, p50, 0.0, 0.0), 1.0, 0.5, others)


def test_only_quiet_samples_count_where_there_are_any() -> None:
    """Noise counts when there is nothing else; the table says how much of it."""
    noisy, calm = sample(9.0, QUIET + 1), sample(1.0, 0.0)
    assert Cell([noisy, calm, noisy]).middle("p50") == 1.0
    assert Cell([noisy]).middle("p50") == 9.0
    assert Cell([noisy, calm]).quiet == "1 of 2 samples quiet (0.0 cores)"


def test_pairs_are_of_one_round() -> None:
    """A quiet sample is not compared with one of another round, where there is a round in which both are."""
    run = Run()
    run.samples["a", C1] = [sample(1.0, 0.0), sample(2.0, 0.0), sample(3.0, 9.0)]
    run.samples["b", C1] = [sample(4.0, 9.0), sample(5.0, 0.0), sample(6.0, 0.0)]
    pairs, said = run.pairs("a", "b", C1)
    assert [(a.p50, b.p50) for a, b in pairs] == [(2.0, 5.0)] and said == "1 of 3 rounds quiet"
    del run.samples["a", C1][1], run.samples["b", C1][1]
    assert len(run.pairs("a", "b", C1)[0]) == 2


def test_costs_are_per_request_and_per_second() -> None:
    """The warm-up's requests cost CPU too; the rate is of the seconds that were counted."""
    each = sample(1.0, 0.0)
    assert (each.rate, each.cost, each.share) == (20.0, 0.025, 50.0)


def test_each_peer_is_first_in_turn() -> None:
    """And the others follow in both directions."""
    found = [Peer(name, 0, 0) for name in "abc"]
    orders = ["".join(peer.name for peer in turned(found, turn)) for turn in range(6)]
    assert orders == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_usage_is_of_a_tree_without_the_stub() -> None:
    """What is not below us is others'; what the host kept counts as theirs."""
    me = os.getpid()
    rows = {me: Row(1, 1.0, 10), -2: Row(me, 2.0, 20), -3: Row(-2, 4.0, 40), 1: Row(0, 8.0, 80)}
    now = Moment(rows, stolen=0.5)
    assert (now.cpu(-2), now.rss(-2), now.others) == (6.0, 60, 8.5)
    program = Path("/proc/self/exe").resolve()
    assert list(moment().tree(me)) and not list(moment().tree(me, program))


@compiled
def test_stub_and_load_agree() -> None:
    """Each answer is whole, each chunk comes, and the chunks of all streams are 20 ms apart."""
    with stub() as port:
        plain = load("plain", port, connections=4, seconds=0.2, warm=0.0)
        large = load("plain", port, connections=2, seconds=0.2, warm=0.0, body=1_000_000)
        streams = load("stream", port, connections=8, chunks=10)
        step = load("stream", port, connections=8, chunks=10, step=1)
    for found in (plain, large):
        assert found.errors == 0 and found.requests > 0, found
    for found in (streams, step):
        assert (found.errors, found.requests, found.chunks) == (0, 8, 80), found
    assert streams.seconds > 10 * 0.02


@compiled
@pytest.mark.parametrize(
    ("kind", "answer", "error"),
    [
        (
            "plain",
            b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno",
            "HTTP/1.1 503 Service Unavailable",
        ),
        ("plain", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ncut", "the connection was closed"),
        ("plain", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "an answer of another length"),
        ("stream", CHUNKED + b"0\r\n\r\n", "a stream ended early"),
        ("stream", CHUNKED + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", "a stream ended early"),
        ("stream", CHUNKED + b'1c\r\ndata: {"content":"t=1 n=1"}\n\r\n', "a chunk is missing"),
    ],
)
def test_load_counts_what_is_wrong(kind: str, answer: bytes, error: str) -> None:
    """A refusal, a cut answer, another one, a stream without its end, one that lost chunks."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(1 << 16)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        found = load(kind, server.getsockname()[1], connections=1, seconds=0.0, warm=0.0)
        thread.join()
    assert (found.errors, found.error) == (1, error)


@compiled
@pytest.mark.parametrize("kind", ["silent", "stream"])
def test_stub_tells_when_a_client_has_left(kind: str) -> None:
    """Whether it had said something or nothing; who stays until the end has not left."""
    with stub() as port:
        took = leave_once(Peer(DIRECT, port, port), f"{kind}-1")
        seen = tagged(port)[f"{kind}-1"]
    assert 0 < seen.arrived < seen.closed and 0 < took < 10


@compiled
def test_engine_of_the_bench_becomes_the_stub(tmp_path: Path) -> None:
    """What vllmd runs as `vllm serve` has its name and socket."""
    environment(tmp_path)
    uds = tmp_path / "s"
    words = ["serve", "model", "--served-model-name", "alpha", "--uds", str(uds)]
    with subprocess.Popen([tmp_path / "bin/vllm", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == f"socket {uds}\n"
            assert b'"id":"alpha"' in fetch(uds, "/v1/models")[1]
        finally:
            process.terminate()
    assert not uds.exists()


@compiled
@pytest.mark.parametrize("name", [ALONE, VLLMD])
def test_gateway_serves_the_bench(name: str) -> None:
    """Requests, streams and clients that leave, through all that stands between them and the stub."""
    with peers([name]) as [peer]:
        plain = load("plain", peer.port, peer.key, connections=2, seconds=0.2, warm=0.0)
        streams = load("stream", peer.port, peer.key, connections=2, chunks=3)
        assert (plain.errors, streams.errors, streams.chunks) == (0, 0, 6) and plain.requests > 0
        assert leave_once(peer, "silent-1") < GIVEN_UP and memory(peer) > 0


def test_router_that_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark goes on without it, with what pip said last."""

    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr=b"Looking\nERROR: no such package\n")

    monkeypatch.setattr(router, "kept", lambda: tmp_path)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(router.NotHadError, match=r"cannot install vllm-router .*: ERROR: no such package"):
        router.command()
