"""Names that are derived from where the daemon keeps its state."""

import hashlib
import os
import tempfile
from pathlib import Path

LONGEST = 48  # bytes of a scratch root: vLLM adds names and a 36-character id for its sockets, and 107 is the limit


def mark_of(state_dir: Path) -> str:
    """What all our processes carry in their environment: the same for every daemon on this state directory."""
    return "vllmd-" + hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]


def scratch_root(runtime_dir: Path, mark: str) -> Path:
    """A directory for the instances' own temporary ones, short enough for their sockets' paths."""
    near = runtime_dir / "tmp"
    if len(str(near)) <= LONGEST:
        return near
    return Path(tempfile.gettempdir()) / f"{mark}-{os.getuid()}"


def hf_home(cache_dir: Path) -> Path | None:
    """Where downloads go: what the environment says; else, for a daemon without a home of its own, below its cache."""
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"])
    return (
        cache_dir / "huggingface"
        if os.geteuid() == 0 and not Path("~/.cache/huggingface").expanduser().is_dir()
        else None
    )
