"""Who belongs to an engine, whose death is told, its cgroup, and who listens at its endpoint."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.children import LIMIT, Start, start, stranger, subreaper, wait_for
from vllmd.edge import cgroup, procfs, tree
from vllmd.edge.kill import kill_tree
from vllmd.edge.listener import connections, listener_owner
from vllmd.edge.procfs import Member, Stat

__all__ = ["start", "stranger", "subreaper"]  # fixtures

# -- membership -------------------------------------------------------------------------------------------------------


def stat(pid: int, ppid: int, session: int, start: int, *, dead: bool = False) -> Stat:
    return Stat(Member(pid, "x", start), ppid, session, session, dead)


def pids_of(*stats: Stat, leader: Member, known: tuple[Member, ...] = ()) -> set[int]:
    table = {entry.member.pid: entry for entry in stats}
    return {member.pid for member in tree.fast_members(leader, known, table=table)}


def test_a_zombie_counts_as_dead() -> None:
    """Only live processes are members; the orphans of a dead leader are."""
    stats = stat(70, 1, 70, 5, dead=True), stat(71, 70, 70, 6), stat(72, 70, 70, 6, dead=True), stat(73, 71, 73, 7)
    assert pids_of(*stats, leader=Member(70, "x", 5)) == {71, 73}


def test_a_stranger_with_our_old_number_is_not_ours() -> None:
    """Another process at the leader's pid: its session is not ours, whatever the number."""
    stats = stat(70, 1, 70, 9), stat(71, 70, 70, 10), stat(72, 1, 72, 8)
    assert pids_of(*stats, leader=Member(70, "x", 5), known=(Member(72, "x", 8),)) == {72}


def test_a_remembered_number_given_to_somebody_else_is_not_ours() -> None:
    """Known members are believed only with their start time."""
    assert pids_of(stat(72, 1, 72, 8), leader=Member(70, "x", 5), known=(Member(72, "x", 7),)) == set()


def test_a_name_may_hold_anything() -> None:
    """The last parenthesis of /proc/PID/stat ends the name; a dead leader thread with others alive is not dead."""
    tail = "1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 {threads} 0 99 0"
    living = Stat(Member(7, "a) R (b", 99), 1, 7, 7, dead=False)
    assert procfs.parse_stat(f"7 (a) R (b) Z {tail.format(threads=3)}") == living
    assert procfs.parse_stat(f"7 (a) Z {tail.format(threads=1)}").dead


# -- watching ---------------------------------------------------------------------------------------------------------


async def test_the_death_of_an_engine_process_is_told_once(start: Start, subreaper: None) -> None:
    """Not that of a compiler. The title counts even if it was given after the look."""
    code = """
def late(ready):
    signal.signal(signal.SIGUSR1, lambda *_: (title("VLLM::Worker"), say("titled")))
    ready()
    while True: signal.pause()
say(child(lambda ready: ready()), child(engine), child(late))
stay()
"""
    engine = await start(code)
    helper, core, late = map(int, (await engine.line()).split())
    await engine.until_up()
    died: asyncio.Queue[Member] = asyncio.Queue()
    watch = tree.TreeWatch(engine.child.leader, died.put_nowait)
    try:
        assert {member.pid for member in watch.ready()} == {engine.child.pid, helper, core, late}
        os.kill(late, signal.SIGUSR1)
        assert await engine.line() == "titled"
        os.kill(helper, signal.SIGKILL)
        await wait_for(lambda: helper not in {member.pid for member in watch.known})
        assert died.empty()
        os.kill(late, signal.SIGKILL)
        assert (await asyncio.wait_for(died.get(), LIMIT)).pid == late
        os.kill(core, signal.SIGKILL)
        await wait_for(lambda: {member.pid for member in watch.known} == {engine.child.pid})
        assert died.empty()
    finally:
        watch.close()


async def test_without_titles_the_leaders_executable_marks_an_engine(start: Start) -> None:
    """Where nobody bears vLLM's title at ready, every process of the same program counts."""
    engine = await start("say(child(lambda ready: ready())); stay()")
    core = int(await engine.line())
    died: asyncio.Queue[Member] = asyncio.Queue()
    watch = tree.TreeWatch(engine.child.leader, died.put_nowait)
    watch.ready()
    os.kill(core, signal.SIGKILL)
    assert (await asyncio.wait_for(died.get(), LIMIT)).pid == core
    watch.close()


# -- cgroups ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_cgroup() -> Iterator[Path]:
    """An empty cgroup v2 directory of our own."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup2"]
    own = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    path = cgroup.make(Path(mounts[0] + own[0]), f"vllmd-test-{os.getpid()}") if mounts and own else None
    if path is None or not os.access(path / "cgroup.kill", os.W_OK):
        pytest.skip("no cgroup v2 that we may write to")
    yield path
    cgroup.remove(path)


async def test_a_child_is_born_in_its_cgroup_and_ends_with_it(start: Start, real_cgroup: Path) -> None:
    """It runs there from its first instruction, under its own argv; killing its tree removes the cgroup."""
    engine = await (await start("child(stubborn); stay()", cgroup=real_cgroup)).until_up()
    assert len(cgroup.pids(real_cgroup)) == 2
    assert Path(f"/proc/{engine.child.pid}/cmdline").read_bytes().startswith(sys.executable.encode() + b"\0-I\0")
    assert await kill_tree(engine.child) == ()
    assert await engine.nobody_left()
    assert not real_cgroup.exists()


async def test_a_cgroup_that_is_gone_does_not_hinder_the_start(start: Start, tmp_path: Path) -> None:
    """The shell complains into the log and becomes the engine all the same."""
    engine = await start("stay()", cgroup=tmp_path / "none")
    assert "cgroup.procs" in await engine.line()
    await engine.until_up()


def test_only_a_delegated_directory_is_used(tmp_path: Path) -> None:
    """systemd marks what it gives by an extended attribute; the daemon may be one level below."""
    unit = tmp_path / "mount" / "vllmd.service"
    (unit / "supervisor").mkdir(parents=True)
    (unit / "cgroup.procs").touch()
    own = tmp_path / "own"
    own.write_text("1:cpu:/\n0::/vllmd.service/supervisor\n")
    assert cgroup.delegated_root(tmp_path / "mount", own) is None
    try:
        os.setxattr(unit, "user.delegate", b"1")
    except OSError:
        pytest.skip("no extended attributes here")
    assert cgroup.delegated_root(tmp_path / "mount", own) == unit


def test_the_memory_of_a_cgroup_is_read_if_counted(tmp_path: Path) -> None:
    """Bytes now and at most, and the kernel's kills; None without the controller."""
    assert cgroup.memory(tmp_path) is None
    (tmp_path / "memory.current").write_text("4096\n")
    (tmp_path / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    assert cgroup.memory(tmp_path) == cgroup.Memory(4096, None, 2)


# -- listeners --------------------------------------------------------------------------------------------------------


def test_the_owner_of_a_unix_socket_is_told(tmp_path: Path) -> None:
    """Whoever called listen(); None while nobody does."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        assert listener_owner(f"unix:{path}", []) is None
        sock.listen()
        assert listener_owner(f"unix:{path}", []) == frozenset({os.getpid()})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_owner_of_a_port_is_told_among_those_asked_for(host: str, stranger: "subprocess.Popen[bytes]") -> None:
    """Ours: its pid. Somebody else's: nobody. Nobody's: None."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        try:
            sock.bind((host, 0))
        except OSError:
            pytest.skip(f"no {host} here")
        name = f"[{host}]" if ":" in host else host
        endpoint = f"http://{name}:{sock.getsockname()[1]}"
        assert listener_owner(endpoint, [os.getpid()]) is None
        sock.listen()
        assert listener_owner(endpoint, [os.getpid(), stranger.pid]) == frozenset({os.getpid()})
        assert listener_owner(endpoint, [stranger.pid]) == frozenset()


async def test_a_port_shared_with_a_stranger_is_not_ours(start: Start) -> None:
    """With SO_REUSEPORT both would get connections."""
    code = """
sys.path.append(os.path.dirname(os.__file__) + "/lib-dynload"); import socket
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
s.bind(("127.0.0.1", int(os.environ["PORT"]))); s.listen(); stay()
"""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        other = await (await start(code, env={"PORT": str(port)})).until_up()
        endpoint = f"http://127.0.0.1:{port}"
        assert listener_owner(endpoint, [os.getpid()]) == frozenset()
        assert listener_owner(endpoint, [os.getpid(), other.child.pid]) == frozenset({os.getpid(), other.child.pid})


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_connected_clients_are_counted(tmp_path: Path, kind: str) -> None:
    """A drained engine is ended once nobody is connected: each client counts until it has gone."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as server:
        server.bind(str(path) if kind == "unix" else ("127.0.0.1", 0))
        server.listen()
        endpoint = f"unix:{path}" if kind == "unix" else f"http://127.0.0.1:{server.getsockname()[1]}"
        assert connections(endpoint) == 0
        with socket.socket(server.family) as client:
            client.connect(server.getsockname())
            accepted, _ = server.accept()
            assert connections(endpoint) == 1
        accepted.close()
        assert connections(endpoint) == 0
