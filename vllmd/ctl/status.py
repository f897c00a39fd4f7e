"""`vllmctl status` and `version`."""

from __future__ import annotations

from vllmd import __version__
from vllmd.ctl.call import checked, print_json, print_lines
from vllmd.ctl.faults import OK, Unreachable, Usage
from vllmd.ctl.words import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vllmd.ctl.call import Call


def run(call: Call) -> int:
    """The status as JSON, as a table, or kept on the screen."""
    if call.args.readonly and not call.args.watch:
        raise Usage("cannot use --readonly without --watch: a status changes nothing")
    if call.args.watch:
        from vllmd.ctl.watch import watch

        return watch(call)
    status = call.status()
    if call.args.json:
        print_json(status)
        return OK
    from vllmd.ctl.table import status_text

    print_lines(status_text(status, call.look, call.args.all))
    return OK


def version(call: Call) -> int:
    """Both versions: after an upgrade the daemon may still be the old one."""
    try:
        daemon = checked(call.client.get("/api/v1/status"))["daemon"]
    except Unreachable:
        daemon = {}
    if call.args.json:
        print_json({"vllmctl": __version__, "vllmd": daemon.get("version")})
        return OK
    running = (
        f"vllmd {clean(daemon.get('version'))} (pid {clean(daemon.get('pid'))})" if daemon else "vllmd not reachable"
    )
    print_lines([f"vllmctl {__version__}, {running}"])
    return OK
