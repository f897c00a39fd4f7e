"""A virtual environment with the fake in vLLM's place: command, version, and flags where a reader looks for them.

The modules are laid out as in vLLM 0.32: `vllm.entrypoints.cli.main:main` is the command, EngineArgs and FrontendArgs
are dataclasses whose fields are the flags. The launcher of the API server is where the slow imports are.
"""

import sys
from pathlib import Path
from typing import Final

from tests.fake.flags import known

ROOT: Final = Path(__file__).resolve().parents[2]
VERSION: Final = "0.32.0+cpu"
TYPES: Final = {"switch": "bool", "list": "list[str] | None", "value": "str | None"}
DEFAULTS: Final = {"switch": "False", "list": "None", "value": "None"}
COMMAND: Final = """#!{python}
import sys
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""
MAIN: Final = """def main() -> None:
    import vllm.entrypoints.launchers.api_server.entry
    from tests.fake.fakevllm import main as serve

    serve()
"""
SERVER: Final = f"""import sys

sys.path.append({str(ROOT)!r})

from tests.fake.fakevllm import faults_now, import_vllm

import_vllm(faults_now())
"""
PACKAGES: Final = (
    "", "engine", "entrypoints", "entrypoints/cli", "entrypoints/launchers", "entrypoints/launchers/api_server",
)  # fmt: skip


def install(folder: Path) -> Path:
    """Make the environment in `folder`; its command, bin/vllm."""
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    base = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    (binaries / "python").symlink_to(base)
    home = f"home = {base.parent}\ninclude-system-site-packages = false\nversion = {sys.version.split()[0]}\n"
    (folder / "pyvenv.cfg").write_text(home)
    package = site / "vllm"
    for name in PACKAGES:
        (package / name).mkdir(parents=True, exist_ok=True)
        (package / name / "__init__.py").touch()
    (package / "version.py").write_text(f'__version__ = "{VERSION}"\n')
    (package / "engine/arg_utils.py").write_text(flag_module("EngineArgs", "engine"))
    (package / "entrypoints/launchers/cli_args.py").write_text(flag_module("FrontendArgs", "front"))
    (package / "entrypoints/launchers/api_server/entry.py").write_text(SERVER)
    (package / "entrypoints/cli/main.py").write_text(MAIN)
    info = site / f"vllm-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: vllm\nVersion: {VERSION}\n")
    command = binaries / "vllm"
    command.write_text(COMMAND.format(python=binaries / "python"))
    command.chmod(0o755)
    return command


def flag_module(name: str, owner: str) -> str:
    """A module with the dataclass whose fields are the flags of `owner`, and the parser that adds each."""
    flags = {field: kind for field, (who, kind) in known().items() if who == owner}
    fields = [f"    {field}: {TYPES[kind]} = {DEFAULTS[kind]}" for field, kind in flags.items()]
    adds = [f'        parser.add_argument("--{field.replace("_", "-")}")' for field in flags]
    return "\n".join(
        [
            "from dataclasses import dataclass\n\n",
            "@dataclass",
            f"class {name}:",
            *fields,
            "\n    @staticmethod",
            "    def add_cli_args(parser):",
            *adds,
            "        return parser\n",
        ]
    )
