"""Engines are started, and ended with all that belongs to them: real children, none left."""

import asyncio
import contextlib
import mmap
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from tests.children import LIMIT, Engine, Start, make_launch, start, stranger, subreaper, wait_for
from vllmd.edge import procfs, strays, tree
from vllmd.edge.kill import end_marked, end_runaways, kill_tree
from vllmd.edge.leftovers import shared_files
from vllmd.edge.process import adopt, environment, spawn
from vllmd.edge.tasks import in_thread

__all__ = ["start", "stranger", "subreaper"]  # fixtures

# -- spawning ---------------------------------------------------------------------------------------------------------


async def test_a_child_leads_its_own_session_and_reads_nothing(start: Start) -> None:
    """Own session and group, standard input empty, files private."""
    engine = await start("say(os.getsid(0) == os.getpgrp() == os.getpid(), len(os.read(0, 1)), oct(os.umask(0)))")
    assert await engine.line() == "True 0 0o77"


async def test_a_child_ignores_and_blocks_no_signal(start: Start) -> None:
    """What the daemon ignores or blocks is its own affair, and is as before afterwards."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        engine = await start('say(*[l.split()[1] for l in open("/proc/self/status") if l[:6] in ("SigBlk", "SigIgn")])')
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGINT, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    # The C library keeps signals 32 and 33 for itself: who started us may have left these as they are.
    ours = sum(1 << number - 1 for number in signal.valid_signals())
    blocked, ignored = (int(word, 16) & ours for word in (await engine.line()).split())
    python_ignores = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
    assert (blocked, ignored & ~python_ignores) == (0, 0)


def test_the_environment_is_chosen(tmp_path: Path) -> None:
    """Paths, proxies, HF_ and NCCL_ pass; the daemon's ties to systemd, its Python and VLLM_PORT do not."""
    own = dict.fromkeys(
        ["PATH", "HOME", "HF_TOKEN", "LC_ALL", "https_proxy", "NCCL_DEBUG", "NOTIFY_SOCKET", "WATCHDOG_USEC",
         "LISTEN_FDS", "CREDENTIALS_DIRECTORY", "VIRTUAL_ENV", "PYTHONPATH", "VLLM_PORT", "SECRET"], "own",
    )  # fmt: skip
    env = environment(make_launch("", tmp_path, env={"PATH": "theirs", "X": "1"}, cookie="c"), own)
    kept = {"HOME": "own", "HF_TOKEN": "own", "LC_ALL": "own", "https_proxy": "own", "NCCL_DEBUG": "own"}
    assert env == kept | {"PATH": "theirs", "X": "1", "VLLMD_COOKIE": "c", "SPT_NOENV": "1"}


async def test_what_cannot_be_executed_raises(tmp_path: Path) -> None:
    """No child, an OSError at once."""
    with pytest.raises(FileNotFoundError):
        spawn(make_launch("", tmp_path, argv=(str(tmp_path / "none"),)), log_fd=1, cwd=tmp_path)


# -- the end ----------------------------------------------------------------------------------------------------------


async def test_wait_tells_the_exit_code_to_all_who_wait(start: Start) -> None:
    """The status is the code, and stays known."""
    engine = await start("sys.exit(3)")
    assert list(await asyncio.gather(engine.child.wait(), engine.child.wait())) == [3, 3]
    assert await engine.child.wait() == 3


async def test_wait_tells_a_signal_as_a_negative_number(start: Start) -> None:
    """SIGKILL from somebody else is -9."""
    engine = await (await start("stay()")).until_up()
    os.kill(engine.child.pid, signal.SIGKILL)
    assert await engine.child.wait() == -9


async def test_an_ended_leader_keeps_its_number_until_its_tree_is_killed(start: Start) -> None:
    """The zombie pins pid, group and session, so that killpg cannot reach strangers."""
    engine = await start("sys.exit(0)")
    await engine.child.wait()
    stat = procfs.read_stat(engine.child.pid)
    assert stat is not None and stat.dead
    assert not procfs.alive(engine.child.leader)
    await kill_tree(engine.child)
    assert procfs.read_stat(engine.child.pid) is None
    assert engine.child.status == 0


async def test_an_adopted_process_is_seen_to_end_without_a_status(start: Start, tmp_path: Path) -> None:
    """A leader that is not our child: its end is seen; its exit code the kernel tells only of late, and a kill is none."""
    engine = await start("runaway_pid = child(stubborn); say(runaway_pid); stay()")
    pid = int(await engine.line())
    stat = procfs.read_stat(pid)
    assert stat is not None
    launch = make_launch("", tmp_path)
    gone = adopt(procfs.Member(pid, "", stat.member.start + 1), launch)
    assert gone.ended and gone.pidfd < 0
    adopted = adopt(procfs.Member(pid, "", stat.member.start), launch)
    assert not adopted.ended
    waiting = asyncio.gather(adopted.wait())
    assert await kill_tree(adopted) == ()
    assert list(await asyncio.wait_for(waiting, LIMIT)) == [None]
    adopted.close()


async def test_terminate_reaches_the_leader_alone(start: Start) -> None:
    """SIGTERM to the engine's other processes would break its drain."""
    engine = await start(
        'def told(ready): signal.signal(signal.SIGTERM, lambda *_: say("child told")); ready()\n'
        'child(told); signal.signal(signal.SIGTERM, lambda *_: (say("told"), os._exit(0))); stay()'
    )
    await engine.until_up()
    assert engine.child.terminate()
    assert await engine.line() == "told"
    await engine.child.wait()
    assert not engine.child.terminate()
    await kill_tree(engine.child)
    assert (await engine.reader.read()) == b""


# -- killing ----------------------------------------------------------------------------------------------------------


async def test_nothing_of_a_tree_is_left(start: Start, stranger: "subprocess.Popen[bytes]", subreaper: None) -> None:
    """Leader killed by somebody; an engine in the session, one in its own that ignores SIGTERM, a double fork: all end.
    A stranger does not."""
    engine = await (await start("child(engine); child(stubborn); child(runaway); stay()")).until_up()
    os.kill(engine.child.pid, signal.SIGKILL)
    await engine.child.wait()
    assert await kill_tree(engine.child) == ()
    assert await engine.nobody_left()
    assert stranger.poll() is None


async def test_a_killed_tree_leaves_no_zombies(start: Start, subreaper: None) -> None:
    """Orphans become ours when their parents die, and are reaped, those that had died before included."""
    engine = await (await start("child(engine); child(stubborn); child(runaway); stay()")).until_up()
    os.kill(engine.child.pid, signal.SIGKILL)
    await engine.child.wait()
    await kill_tree(engine.child)
    assert not [stat for stat in procfs.read_table().values() if stat.ppid == os.getpid()]


async def test_what_left_without_a_mark_is_known_from_before(start: Start) -> None:
    """A process that dropped session, parent and environment is killed if an earlier look saw it."""
    code = """
def bare(ready):
    os.setsid()
    middle = os.fork()
    ready()
    if middle: signal.pause()
    os.setsid()
    program = "import signal, os; os.write(1, b'bare '); signal.pause()"
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", program], {})
say(child(bare)); stay()
"""
    engine = await start(code)
    words = (await asyncio.wait_for(engine.reader.readuntil(b"bare "), LIMIT)).split()
    middle = int(next(word for word in words if word.isdigit()))
    known = tree.fast_members(engine.child.leader)
    os.kill(middle, signal.SIGKILL)
    await wait_for(lambda: len(tree.fast_members(engine.child.leader)) == 1)
    assert len(tree.fast_members(engine.child.leader, known)) == 2
    assert await kill_tree(engine.child, known) == ()
    assert await engine.nobody_left()


async def test_processes_that_are_replaced_are_ended(start: Start) -> None:
    """Looks are repeated until two in a row find none: here keepers start a new child for each that is killed."""
    code = """
def keeper(ready):
    os.setsid(); ready()
    while True:
        if os.fork() == 0: os.setsid(); signal.pause()
        os.wait()
for _ in range(4): child(keeper)
stay()
"""
    engine = await (await start(code)).until_up()
    assert await kill_tree(engine.child) == ()
    assert await engine.nobody_left()


async def test_leftovers_are_removed_unless_somebody_uses_them(start: Start, tmp_path: Path) -> None:
    """Shared memory and semaphores of the engine go; what another process maps, and names that no engine gives, stay.
    The scratch directory and the socket go."""
    tag = uuid4().hex
    paths = [Path("/dev/shm") / f"{kind}{tag}" for kind in ("psm_", "psm_used_", "sem.mp-", "weights_")]
    scratch, endpoint = tmp_path / "scratch", tmp_path / "m.sock"
    (scratch / "deep").mkdir(parents=True)
    code = f"""
import mmap, socket
held = []
for path in {[str(p) for p in paths]}:
    fd = os.open(path + ".new", os.O_RDWR | os.O_CREAT, 0o600)
    os.link(path + ".new", path); os.unlink(path + ".new")  # as glibc makes a semaphore
    os.ftruncate(fd, 4096)
    held.append(mmap.mmap(fd, 4096))
    os.close(fd)
s = socket.socket(socket.AF_UNIX); s.bind({str(endpoint)!r})
stay()
"""
    code = code.replace("import mmap", 'sys.path.append(os.path.dirname(os.__file__) + "/lib-dynload"); import mmap')
    try:
        engine = await (await start(code, scratch=str(scratch), endpoint=f"unix:{endpoint}")).until_up()
        assert shared_files([engine.child.pid]) == frozenset(paths[:3])
        with paths[1].open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
            file.close()
            await kill_tree(engine.child)
        assert [path.exists() for path in paths] == [False, True, False, True]
        assert not scratch.exists() and not endpoint.exists() and not list(tmp_path.iterdir())
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


async def test_marked_processes_are_swept_and_others_are_not(start: Start) -> None:
    """A prefix of the cookie finds what a killed daemon left; another daemon's engines stay."""
    tag = uuid4().hex
    ours = await (await start("child(stubborn); stay()", cookie=f"{tag}-a-1")).until_up()
    theirs = await (await start("stay()", cookie=f"x{tag}-a-1")).until_up()
    assert {cookie for _, cookie in tree.find_marked(tag)} == {f"{tag}-a-1"}
    assert len(tree.find_marked(tag)) == 2
    assert await end_marked(tag) == ()
    assert await ours.nobody_left()
    assert procfs.alive(theirs.child.leader)


async def test_a_look_that_hangs_is_given_up() -> None:
    """A thread that a driver holds does not hold us."""
    release = threading.Event()
    try:
        assert await in_thread(lambda: str(release.wait(LIMIT)), 0.01, "given up") == "given up"
    finally:
        release.set()


# -- runaways ---------------------------------------------------------------------------------------------------------

# Another session, no parent, no environment: as `env -i setsid` with a double fork.
BARE = """
def bare(ready):
    os.setsid()
    if os.fork(): os._exit(0)
    os.setsid()
    {shed}
    program = "import signal, os; {hold}; os.write(1, b'bare %d\\\\n' % os.getpid()); {close}; signal.pause()"
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", program], {env})
def run(ready):
    if os.fork() == 0: bare(ready)
    ready()
child(run); time.sleep(0.05)
stay()
"""


def bare(*, chdir: bool = True, env: str = "{}", close: bool = False, hold: str = "pass") -> str:
    """A runaway that has changed its directory, has this environment, and writes nowhere any more."""
    shed, closing = 'os.chdir("/")' if chdir else "pass", "os.closerange(0, 3)" if close else "pass"
    return BARE.format(shed=shed, env=env, close=closing, hold=hold)


async def runaway(engine: Engine) -> procfs.Member:
    """The process, once it says who it is, and is ours."""
    found: list[procfs.Member] = []
    while not found:
        word, _, pid = (await engine.line()).partition(" ")
        if word == "bare" and (stat := procfs.read_stat(int(pid))) is not None:
            found = [stat.member]
    await wait_for(lambda: (stat := procfs.read_stat(found[0].pid)) is not None and stat.ppid == os.getpid())
    return found[0]


async def test_what_shed_everything_is_ended_with_the_only_engine_that_can_have_made_it(
    start: Start, subreaper: None
) -> None:
    """No session, parent, cookie, directory or log is left of its engine: it is a child of ours that nobody else made."""
    engine = await start(bare(close=True))
    gone = await runaway(engine)
    assert await kill_tree(engine.child) == ()
    assert not procfs.alive(gone)


@pytest.mark.parametrize("kept", ["directory", "TMPDIR", "log"])
async def test_what_it_could_not_shake_off_tells_whose_it_is(
    start: Start, subreaper: None, tmp_path: Path, kept: str
) -> None:
    """With two engines: the right one takes it along, the other does not."""
    scratch, log = tmp_path / "scratch", tmp_path / "log"
    scratch.mkdir()
    other = await (await start("stay()", scratch=str(tmp_path / "other"))).until_up()
    code = bare(
        chdir=kept != "directory",
        env=f'{{"TMPDIR": {str(scratch)!r}}}' if kept == "TMPDIR" else "{}",
        hold=f"f = open('{log}', 'a')" if kept == "log" else "pass",
    )
    engine = await start(f"os.chdir({str(scratch)!r})\n" + code, scratch=str(scratch))
    log.touch()
    engine.child.log = log.stat().st_dev, log.stat().st_ino  # in these tests it writes to a pipe
    gone = await runaway(engine)
    assert strays.doubtful(other.child) == ()
    assert await kill_tree(other.child) == ()
    assert procfs.alive(gone)
    assert await kill_tree(engine.child) == ()
    assert not procfs.alive(gone)


async def test_where_doubt_remains_it_is_told_and_ended_with_the_last(start: Start, subreaper: None) -> None:
    """Either of two engines may have made it: it outlives the first, is named, and ends with the second."""
    first = await (await start("stay()")).until_up()
    engine = await start(bare(close=True))
    doubt = await runaway(engine)
    assert await kill_tree(engine.child) == ()
    assert procfs.alive(doubt)
    assert strays.doubtful(engine.child) == (doubt.pid,)
    engine.child.close()
    assert await kill_tree(first.child) == ()
    assert not procfs.alive(doubt)


async def test_at_the_end_no_runaway_is_left_and_our_own_children_are(
    start: Start, subreaper: None, tmp_path: Path
) -> None:
    """Whosever they were. An engine that we lead, and a child in our own session, are none."""
    engine = await start(bare(close=True))
    gone = await runaway(engine)
    with subprocess.Popen(["sleep", "600"]) as helper:
        assert await end_runaways() == ()
        assert not procfs.alive(gone)
        assert procfs.alive(engine.child.leader)
        assert helper.poll() is None
        helper.kill()


async def test_an_adopted_engines_runaway_is_known_by_its_log(start: Start, tmp_path: Path) -> None:
    """It does not come to us: who writes to the log, or has the scratch directory as its TMPDIR, is its. A reader is not."""
    log = tmp_path / "a.log"
    log.touch()
    engine = await (await start("stay()")).until_up()
    adopted = adopt(engine.child.leader, make_launch("", tmp_path, scratch=str(tmp_path / "s")), log=log)
    codes = {"writer": f"f = open({str(log)!r}, 'a')", "reader": f"f = open({str(log)!r})", "other": "pass"}
    with contextlib.ExitStack() as stack:
        pids = {}
        for name, code in codes.items():
            program = [
                sys.executable,
                "-I",
                "-S",
                "-c",
                f"import time; {code}; print('up', flush=True); time.sleep(600)",
            ]
            process = stack.enter_context(subprocess.Popen(program, stdout=subprocess.PIPE, start_new_session=True))
            assert process.stdout is not None and process.stdout.readline() == b"up\n"
            pids[name] = process.pid
            stack.callback(process.kill)
        table = {pid: replace(stat, ppid=1) for pid, stat in procfs.read_table().items()}
        assert strays.strays_of(adopted, table) == {pids["writer"]}
    adopted.close()
