"""Entry of vllmctl: parse, run one command, turn whatever went wrong into a sentence and an exit code."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from vllmd.ctl.arguments import COMMANDS, parse
from vllmd.ctl.call import Call, complain, print_json
from vllmd.ctl.client import Client, choose_socket
from vllmd.ctl.faults import FAILED, INTERRUPTED, OK, USAGE, Fault


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (docs/vllmctl.md); never raises for what vllmd or the caller did."""
    words = sys.argv[1:] if argv is None else argv
    try:
        args = parse(words)
        module, _, function = COMMANDS[args.command].run.partition(":")
        run = getattr(import_module(f"vllmd.ctl.{module}"), function)
        code = run(Call(args, Client(choose_socket(args.socket))))
        sys.stdout.flush()
    except SystemExit as end:  # argparse: help
        return end.code if isinstance(end.code, int) else USAGE
    except Fault as fault:
        return give_up(fault, "--json" in words)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return left()
    return int(code or OK)


def give_up(fault: Fault, as_json: bool) -> int:
    """Say why; to a program on standard output too, so that it always has JSON to read."""
    complain(fault.message, *fault.hints)
    if as_json:
        try:
            print_json(fault.as_json())
            sys.stdout.flush()
        except BrokenPipeError:
            return left()
    return fault.code


def left() -> int:
    """The reader (head, less) is gone; a second complaint at exit would be noise."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
