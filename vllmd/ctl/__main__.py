"""Entry of vllmctl: parse, run one command, turn whatever went wrong into a sentence and an exit code."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from vllmd.ctl.arguments import COMMANDS, parse
from vllmd.ctl.call import Call, complain
from vllmd.ctl.client import Client, choose_socket
from vllmd.ctl.faults import FAILED, INTERRUPTED, OK, USAGE, Fault


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (docs/vllmctl.md); never raises for what vllmd or the caller did."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        module, _, function = COMMANDS[args.command].run.partition(":")
        run = getattr(import_module(f"vllmd.ctl.{module}"), function)
        code = run(Call(args, Client(choose_socket(args.socket))))
        sys.stdout.flush()
    except SystemExit as end:  # argparse: help or a wrong command line
        return end.code if isinstance(end.code, int) else USAGE
    except Fault as fault:
        complain(fault.message, *fault.hints)
        return fault.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # the reader (head, less) has left; a second complaint at exit would be noise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return int(code or OK)


if __name__ == "__main__":
    sys.exit(main())
