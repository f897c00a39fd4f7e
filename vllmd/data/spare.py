"""A process that has imported an engine and waits to become one. Run by the engine's own Python; knows nothing of vllmd.

    python spare.py FD SCRIPT PADDING        (FD: a socket of sequenced packets; SCRIPT: a console script, `vllm`)

It imports what SCRIPT's function would import before it looks at its arguments, says {"ready": true}, and waits. A launch
comes as {"argv", "env", "cwd", "cgroup"} with the log's descriptor. If it fits, this process becomes what the launch would
have started: the same arguments, environment, directory, log, name and cgroup, in /proc as well, and SCRIPT is run as
Python would run it. If not, {"no": why} is the answer, and the wait goes on, or ends where no launch can fit any more. The
end of the socket is the end of a process that was not taken.

What fits is decided by what was seen. A variable of the environment that was looked at during the import must be now what
it was then. So must every one that compiled code may have looked at unseen: all but a few (LATE).
"""

import ast
import ctypes
import importlib
import json
import os
import socket
import struct
import sys
import time
import types
from collections.abc import ItemsView, Iterable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path, PurePath
from typing import Any

ROOM = "VLLMD_ROOM"  # holds nothing: makes the environment's place in memory large enough for a launch's
MESSAGE = 1 << 18  # bytes

#: An attempt's own: differ in every launch. What the import made of the directories is corrected.
OWN = ("VLLMD_COOKIE", "TMPDIR", "VLLM_RPC_BASE_PATH")
#: May differ unless the import looked at them: read when a device is touched, or by Python code alone, which is watched.
LATE = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
LATE_PREFIX = "VLLM_"
#: What a process has open once the driver has looked at CUDA_VISIBLE_DEVICES, and will not look again.
DRIVERS = ("/dev/nvidia-uvm", "/dev/kfd")

_PR_SET_MM, _PR_SET_MM_MAP = 35, 14  # linux/prctl.h


class Refused(Exception):
    """This launch must be started the plain way. `last`: and so must every other."""

    def __init__(self, why: str, last: bool = False) -> None:
        super().__init__(why)
        self.last = last


# -- what the import looks at

seen: set[str] = set()


class Watched(os._Environ[str]):
    """os.environ that notes which names are looked up. Who goes through `items` looks for a prefix of its own (tqdm,
    networkx) and is not noted; who copies everything is, name by name."""

    def __getitem__(self, key: str) -> str:
        seen.add(os.fsdecode(key))
        return super().__getitem__(key)

    def items(self) -> ItemsView[str, str]:
        return {os.fsdecode(key): os.fsdecode(value) for key, value in os.environb.items()}.items()


class Imported:
    """What the import saw and left, to be compared with a launch. `env` is what this process was started with."""

    def __init__(self, script: str, env: Mapping[str, str]) -> None:
        began = time.time_ns()
        self.env, self.folder = env, env.get("TMPDIR", "")
        self.code = prepare_main(script)
        os.environ.__class__ = Watched
        try:
            engine = run_imports(script)
        finally:
            os.environ.__class__ = os._Environ
        names = self.env.keys() | os.environ.keys()
        self.changes = {name: os.environ.get(name) for name in names if env.get(name) != os.environ.get(name)}
        self.touched = seen | self.changes.keys()
        self.places = places_below(self.folder) if self.folder else []
        files, watched = files_of(script, engine)
        for path in files:
            if (found := stamp(path)) is not None and found[0] >= began:
                raise Refused(f"{path} has changed while it was imported", last=True)
        self.stamps = {path: stamp(path) for path in watched}
        check_devices()

    def check(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Raises Refused if a plain start would have been another one."""
        if any("--help" in word for word in argv):
            raise Refused("its arguments have --help, which is looked for at import")
        for name in sorted(self.env.keys() | env.keys()):
            if self.env.get(name) == env.get(name) or name in OWN:
                continue
            if name in self.touched:
                raise Refused(f"its environment differs in {name}, which is read at import")
            if name not in LATE and not name.startswith(LATE_PREFIX):
                raise Refused(f"its environment differs in {name}")
        for path, before in self.stamps.items():
            if stamp(path) != before:
                raise Refused(f"{path} has changed since it was imported", last=True)
        check_devices()

    def move(self, folder: str) -> None:
        """Correct what the import made of the temporary directory."""
        for names, name in self.places:
            value = names[name]
            names[name] = type(value)(folder + str(value)[len(self.folder) :])


def run_imports(script: str) -> str:
    """What the script imports, and then what its function does: vLLM has its imports there. Returns the name of the package.
    Raises Refused for a script of an unknown kind, and whatever the imports raise."""
    tree = ast.parse(Path(script).read_bytes())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    found = [
        (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
        if (alias.asname or alias.name) in called
    ]
    if len(found) != 1:
        raise Refused(f"{script} is not a console script of a kind that is known", last=True)
    module = importlib.import_module(found[0][0])
    file = str(module.__file__)
    for function in ast.parse(Path(file).read_bytes()).body:
        if isinstance(function, ast.FunctionDef) and function.name == found[0][1]:
            for node in function.body:
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    exec(compile(ast.Module([node], []), file, "exec"), {"__name__": module.__name__})
    return module.__name__.partition(".")[0]


def places_below(folder: str) -> list[tuple[dict[str, Any], str]]:
    """Where modules keep this directory, or a path below it."""
    found = []
    for module in list(sys.modules.values()):
        if issubclass(type(module), types.ModuleType):  # isinstance would ask lazy objects who they are
            names = vars(module)
            for name, value in list(names.items()):
                if issubclass(type(value), (str, PurePath)) and f"{value}/".startswith(folder + "/"):
                    found.append((names, name))
    return found


def files_of(script: str, engine: str) -> tuple[set[str], set[str]]:
    """What has been read to come so far, and of that what is looked at again before a launch: each directory, where a file
    that is replaced shows, and every file of the engine's own package, which somebody may be working on. Looking at the
    thousands of others would cost 20 ms of an event loop's time."""
    files = {script, str(Path(sys.executable).resolve()), str(Path(sys.prefix, "pyvenv.cfg"))}
    watched = files | set(sys.path)
    for name, module in list(sys.modules.items()):
        if issubclass(type(module), types.ModuleType) and isinstance(file := vars(module).get("__file__"), str):
            files.add(file)
            watched |= {os.path.dirname(file), *([file] if name.partition(".")[0] == engine else [])}  # noqa: PTH120
    return files, watched


def stamp(path: str) -> tuple[int, int, int] | None:
    """A file as it is now; None when there is none."""
    try:
        now = os.stat(path)  # noqa: PTH116 - thousands of them, while an event loop waits
    except (OSError, ValueError):
        return None
    return now.st_mtime_ns, now.st_size, now.st_ino


def check_devices() -> None:
    """Raises Refused when the import has begun to use a GPU: it would hold memory there, and which one is settled."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise Refused("the import has touched a GPU", last=True)
    for link in Path("/proc/self/fd").iterdir():
        try:
            name = str(link.readlink())
        except OSError:
            continue
        if name in DRIVERS:
            raise Refused(f"the import has opened {name}", last=True)


# -- becoming somebody else


def prepare_main(script: str) -> types.CodeType:
    """Put an empty __main__ in our place, as it is when Python runs the script. Returns the script's code for it."""
    main = types.ModuleType("__main__")
    main.__file__ = script
    main.__loader__ = SourceFileLoader("__main__", script)
    vars(main).update(__cached__=None, __builtins__=__builtins__)
    if sys.version_info < (3, 14):
        main.__annotations__ = {}
    sys.modules["__main__"] = main
    # Python puts the directory of the script there, links followed; now it is that of this file.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(script).resolve().parent)
    return compile(Path(script).read_bytes(), script, "exec")


class Stack:
    """Where the kernel finds our arguments and environment (proc(5)): where they were at exec."""

    def __init__(self) -> None:
        fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        number = {n: int(fields[n - 3]) for n in (26, 27, 28, *range(45, 52))}  # counted as in proc(5)
        self.code, self.stack = (number[26], number[27]), number[28]
        self.data, self.heap = (number[45], number[46]), number[47]
        self.argv, self.env = (number[48], number[49]), (number[50], number[51])
        self.libc = ctypes.CDLL(None)
        self.libc.sbrk.restype, self.libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]

    def check(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Raises Refused when there is not room enough."""
        for data, (start, end) in ((packed(argv), self.argv), (packed(map("=".join, env.items())), self.env)):
            if not start or len(data) > end - start:
                raise Refused("its arguments or environment are too long")

    def show(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Make /proc/self/cmdline read like this, and environ: nobody may use the variables any more that were there."""
        first, start, end = self.argv[0], *self.env
        words, variables = packed(argv), packed(map("=".join, (env or {}).items()))
        ctypes.memmove(first, words.ljust(self.argv[1] - first, b"\0"), self.argv[1] - first)
        if env is not None:
            ctypes.memmove(start, variables.ljust(end - start, b"\0"), end - start)
            end = start + len(variables)
        # Where they end now: else the zeros behind are shown as well. A kernel may be built without that; no harm is done.
        values = struct.pack(
            "=11QQII", *self.code, *self.data, self.heap, self.libc.sbrk(0), self.stack, first, first + len(words), start, end,
            0, 0, 0xFFFFFFFF,
        )  # fmt: skip
        self.libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, ctypes.c_char_p(values), ctypes.c_ulong(len(values)), 0)


def packed(words: Iterable[str]) -> bytes:
    return b"".join(os.fsencode(word) + b"\0" for word in words)


def become(imported: Imported, stack: Stack, launch: Mapping[str, Any], log: int) -> None:
    """From here on this is the launch's process. Raises OSError when its directory is gone."""
    argv, env, argv0 = launch["argv"], launch["env"], [sys.executable, *launch["argv"]]
    os.chdir(launch["cwd"])
    if cgroup := launch["cgroup"]:
        try:
            Path(cgroup, "cgroup.procs").write_text("0")
        except OSError as error:  # costs accounting, not the start: as in a plain one
            os.write(log, f"cannot enter {cgroup}: {error.strerror}\n".encode())
    os.environ.clear()
    os.environ.update({name: value for name, value in {**env, **imported.changes}.items() if value is not None})
    stack.show(argv0, env)
    Path("/proc/self/comm").write_text(Path(argv[0]).name[:15])
    sys.argv[:], sys.orig_argv[:] = argv, argv0
    if "TMPDIR" in env:
        imported.move(env["TMPDIR"])
    take_log(log)


def take_log(log: int) -> None:
    """Write there from now on; what the import has said comes first."""
    sys.stdout.flush()
    sys.stderr.flush()
    said = os.pread(1, os.fstat(1).st_size, 0)
    while said:
        said = said[os.write(log, said) :]
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def wait(channel: socket.socket, script: str) -> types.CodeType:
    """Until a launch has come that fits. Returns the code to run; ends the process when there will be none."""

    def say(**words: Any) -> None:
        try:
            channel.send(json.dumps(words).encode())
        except OSError:
            return  # nobody is there: the next look at the channel tells, or an engine that outlives that has begun

    stack = Stack()
    # Not os.environ: Python may have added to it (LC_CTYPE).
    given = (os.fsdecode(pair).partition("=") for pair in Path("/proc/self/environ").read_bytes().split(b"\0") if pair)
    env = {name: value for name, _, value in given if name != ROOM}
    os.environ.pop(ROOM)
    stack.show([sys.executable, *sys.argv[:3]])
    sys.argv[:] = [script, "serve"]
    try:
        imported = Imported(script, env)
    except Refused as refused:
        say(no=str(refused))
        os._exit(1)
    say(ready=True)
    while True:
        message, fds, _, _ = socket.recv_fds(channel, MESSAGE, 1)
        if not message:
            os._exit(0)
        launch = json.loads(message)
        try:
            imported.check(launch["argv"], launch["env"])
            stack.check([sys.executable, *launch["argv"]], launch["env"])
            become(imported, stack, launch, fds[0])
        except (Refused, OSError) as refused:
            say(no=str(refused))
            if not isinstance(refused, Refused) or refused.last:
                os._exit(1)
            os.close(fds[0])
            continue
        say(yes=True)
        channel.close()
        return imported.code


if __name__ == "__main__":
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    exec(wait(control, sys.argv[2]), vars(sys.modules["__main__"]))
