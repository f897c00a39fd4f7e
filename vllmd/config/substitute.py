"""${env:NAME} and ${credential:NAME}, the only substitutions, in string values.

A credential is a file of that name in systemd's $CREDENTIALS_DIRECTORY, or vllmd_NAME there: so systemd calls the files of
a directory that the unit loads as `vllmd`. It may stand in `env` tables only: anything else ends in a command line, a log
or a status. What is substituted in an `env` table counts as secret.

Who checks a file where vllmd does not run knows neither its variables nor its credentials. What is missing there is told
apart from what is wrong: `missing` in place of `faults`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vllmd.config.kinds import Bad, Fault
from vllmd.config.problems import Key, Substituted, quote

_FORM: Final = re.compile(r"\$\{(env|credential):([^}]*)\}|\$\{[^}]*\}?")
_CREDENTIAL: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_DIRECTORY: Final = "vllmd_"
_MAX_BYTES: Final = 1 << 20  # systemd's own limit for all credentials of a unit


class Missing(Bad):
    """A variable or a credential that is not there; whoever has it can fill the string in."""


class Filler:
    """Fills in one file's strings. `faults`, `missing` and `secrets` are what came up on the way. `offline`: it is not
    vllmd that asks, so what is missing is only said."""

    def __init__(self, env: Mapping[str, str], offline: bool = False) -> None:
        self.env = env
        self.offline = offline
        self.faults: list[Fault] = []
        self.missing: list[Fault] = []
        self.secrets: set[str] = set()

    def fill(self, value: Any, path: Key = ()) -> Any:
        """`value` with every string in it filled in. A string that cannot be is left as it is, and a fault is added."""
        match value:
            case dict():
                return {key: self.fill(v, (*path, key)) for key, v in value.items()}
            case list():
                return [self.fill(v, (*path, at)) for at, v in enumerate(value)]
            case str() if "${" in value and _is_args(path):
                return Substituted.of(value, value)  # refused there, whatever it would become
            case str() if "${" in value:
                try:
                    return self.string(value, _is_env(path))
                except Bad as exc:
                    told = self.missing if self.offline and isinstance(exc, Missing) else self.faults
                    told += [Fault(f.message, f.hint, path) for f in exc.faults]
        return value

    def string(self, raw: str, secret: bool) -> Substituted:
        """Raises Bad for the first ${...} that cannot be filled in."""
        parts: list[str] = []

        def put(match: re.Match[str]) -> str:
            parts.append(self.look_up(match, secret))
            return parts[-1]

        filled = _FORM.sub(put, raw)
        if secret:
            self.secrets |= {text for text in (filled, *parts) if text}
        return Substituted.of(filled, raw)

    def look_up(self, match: re.Match[str], secret: bool) -> str:
        source, name = match[1], match[2]
        if source == "env":
            if name not in self.env:
                here = "not known here: vllmd gets it from its environment"
                said = here if self.offline else "no such variable in vllmd's environment"
                raise Missing(Fault(f"{quote(match[0])}: {said}"))
            return self.env[name]
        if source != "credential":
            hint = "only ${env:NAME} and ${credential:NAME} are substituted"
            raise Bad(Fault(f"{quote(match[0])} is not a substitution", hint))
        if not secret:
            raise Bad(Fault(f"{quote(match[0])} would be seen by others", "credentials go into an env table"))
        return self.credential(name)

    def credential(self, name: str) -> str:
        """The text of a credential without its last line end. Raises Bad."""
        folder = self.env.get("CREDENTIALS_DIRECTORY")
        shown = quote("${credential:" + name + "}")
        if not _CREDENTIAL.fullmatch(name):
            raise Bad(Fault(f"{shown}: not the name of a credential"))
        hint = f"a file {name} in /etc/vllmd/credentials, or LoadCredential={name}:/path in vllmd.service"
        if not folder:
            here = "not known here: vllmd gets it from systemd"
            raise Missing(Fault(f"{shown}: {here if self.offline else 'vllmd got no credentials'}", hint))
        try:
            content = _read(Path(folder), name)
        except OSError as exc:
            raise Missing(Fault(f"{shown}: cannot be read: {exc.strerror}", hint)) from None
        if len(content) > _MAX_BYTES:
            raise Bad(Fault(f"{shown}: longer than 1 MiB"))
        try:
            return content.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise Bad(Fault(f"{shown}: is not UTF-8")) from None


def _read(folder: Path, name: str) -> bytes:
    """The content of a credential, as far as it is allowed to be long. Raises OSError."""
    path = folder / name
    if not path.exists() and (other := folder / f"{_DIRECTORY}{name}").exists():
        path = other
    with path.open("rb") as file:
        return file.read(_MAX_BYTES + 1)


def _is_args(path: Key) -> bool:
    """Whether a value at `path` becomes a part of a command line."""
    match path:
        case ("models", _, "args", *_) | ("defaults", "args", *_):
            return True
    return False


def _is_env(path: Key) -> bool:
    """Whether a value at `path` becomes an environment variable."""
    match path:
        case ("models", _, "env", _) | ("defaults", "env", _):
            return True
    return False
