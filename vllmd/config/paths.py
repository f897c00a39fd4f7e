"""Where things are unless the configuration says otherwise: the system's places for root, XDG's for everybody else.

What systemd prepared for the unit (STATE_DIRECTORY= and its sisters) goes before both.
"""

import os
import pwd
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

#: Key of [daemon] -> systemd's variable, the place for root, XDG's variable, the folder of the home that it stands for.
_PLACES: Final = {
    "state_dir": ("STATE_DIRECTORY", "/var/lib/vllmd", "XDG_STATE_HOME", ".local/state"),
    "runtime_dir": ("RUNTIME_DIRECTORY", "/run/vllmd", "XDG_RUNTIME_DIR", None),
    "cache_dir": ("CACHE_DIRECTORY", "/var/cache/vllmd", "XDG_CACHE_HOME", ".cache"),
    "log_dir": ("LOGS_DIRECTORY", "/var/log/vllmd", "", None),
}


def is_root() -> bool:
    return os.geteuid() == 0


def home(env: Mapping[str, str]) -> Path:
    """The user's home: $HOME, else what the user database says."""
    path = Path(env.get("HOME", ""))
    if path.is_absolute():
        return path
    try:
        return Path(pwd.getpwuid(os.geteuid()).pw_dir)
    except KeyError:  # a user without an entry, as in some containers
        return Path("/")


def places(env: Mapping[str, str], root: bool) -> dict[str, Path]:
    """The default of each path of [daemon]; `socket` and `log_dir` only where they do not follow from others."""
    found: dict[str, Path] = {}
    for key, (systemd, system, xdg, folder) in _PLACES.items():
        given = Path(env.get(systemd, "").split(":")[0])
        base = Path(env.get(xdg, ""))
        if given.is_absolute():
            found[key] = given
        elif root:
            found[key] = Path(system)
        elif xdg and base.is_absolute():
            found[key] = base / "vllmd"
        elif folder:
            found[key] = home(env) / folder / "vllmd"
        elif key == "runtime_dir":
            found[key] = Path(env.get("TMPDIR") or tempfile.gettempdir()).absolute() / f"vllmd-{os.geteuid()}"
    if root:
        found["socket"] = Path("/run/vllmd.sock")
    return found


def complete(given: Mapping[str, Path], env: Mapping[str, str], root: bool) -> dict[str, Path]:
    """All paths of [daemon]: those given, the defaults for the rest."""
    paths = {**places(env, root), **given}
    paths.setdefault("socket", paths["runtime_dir"] / "vllmd.sock")
    paths.setdefault("log_dir", paths["state_dir"] / "log")
    return paths


def find_config(env: Mapping[str, str] = os.environ, root: bool | None = None) -> Path:
    """The file to read when none is named: $VLLMD_CONFIG; /etc/vllmd/vllmd.toml for root; for others their own in
    $XDG_CONFIG_HOME or ~/.config where there is one, else root's."""
    system = Path("/etc/vllmd/vllmd.toml")
    if env.get("VLLMD_CONFIG"):
        return Path(env["VLLMD_CONFIG"]).absolute()
    if is_root() if root is None else root:
        return system
    own = own_config(env)
    return own if own.exists() else system


def own_config(env: Mapping[str, str] = os.environ) -> Path:
    """The file of a user who is not root."""
    base = Path(env.get("XDG_CONFIG_HOME", ""))
    return (base if base.is_absolute() else home(env) / ".config") / "vllmd/vllmd.toml"
