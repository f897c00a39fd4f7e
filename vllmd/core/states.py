"""The life of an instance: all states, all legal moves, in one table. What is not in it does not happen.

    stopped -want-> waiting -admit-> starting -ready-> ready -drain-> draining -end-> stopping -rest-> stopped
                                                       ready -sleep-> dozing -asleep-> asleep -wake-> waking -ready-> ready

An instance waits while it is inspected, while memory is being freed, or while another one measures on its device.
`stopping` means that its processes are being ended and its memory awaited, for whatever reason; the instance's `after`
says which of `rest`, `retry`, `again`, `give_up` follows. `dozing` lasts until a reading shows what a sleeper still uses.
docs/states.md is printed from this table (`python -m vllmd.core.states`), and a test keeps it so.
"""

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    STOPPED = "stopped"
    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    DOZING = "dozing"
    ASLEEP = "asleep"
    WAKING = "waking"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"


class Move(StrEnum):
    WANT = "want"  # somebody wants it up: operator, autostart, backoff elapsed, restart
    ADOPT = "adopt"  # an earlier daemon's engine was found
    ADMIT = "admit"  # inspected, memory reserved, window free: spawn
    READY = "ready"  # serves, and is ours
    SLEEP = "sleep"  # engine told to give its memory back and to stay
    ASLEEP = "asleep"  # it does, and what it keeps is known
    WAKE = "wake"  # its memory reserved again: told to take it
    DRAIN = "drain"  # leader told to finish what it has
    END = "end"  # leader gone, stalled, hung, or drained long enough: kill the tree
    REST = "rest"  # tree gone, memory back, nobody wants it
    RETRY = "retry"  # ... crashed, or refused by a preflight, and may heal
    AGAIN = "again"  # ... wanted again at once
    GIVE_UP = "give_up"  # cannot heal, failed too often, waited too long, or can never fit
    CANCEL = "cancel"  # not wanted any more before anything ran


class IllegalMove(Exception):
    """A move that the table does not have: a bug in the core. The daemon logs the story and exits."""


S, M = State, Move
MOVES: Mapping[State, Mapping[Move, State]] = {
    S.STOPPED: {M.WANT: S.WAITING, M.ADOPT: S.STARTING, M.GIVE_UP: S.FAILED},
    S.WAITING: {M.ADMIT: S.STARTING, M.CANCEL: S.STOPPED, M.RETRY: S.BACKOFF, M.GIVE_UP: S.FAILED},
    S.STARTING: {M.READY: S.READY, M.END: S.STOPPING},
    S.READY: {M.SLEEP: S.DOZING, M.DRAIN: S.DRAINING, M.END: S.STOPPING},
    S.DOZING: {M.ASLEEP: S.ASLEEP, M.END: S.STOPPING},
    S.ASLEEP: {M.WAKE: S.WAKING, M.END: S.STOPPING},
    S.WAKING: {M.READY: S.READY, M.END: S.STOPPING},
    S.DRAINING: {M.END: S.STOPPING},
    S.STOPPING: {M.REST: S.STOPPED, M.RETRY: S.BACKOFF, M.AGAIN: S.WAITING, M.GIVE_UP: S.FAILED},
    S.BACKOFF: {M.WANT: S.WAITING, M.CANCEL: S.STOPPED},
    S.FAILED: {M.WANT: S.WAITING, M.CANCEL: S.STOPPED},
}

#: States in which processes of the instance may exist.
ALIVE = frozenset({S.STARTING, S.READY, S.DOZING, S.ASLEEP, S.WAKING, S.DRAINING, S.STOPPING})
#: States that always have a deadline, so that nothing waits for ever. One that sleeps has one while somebody waits for it.
TIMED = frozenset({S.WAITING, S.STARTING, S.READY, S.DOZING, S.WAKING, S.DRAINING, S.STOPPING, S.BACKOFF})
#: States in which memory may be reserved. Backoff keeps its place, and so does the wait after it: a crashed model must
#: not lose it to whoever comes first.
HOLDING = TIMED | {S.ASLEEP}


def next_state(state: State, move: Move) -> State:
    """The state that `move` leads to. Raises IllegalMove if the table has no such move."""
    try:
        return MOVES[state][move]
    except KeyError:
        raise IllegalMove(f"cannot {move} an instance that is {state}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram and a Markdown table: the text of docs/states.md."""
    lines = ["# States of an instance", "", "Printed from `vllmd/core/states.py`; do not edit.", "", "```mermaid"]
    lines += ["stateDiagram-v2", "    [*] --> stopped"]
    lines += [f"    {state} --> {to}: {move}" for state, moves in MOVES.items() for move, to in moves.items()]
    lines += ["```", "", "| state | " + " | ".join(Move) + " |", "|---" * (len(Move) + 1) + "|"]
    for state, moves in MOVES.items():
        lines.append(f"| **{state}** | " + " | ".join(str(moves.get(move, "")) for move in Move) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(diagram())
