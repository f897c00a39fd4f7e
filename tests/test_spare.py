"""A parked process becomes what a plain start would have been, or leaves it to one: real processes, a small engine."""

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.children import LIMIT, subreaper, wait_for
from tests.fake.environment import install
from tests.fake.make_model import make_model
from vllmd.edge import procfs, spare
from vllmd.edge.kill import end_marked, kill_tree
from vllmd.edge.process import Child, spawn
from vllmd.edge.spare import PROGRAM, Spares, interpreter_of
from vllmd.edge.tree import COOKIE, find_marked
from vllmd.facts import Launch

__all__ = ["subreaper"]  # fixture

ROOT = Path(__file__).parent.parent

#: An engine that tells everything about itself that anybody could see, and what its import found.
SLOW = """
import os, sys, tempfile
from pathlib import Path
print("importing")
MODE = os.environ.get("ENGINE_MODE")
os.environ.get("VLLM_LOOKED_AT")
os.environ["ENGINE_SET"] = "by the import"
FOLDER = tempfile.gettempdir() + "/cache"
WHERE = Path(tempfile.gettempdir())
HERE = os.getcwd()
BEGUN = list(sys.argv)
"""
MAIN = """
import sys
def main():
    import engine.slow
    from engine.tell import tell
    tell(sys.modules["__main__"])
"""
TELL = """
import json, os, signal, stat, sys, tempfile, threading
from pathlib import Path
import engine.slow as slow
def tell(main):
    me = Path("/proc/self")
    fds = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in range(50) if os.path.lexists(f"/proc/self/fd/{fd}")}
    status = (me / "status").read_text().splitlines()
    print(json.dumps({
        "argv": sys.argv, "orig_argv": sys.orig_argv, "executable": sys.executable, "path": sys.path,
        "environ": dict(os.environ), "cwd": os.getcwd(), "umask": os.umask(0o77),
        "session": [os.getsid(0) - os.getpid(), os.getpgrp() - os.getpid(), os.getppid()],
        "cmdline": (me / "cmdline").read_bytes().decode(), "shown": (me / "environ").read_bytes().decode().split("\\0"),
        "name": (me / "comm").read_text(), "exe": os.readlink("/proc/self/exe"),
        "signals": [line for line in status if line.startswith(("SigBlk", "SigIgn", "SigCgt"))],
        "fds": fds, "threads": threading.active_count(), "children": sorted(os.popen("env").read().split("\\n")),
        "main": [main.__name__, main.__file__, main.__spec__, type(main.__loader__).__name__, sorted(vars(main))],
        "import": [slow.MODE, slow.FOLDER, str(slow.WHERE), slow.HERE], "temporary": tempfile.gettempdir(),
    }), flush=True)
    action = sys.argv[2:]
    if action == ["fail"]:
        raise RuntimeError("no")
    if action == ["stay"]:
        signal.pause()
    sys.exit(3)
"""


class Bench:
    """An engine's environment, its spares, and launches of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "scratch"
        self.package = folder / "env" / "bin" / "engine"
        self.package.mkdir(parents=True)
        self.root.mkdir()
        self.script = folder / "env" / "bin" / "serve-engine"
        self.script.write_text(
            f"#!{sys.executable}\nimport re\nimport sys\nfrom engine.cli import main\n"
            'if __name__ == "__main__":\n    sys.argv[0] = re.sub("x^", "", sys.argv[0])\n    sys.exit(main())\n'
        )
        self.script.chmod(0o755)
        for name, text in {"__init__": "", "cli": MAIN, "slow": SLOW, "tell": TELL}.items():
            (self.package / f"{name}.py").write_text(text)
        self.mark = f"test-{uuid4().hex}"
        self.spares = Spares(self.root, self.mark)
        self.children: list[Child] = []
        self.env = {"ENGINE_MODE": "one", "TMPDIR": "", "VLLM_RPC_BASE_PATH": ""}
        self._launches = 0

    def launch(self, *words: str, executable: Path | None = None, **env: str) -> Launch:
        """The next launch of this engine, with its directory."""
        self._launches += 1
        scratch = self.root / f"m-{self._launches}"
        scratch.mkdir()
        own = {"TMPDIR": str(scratch), "VLLM_RPC_BASE_PATH": str(scratch)}
        return Launch(
            argv=(str(executable or self.script), "serve", *words), env={**self.env, **own, **env},
            endpoint="http://127.0.0.1:1", served_name="m", scratch=str(scratch),
            cookie=f"{self.mark}:m:{self._launches}",
        )  # fmt: skip

    def log(self, launch: Launch) -> Path:
        return self.folder / f"{Path(launch.scratch).name}.log"

    def run(self, start: Callable[..., Any], launch: Launch, **options: Any) -> Any:
        """`start` is spawn or take; the log as the daemon opens it."""
        fd = os.open(self.log(launch), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            child = start(launch, log_fd=fd, cwd=Path(launch.scratch), **options)
        finally:
            os.close(fd)
        if isinstance(child, Child):
            self.children.append(child)
        return child

    def take(self, launch: Launch, **options: Any) -> Child | str:
        taken: Child | str = self.run(self.spares.take, launch, **options)
        return taken

    async def park(self, executable: Path | None = None) -> int:
        """A spare that has imported; its pid."""
        command = str(executable or self.script)
        assert self.spares.prepare(command, self.env) == ""
        parked = self.spares._parked[command]
        await wait_for(lambda: parked.look() != spare.IMPORTING)
        return parked.child.pid

    async def told(self, child: Child | str, launch: Launch) -> dict[str, Any]:
        """What the engine says of itself."""
        assert isinstance(child, Child), child
        found: list[dict[str, Any]] = []

        def read() -> bool:
            lines = self.log(launch).read_text().splitlines(keepends=True)
            found.extend(json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n"))
            stat = procfs.read_stat(child.pid)
            return bool(found) or stat is None or stat.dead

        await wait_for(read)
        assert found or (read() and found), self.log(launch).read_text()
        return found[0]

    async def end(self) -> None:
        for child in self.children:
            if child.pidfd >= 0:
                assert await kill_tree(child) == ()
                child.close()
        await self.spares.drop()
        left = find_marked(self.mark)
        await end_marked(self.mark)
        assert left == ()
        assert self.spares.pids() == frozenset() and not list(self.root.glob("spare*"))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    await made.end()


# -- the same as a plain start ----------------------------------------------------------------------------------------


async def test_what_it_becomes_cannot_be_told_from_a_plain_start(bench: Bench) -> None:
    """Arguments, environment, directory, session, name, descriptors, signals, __main__, what the import made of the
    temporary directory: in the process, and as /proc shows it. Its pid is the parked one's; our child."""
    seen = []
    for number in range(2):
        launch = bench.launch("model", "--flag", "ä b", VLLM_MORE=f"{number}")
        pid = await bench.park() if number else 0
        child = bench.take(launch) if number else bench.run(spawn, launch)
        told = await bench.told(child, launch)
        assert isinstance(child, Child)
        assert await asyncio.wait_for(child.wait(), LIMIT) == 3
        assert not pid or child.pid == pid
        assert (child.cookie, child.endpoint, child.scratch) == (launch.cookie, launch.endpoint, launch.scratch)
        assert child.leader.name == "serve-engine"
        text = json.dumps(told).replace(launch.scratch, "SCRATCH").replace(launch.cookie, "COOKIE")
        text = text.replace(str(bench.log(launch)), "LOG")
        seen.append((json.loads(text.replace(f"VLLM_MORE={number}", "")), bench.log(launch).read_text().split("{")[0]))
    plain, taken = seen
    taken[0]["environ"].pop("VLLM_MORE"), plain[0]["environ"].pop("VLLM_MORE")
    # Python may itself add to what it was given (LC_CTYPE); the order in memory is nobody's business.
    assert taken[0].pop("shown") == plain[0].pop("shown")
    assert taken[0] == plain[0]
    assert taken == plain
    assert plain[0]["import"] == ["one", "SCRATCH/cache", "SCRATCH", "SCRATCH"]
    assert taken[1] == "importing\n"


async def test_an_engine_that_fails_does_so_as_it_would(bench: Bench) -> None:
    """Its traceback in the log, exit status 1."""
    launch = bench.launch("fail")
    await bench.park()
    child = bench.take(launch)
    assert isinstance(child, Child)
    assert await asyncio.wait_for(child.wait(), LIMIT) == 1
    assert bench.log(launch).read_text().endswith("RuntimeError: no\n")


async def test_it_enters_the_cgroup_first(bench: Bench, tmp_path: Path) -> None:
    """By writing 0, which means oneself. One that cannot be entered is said, and no more."""
    group = tmp_path / "group"
    group.mkdir()
    (group / "cgroup.procs").touch()
    await bench.park()
    launch = bench.launch()
    child = bench.take(launch, cgroup=group)
    assert isinstance(child, Child) and child.cgroup == group
    await bench.told(child, launch)
    assert (group / "cgroup.procs").read_text() == "0"
    child.cgroup = None  # it is none
    await bench.park()
    launch = bench.launch()
    child = bench.take(launch, cgroup=tmp_path / "none")
    await bench.told(child, launch)
    assert "cannot enter" in bench.log(launch).read_text()
    assert isinstance(child, Child)
    child.cgroup = None


async def test_the_whole_tree_of_a_fake_engine(bench: Bench, tmp_path: Path) -> None:
    """Taken, it loads, serves, and ends by SIGTERM like any other; nothing of it is left."""
    command = install(tmp_path / "fake")
    model = str(make_model(tmp_path / "model"))
    bench.env |= {"FAKE_START_S": "0.05", "FAKE_TOTAL": str(1 << 30)}
    await bench.park(command)
    launch = bench.launch(model, "--uds", str(tmp_path / "s"), executable=command)
    child = bench.take(launch)
    assert isinstance(child, Child), child
    await wait_for(lambda: "Application startup complete" in bench.log(launch).read_text())
    names = {stat.member.name for stat in procfs.read_table().values() if stat.session == child.pid}
    assert {"vllm", "VLLM::EngineCor", "VLLM::Worker"} <= names
    assert child.terminate()
    assert await asyncio.wait_for(child.wait(), LIMIT) == 0


# -- when it is not used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ENGINE_MODE": "two"}, "differs in ENGINE_MODE, which is read at import"),
        ({"VLLM_LOOKED_AT": "1"}, "differs in VLLM_LOOKED_AT, which is read at import"),
        ({"ENGINE_SET": "by us"}, "differs in ENGINE_SET, which is read at import"),
        ({"OMP_NUM_THREADS": "2"}, "differs in OMP_NUM_THREADS"),
        ({"LD_PRELOAD": "/lib/x.so"}, "differs in LD_PRELOAD"),
        ({"LONG": "x" * 2 * spare.ROOM}, "differs in LONG"),
        ({"VLLM_LONG": "x" * 2 * spare.ROOM}, "too long"),
        ({"VLLM_ANY": "1", "CUDA_VISIBLE_DEVICES": "GPU-1", "HF_TOKEN": "t"}, ""),
    ],
)
async def test_only_what_the_import_cannot_have_seen_may_differ(bench: Bench, change: dict[str, str], why: str) -> None:
    """Any other difference is named, and the spare waits on for a launch that fits."""
    pid = await bench.park()
    launch = bench.launch(**change)
    taken = bench.take(launch)
    if not why:
        assert change.items() <= (await bench.told(taken, launch))["environ"].items()
        return
    assert isinstance(taken, str) and taken.endswith(why)
    assert "x" * 20 not in taken
    fitting = bench.launch()
    child = bench.take(fitting)
    assert isinstance(child, Child) and child.pid == pid
    assert set((await bench.told(child, fitting))["fds"]) == {"0", "1", "2"}


async def test_a_variable_that_the_launch_has_not_is_gone(bench: Bench) -> None:
    """Also for what asks the C library."""
    bench.env |= {"HF_TOKEN": "of the last one"}
    await bench.park()
    del bench.env["HF_TOKEN"]
    launch = bench.launch()
    told = await bench.told(bench.take(launch), launch)
    assert "HF_TOKEN" not in told["environ"] and "HF_TOKEN" not in str(told["children"])


async def test_help_is_left_to_a_plain_start(bench: Bench) -> None:
    """vLLM looks for it in its arguments while it imports."""
    await bench.park()
    assert "--help" in str(bench.take(bench.launch("--help=ModelConfig")))


@pytest.mark.parametrize("what", ["edited", "package", "directory"])
async def test_an_installation_that_has_changed_is_imported_anew(bench: Bench, what: str) -> None:
    """A file of the engine written to in place, a package put beside it; then another spare is parked. So is a launch without
    its directory refused."""
    pid = await bench.park()
    launch = bench.launch()
    match what:
        case "edited":
            before = (bench.package / "slow.py").stat()
            with (bench.package / "slow.py").open("a") as file:
                file.write("EDITED = 1\n")
            os.utime(bench.package, ns=(before.st_mtime_ns, before.st_mtime_ns))
        case "package":
            (bench.package.parent / "another").mkdir()
        case _:
            Path(launch.scratch).rmdir()
    why = "No such file" if what == "directory" else "has changed since it was imported"
    assert why in str(bench.take(launch))
    await wait_for(lambda: (stat := procfs.read_stat(pid)) is None or stat.dead)
    assert await bench.park() != pid


async def test_one_that_still_imports_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    """The start does not wait for it."""
    os.mkfifo(tmp_path / "gate")
    with (bench.package / "slow.py").open("a") as file:
        file.write(f"open({str(tmp_path / 'gate')!r}).read()\n")
    assert bench.spares.prepare(str(bench.script), bench.env) == ""
    assert bench.take(bench.launch()) == "it still imports"
    pids = bench.spares.pids()
    assert bench.spares.prepare(str(bench.script), bench.env) == "" and bench.spares.pids() == pids
    (tmp_path / "gate").write_text("go")
    assert await bench.park() in pids
    assert isinstance(bench.take(bench.launch()), Child)


async def test_an_import_that_fails_is_told_once(bench: Bench) -> None:
    """By the last line that it printed; it is not tried again and again."""
    (bench.package / "slow.py").write_text("raise RuntimeError('no torch here')\n")
    await bench.park()
    assert bench.take(bench.launch()) == "RuntimeError: no torch here"
    assert bench.take(bench.launch()) == "none is parked"
    assert bench.spares.prepare(str(bench.script), bench.env) == "the last one failed: RuntimeError: no torch here"


async def test_one_that_was_killed_is_replaced(bench: Bench) -> None:
    """Its number is free again."""
    pid = await bench.park()
    os.kill(pid, signal.SIGKILL)
    await wait_for(lambda: (stat := procfs.read_stat(pid)) is None or stat.dead)
    assert bench.take(bench.launch()) == "it has ended"
    assert await bench.park() != pid
    assert procfs.read_stat(pid) is None


async def test_one_that_hangs_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop waits for no more than ANSWER; what comes to its senses later must not become an engine."""
    monkeypatch.setattr(spare, "ANSWER", 0.05)
    pid = await bench.park()
    os.kill(pid, signal.SIGSTOP)
    assert "does not answer" in str(bench.take(bench.launch()))
    await wait_for(lambda: (stat := procfs.read_stat(pid)) is None or stat.dead)


async def test_an_old_one_is_not_used(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours later the machine may be another one."""
    await bench.park()
    monkeypatch.setattr(spare, "OLDEST", 0.0)
    assert bench.take(bench.launch()) == "it is too old"
    assert bench.take(bench.launch()) == "none is parked"


@pytest.mark.parametrize(
    "head", ["\x7fELF", "#!/usr/bin/env python3\n", "#!/usr/bin/python3 -E\n", "#!/bin/sh\nexec vllm\n", "#!python3\n"]
)
def test_a_command_of_another_kind_has_no_spare(bench: Bench, head: str) -> None:
    """What we cannot start as the kernel would."""
    bench.script.write_text(head)
    assert "console script" in bench.spares.prepare(str(bench.script), bench.env)
    assert bench.take(bench.launch()) == "none is parked"


def test_an_interpreter_with_a_long_path_is_found(tmp_path: Path) -> None:
    """pip writes a trampoline then."""
    script = tmp_path / "vllm"
    script.write_text("#!/bin/sh\n'''exec' \"/long path/bin/python3.11\" \"$0\" \"$@\"\n' '''\nimport sys\n")
    assert interpreter_of(str(script)) == "/long path/bin/python3.11"


async def test_a_script_that_does_more_than_call_a_function_has_no_spare(bench: Bench) -> None:
    """Which function is called must be clear."""
    bench.script.write_text(
        f"#!{sys.executable}\nfrom engine.cli import main\nfrom engine.tell import tell\ntell(main())\n"
    )
    await bench.park()
    assert "not a console script" in str(bench.take(bench.launch()))


def test_an_import_that_touches_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the driver's files that it holds open: here another one stands for them."""
    spec = importlib.util.spec_from_file_location("spare_program", PROGRAM)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.check_devices()
    monkeypatch.setattr(program, "DRIVERS", ("/dev/null",))
    with Path("/dev/null").open(), pytest.raises(program.Refused, match="has opened /dev/null"):
        program.check_devices()


# -- whose it is ------------------------------------------------------------------------------------------------------


async def test_parked_it_bears_a_mark_and_taken_the_launchs(bench: Bench) -> None:
    """So that whoever comes after us finds it, as a spare or as the instance."""
    pid = await bench.park()
    ((member, cookie),) = find_marked(bench.mark)
    assert (member.pid, cookie) == (pid, f"{bench.mark}:(spare):1")
    assert (
        b"spare.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and b"--" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    launch = bench.launch("stay")
    await bench.told(bench.take(launch), launch)
    ((member, cookie),) = find_marked(bench.mark)
    assert (member.pid, cookie) == (pid, launch.cookie)
    assert bench.spares.pids() == frozenset()


async def test_a_sweep_ends_it(bench: Bench) -> None:
    """As everything that is marked."""
    pid = await bench.park()
    assert await end_marked(bench.mark) == ()
    assert procfs.read_stat(pid) is None


@pytest.mark.parametrize("taken", [False, True])
async def test_it_is_nobodys_runaway(bench: Bench, subreaper: None, taken: bool) -> None:
    """The only engine that was there before it is ended: it stays, parked or taken."""
    launch = bench.launch("stay")
    engine = bench.run(spawn, launch)
    await bench.told(engine, launch)
    pid = await bench.park()
    launch = bench.launch("stay")
    if taken:
        await bench.told(bench.take(launch), launch)
    assert await kill_tree(engine) == ()
    stat = procfs.read_stat(pid)
    assert stat is not None and not stat.dead


async def test_its_memory_is_told(bench: Bench) -> None:
    """What it has for itself; nothing without one."""
    assert bench.spares.rss() == 0
    await bench.park()
    assert 1 << 20 < bench.spares.rss() < 1 << 30


async def test_dropping_leaves_nothing(bench: Bench) -> None:
    """No process, directory or descriptor; taken ones are not touched."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    await bench.park()
    launch = bench.launch("stay")
    child = bench.take(launch)
    await bench.told(child, launch)
    pid = await bench.park()
    await bench.spares.drop()
    assert procfs.read_stat(pid) is None
    assert isinstance(child, Child) and procfs.alive(child.leader)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1  # the pidfd of the taken one


DAEMON = """
import os, sys, time
from pathlib import Path
from vllmd.edge.spare import Spares
from vllmd.facts import Launch
script, root, log, mark, take = sys.argv[1:]
spares = Spares(Path(root), mark)
assert spares.prepare(script, {"ENGINE_MODE": "one"}) == ""
while spares._parked[script].look():
    time.sleep(0.01)
if take == "yes":
    fd = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    launch = Launch((script, "serve", "stay"), {"ENGINE_MODE": "one", "TMPDIR": root}, "", "m", "", mark + ":m:1")
    child = spares.take(launch, log_fd=fd, cwd=Path(root))
    assert not isinstance(child, str), child
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("take", ["no", "yes"])
async def test_it_dies_with_the_daemon_unless_it_was_taken(bench: Bench, take: str) -> None:
    """By the end of its socket: even of one that was killed."""
    log = bench.folder / "log"
    words = [sys.executable, "-c", DAEMON, bench.script, bench.root, log, bench.mark, take]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as daemon:
        try:
            assert daemon.stdout is not None
            assert await asyncio.to_thread(daemon.stdout.readline) == b"up\n"
            await wait_for(lambda: take == "no" or "}\n" in log.read_text())
            ((member, cookie),) = find_marked(bench.mark)
        finally:
            daemon.kill()
    if take == "no":
        await wait_for(lambda: not procfs.alive(member))
        shutil.rmtree(bench.root)  # the next daemon clears that
        return
    assert cookie == f"{bench.mark}:m:1"
    assert procfs.alive(member)
    assert await end_marked(bench.mark) == ()


async def test_a_take_that_the_daemon_does_not_survive(bench: Bench) -> None:
    """It has sent the launch and is killed before the answer: what is there then is the instance, or nothing."""
    await bench.park()
    parked = bench.spares._parked[str(bench.script)]
    launch = bench.launch("stay")
    message = {
        "argv": launch.argv,
        "env": {**launch.env, COOKIE: launch.cookie, "SPT_NOENV": "1"},
        "cwd": launch.scratch,
    }
    with bench.log(launch).open("wb") as log:
        message["env"] = {**dict(procfs.environ(parked.child.pid)), **message["env"]}
        message["env"].pop("VLLMD_ROOM")
        socket.send_fds(parked.channel, [json.dumps({**message, "cgroup": None}).encode()], [log.fileno()])
    parked.channel.close()
    await wait_for(lambda: "}\n" in bench.log(launch).read_text())
    ((member, cookie),) = find_marked(bench.mark)
    assert (member.pid, cookie) == (parked.child.pid, launch.cookie)
    assert await end_marked(bench.mark) == ()
