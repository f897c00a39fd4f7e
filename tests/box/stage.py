"""What a story inside the box needs: the package, engines that user vllmd can run, a configuration, and eyes."""

import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fake.make_model import make_model
from tests.remote import Model, Remote, table

ROOT = Path(__file__).resolve().parents[2]
BOX = Path("/opt/box")  # not in a home nor in /tmp: the unit hides both
UNIT = "vllmd.service"
CONFIG = Path("/etc/vllmd/vllmd.toml")
GROUP = Path("/sys/fs/cgroup/system.slice/vllmd.service")
LIMIT = 180.0  # seconds for anything: the box shares a busy machine


class Ran:
    """A command that has ended."""

    def __init__(self, code: int, out: str) -> None:
        self.code, self.out = code, out


def run(*argv: str | Path, user: str | None = None, check: bool = True, **env: str) -> Ran:
    """Run a command to its end; stdout and stderr together. Fails with them unless it ends well."""
    words = [*map(str, argv)]
    if user:
        words = ["runuser", "-u", user, "--", *words]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT,
        check=False, env={**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **env},
    )  # fmt: skip
    assert not check or done.returncode == 0, (
        f"{' '.join(words)}: {done.returncode}\n{done.stdout}\n{journal()[-6000:]}"
    )
    return Ran(done.returncode, done.stdout)


def journal(*words: str) -> str:
    """What the unit said."""
    done = subprocess.run(
        ["journalctl", "-u", UNIT, "--no-pager", "-o", "short-precise", "--no-hostname", *words],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
    )  # fmt: skip
    return done.stdout


def report(what: str, value: float | str) -> None:
    """A row for the table of what was measured."""
    print(json.dumps({"report": what, "value": value}), flush=True)


def say(text: str) -> None:
    """Where the story is, for when it fails."""
    print(f"# {time.monotonic():.1f} {text}", flush=True)


# -- setting the stage


def install(deb: str, *, apt: bool = False) -> None:
    """The package: with apt, as a user does, or with dpkg alone, which is done sooner."""
    words = ["apt-get", "install", "-y", "--no-install-recommends"] if apt else ["dpkg", "--no-triggers", "-i"]
    run(*words, deb, DEBIAN_FRONTEND="noninteractive")


def fake_engine() -> Path:
    """The fake vLLM as user vllmd can run it: with Debian's Python, from a place that everybody may read."""
    folder = BOX / "fake"
    if not folder.exists():
        (BOX / "src").mkdir(parents=True)
        subprocess.run(["cp", "-r", ROOT / "tests", BOX / "src/tests"], check=True)
        make = f"import sys; sys.path.insert(0, '{BOX}/src')\nfrom pathlib import Path\n"
        make += f"from tests.fake.environment import install; install(Path('{folder}'))"
        run("/usr/bin/python3", "-IBc", make)
        make_model(BOX / "weights")
        run("chmod", "-R", "a+rX", BOX)
    return folder / "bin/vllm"


def real_engine() -> Path:
    """The real vLLM of .engine as user vllmd can run it: its packages, under a Python outside of every home."""
    folder, engine = BOX / "vllm", ROOT / ".engine"
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    base = Path("/usr/bin") / python
    if not base.exists():
        base = BOX / "python/bin" / python
        mount(Path(sys.base_prefix), BOX / "python")
    mount(engine / "models", BOX / "models")
    mount(engine / "lib" / python / "site-packages", folder / "lib" / python / "site-packages")
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to(base)
    (folder / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
    command = (engine / "bin/vllm").read_text().split("\n", 1)[1]
    (folder / "bin/vllm").write_text(f"#!{folder}/bin/python\n{command}")
    (folder / "bin/vllm").chmod(0o755)
    return folder / "bin/vllm"


def mount(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    run("mount", "--bind", source, target)


def dropin(name: str, text: str) -> None:
    """A drop-in of the unit."""
    path = Path(f"/etc/systemd/system/{UNIT}.d/{name}.conf")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    run("systemctl", "daemon-reload")


class Service(Remote):
    """vllmd.service, and the models in its configuration."""

    def __init__(self, engine: Path, **defaults: Any) -> None:
        self.socket = Path("/run/vllmd.sock")
        self.devices: Model = {"limit": "14GiB"}
        self.defaults: Model = {
            "executable": engine, "max_model_len": 512, "kv_cache": "32MiB", "args": {"enforce-eager": True},
            "stop_timeout": "5s", "drain": "5s", "restart": {"backoff": "100ms", "backoff_max": "200ms"}, **defaults,
        }  # fmt: skip
        self.daemon: Model = {"spare": 0}  # nothing moves that a story did not ask for
        self.models: dict[str, Model] = {}

    def write(self) -> None:
        """The configuration as it stands, to its file."""
        parts = [table("daemon", self.daemon), table('devices."*"', self.devices), table("defaults", self.defaults)]
        CONFIG.write_text("\n".join([*parts, *(table(f"models.{n}", keys) for n, keys in self.models.items())]))

    def restart(self) -> None:
        """Write the configuration; returns when systemd calls the service active."""
        self.write()
        run("systemctl", "restart", UNIT)

    @property
    def pid(self) -> int:
        """Of the daemon; 0 when there is none."""
        return int(run("systemctl", "show", "-p", "MainPID", "--value", UNIT).out)

    def story(self) -> str:
        return "\n" + journal("-n", "60")

    def kill(self) -> int:
        """SIGKILL of the daemon; returns when its successor serves. The pid that died."""
        pid = self.pid
        os.kill(pid, 9)
        until(lambda: self.pid not in (0, pid) and active())
        return pid

    def leaders(self, name: str) -> list[int]:
        """The leaders of a model's sessions: one for each time that it runs."""
        return [pid for pid in members(name) if os.getsid(pid) == pid]


def active() -> bool:
    return run("systemctl", "is-active", UNIT, check=False).out.strip() == "active"


def members(name: str = "") -> list[int]:
    """The processes in a model's cgroup, or in those of all."""
    found = []
    for group in GROUP.glob(f"model-{name or '*'}"):
        try:
            found += [int(line) for line in (group / "cgroup.procs").read_text().split()]
        except OSError:
            continue  # just removed
    return [pid for pid in found if not is_zombie(pid)]


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def of_user(name: str = "vllmd") -> list[int]:
    """All processes of a user."""
    uid = pwd.getpwnam(name).pw_uid
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdecimal() and path.stat().st_uid == uid and not is_zombie(int(path.name)):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def until(test: Callable[[], object], limit: float = LIMIT) -> float:
    """Wait until it is so, looking again and again: systemd tells nobody. The seconds it took."""
    began = time.monotonic()
    while not test():
        assert time.monotonic() < began + limit, f"not so after {limit:.0f} s\n{journal('-n', '80')}"
        time.sleep(0.02)
    return time.monotonic() - began


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Report how long it takes."""
    began = time.monotonic()
    yield
    report(what, time.monotonic() - began)
