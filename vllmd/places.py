"""Names that are derived from where the daemon keeps its state."""

import hashlib
import os
import tempfile
from pathlib import Path

LONGEST = 48  # bytes of a scratch root: vllmd/core/launch.py has the sum


def mark_of(state_dir: Path) -> str:
    """What all our processes carry in their environment: the same for every daemon on this state directory."""
    return "vllmd-" + hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]


def scratch_root(runtime_dir: Path, mark: str) -> Path:
    """A directory for the instances' own temporary ones: nobody else's name, and short enough for their sockets' paths."""
    far = f"{mark}-{os.getuid()}"
    places = (runtime_dir / f"tmp-{mark[-8:]}", Path(tempfile.gettempdir()) / far, Path("/tmp") / far)
    return next((place for place in places if len(os.fsencode(place)) <= LONGEST), places[-1])


def hf_home(cache_dir: Path) -> Path | None:
    """Where downloads go: what the environment says; else, for a daemon without a home of its own, below its cache."""
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"])
    return (
        cache_dir / "huggingface"
        if os.geteuid() == 0 and not Path("~/.cache/huggingface").expanduser().is_dir()
        else None
    )
