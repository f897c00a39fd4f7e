"""What a daemon stands on: directories that are its alone, names that fit, locks that name their holder."""

import fcntl
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.daemon import Vllmd, fake_vllm, vllmd, weights
from vllmd import ground
from vllmd.core.launch import SCRATCH_NAME, scratch_name, socket_path
from vllmd.edge.store import Store, Taken, take
from vllmd.ground import claim, clear_scratch, prepare, release
from vllmd.places import LONGEST, mark_of, scratch_root
from vllmd.spec import DaemonSpec

__all__ = ["fake_vllm", "vllmd", "weights"]  # fixtures
MARK = "vllmd-0123456789ab"
NAMES = ("a", "qwen3-vl-2b-instruct", "x" * 63, "a.b_c-d", "model/1")

# -- scratch directories ----------------------------------------------------------------------------------------------


@pytest.fixture
def short() -> Path:
    """A directory with a short name, as runtime directories have."""
    return Path(tempfile.mkdtemp(prefix="vg-"))


async def test_only_what_has_the_name_of_a_scratch_directory_is_removed(short: Path) -> None:
    """Those of engines that are gone, also half removed; not those in use, nor anything that others put there."""
    root = scratch_root(short, MARK)
    claim(root, MARK)
    gone = [root / scratch_name(name, attempt) for name in NAMES for attempt in (1, 12345)]
    gone.append(root / "a-2.gone-12-34")
    used = root / "b-7"
    others = [root / "precious", root / "notes-x", root / ".hidden", root / "-1"]
    for path in (*gone, used, *others):
        path.mkdir()
        (path / "file").touch()
    await clear_scratch(root, {str(used)})
    assert [path for path in gone if path.exists()] == []
    assert all((path / "file").exists() for path in (used, *others))
    release(root, MARK)
    assert root.exists()


def test_an_empty_root_goes_at_the_end(short: Path) -> None:
    """And can be claimed again; nothing of it is left."""
    root = scratch_root(short, MARK)
    for _ in range(2):
        claim(root, MARK)
        claim(root, MARK)
        assert root.stat().st_mode & 0o777 == 0o700
        release(root, MARK)
        assert list(short.iterdir()) == []


@pytest.mark.parametrize("what", ["directory with files", "another vllmd's", "file", "link"])
def test_what_is_not_ours_is_not_used(short: Path, tmp_path: Path, what: str) -> None:
    """It is named, left as it is, and something else is taken."""
    spec = DaemonSpec(short / "s", tmp_path / "state", short, tmp_path / "log", tmp_path / "cache")
    root = scratch_root(short, mark_of(spec.state_dir))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    match what:
        case "directory with files":
            root.mkdir()
            (root / "a-1").mkdir()
        case "another vllmd's":
            claim(root, "vllmd-another")
        case "file":
            root.write_text("mine")
        case "link":
            root.symlink_to(elsewhere)
    said: list[str] = []
    places, _ = prepare(spec, SimpleNamespace(error=said.append, warning=said.append))  # type: ignore[arg-type]
    assert places.scratch != root and places.scratch.is_dir()
    assert len(os.fsencode(places.scratch)) <= LONGEST
    assert f"cannot use {root}" in said[0]
    assert list(elsewhere.iterdir()) == []
    assert what != "directory with files" or (root / "a-1").exists()
    release(places.scratch, places.mark)
    assert not places.scratch.exists()


def test_a_foreign_directory_in_the_runtime_directory_survives_the_daemon(vllmd: Vllmd) -> None:
    """Whoever shares the runtime directory keeps what is theirs, also under a name that was ours once."""
    precious = vllmd.runtime / "tmp" / "precious"
    precious.mkdir(parents=True)
    vllmd.model("a").start()
    vllmd.up("a")
    assert vllmd.stop() == 0
    assert precious.is_dir()
    assert {path.name for path in vllmd.runtime.iterdir()} == {"tmp"}


# -- names that fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["/run/vllmd", "/run/user/1000/vllmd", "/var/lib/x/" + "y" * 60])
@pytest.mark.parametrize("attempt", [1, 99_999, 10**9])
def test_no_name_is_too_long_for_vllms_sockets(runtime: str, attempt: int) -> None:
    """VLLM_RPC_BASE_PATH has at most 70 bytes, with 37 more for the socket at most 107."""
    root = scratch_root(Path(runtime), MARK)
    made = [scratch_name(name, attempt) for name in NAMES]
    assert max(len(os.fsencode(root / name)) for name in made) <= 70
    assert len(set(made)) == len(NAMES)
    assert all(SCRATCH_NAME.fullmatch(name) for name in made)
    sockets = [socket_path(Path(runtime), name) for name in (*NAMES, "x" * 62 + "y")]
    assert max(len(os.fsencode(path)) for path in sockets) <= 107
    assert len(set(sockets)) == len(sockets)


def test_short_names_are_as_they_are() -> None:
    """An operator finds them by the model's name."""
    assert scratch_name("dots-ocr", 3) == "dots-ocr-3"
    assert socket_path(Path("/run/vllmd"), "dots-ocr") == Path("/run/vllmd/dots-ocr.sock")


# -- locks ------------------------------------------------------------------------------------------------------------


def test_a_runtime_directory_has_one_daemon(tmp_path: Path) -> None:
    """Also one with another state directory: it is refused, names the first, and may have both once that is gone."""
    runtime = tmp_path / "run"
    first, second = Store(tmp_path / "a", runtime), Store(tmp_path / "b", runtime)
    first.lock()
    with pytest.raises(Taken, match=rf"runs on {runtime} \(pid {os.getpid()}\): .*daemon.runtime_dir"):
        second.lock()
    third = Store(tmp_path / "b")
    third.lock()  # what the second had taken it has given back
    third.unlock()
    first.unlock()
    assert list(runtime.iterdir()) == []
    second.lock()
    second.unlock()


def test_a_lock_that_is_removed_while_one_waits_for_it_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder removes the file and lets go: who had opened the old file must not hold that one."""
    path = tmp_path / "vllmd.lock"
    whole, removed = fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        if not removed:
            path.unlink()
            removed.append(fd)
        whole(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    fd = take(path, "x")
    assert removed and path.read_text() == f"{os.getpid()}\n"
    with pytest.raises(Taken):
        take(path, "x")
    os.close(fd)


def test_a_second_daemon_on_the_same_runtime_directory_leaves_the_first_alone(vllmd: Vllmd) -> None:
    """With a state directory of its own: it is refused with the first one's pid, and the model goes on."""
    vllmd.model("a").start()
    (a,) = vllmd.up("a")
    assert vllmd.process is not None
    first, ears, folder = vllmd.process, vllmd._ears[-1], vllmd.folder
    vllmd.daemon |= {"state_dir": folder / "other", "socket": vllmd.runtime / "other.sock"}
    vllmd.write()
    vllmd.spawn()
    assert vllmd.ended() == 1
    assert f"already runs on {vllmd.runtime} (pid {first.pid})" in vllmd.said
    vllmd.process = first
    vllmd._ears.append(ears)
    now = vllmd.look("a")
    assert (now["state"], now["pids"]) == ("ready", a["pids"])


def test_the_marker_is_not_taken_for_a_scratch_directory() -> None:
    """What clears up must not remove what it stands on."""
    assert not SCRATCH_NAME.fullmatch(f".{MARK}")
    assert ground.CLEAR_LIMIT > 0
