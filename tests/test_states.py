"""The state table: total, without dead ends, and its diagram in docs is true."""

from pathlib import Path

import pytest

from vllmd.core.states import HOLDING, MOVES, TIMED, IllegalMove, Move, State, diagram, next_state


def test_every_state_has_a_row_and_a_way_to_stopped() -> None:
    """From each state there is a sequence of moves that ends in stopped."""
    assert set(MOVES) == set(State)
    reaches = {State.STOPPED}
    while True:
        more = {s for s, moves in MOVES.items() if set(moves.values()) & reaches} - reaches
        if not more:
            break
        reaches |= more
    assert reaches == set(State)


def test_every_move_is_used_and_every_state_reached() -> None:
    """No row or column of the table is dead."""
    assert {m for moves in MOVES.values() for m in moves} == set(Move)
    assert {to for moves in MOVES.values() for to in moves.values()} == set(State)


def test_memory_is_held_only_where_a_deadline_ends_it() -> None:
    """Whatever holds memory cannot hold it for ever without somebody looking."""
    assert {
        State.ASLEEP
    } == HOLDING - TIMED  # which has a deadline while somebody waits for it: tests/sim.py checks that


def test_a_move_that_is_not_in_the_table_raises_and_names_it() -> None:
    """A missing key is an error."""
    with pytest.raises(IllegalMove, match="cannot ready an instance that is stopped"):
        next_state(State.STOPPED, Move.READY)


def test_the_diagram_in_docs_is_printed_from_the_table() -> None:
    """docs/states.md = `python -m vllmd.core.states`."""
    assert (Path(__file__).parent.parent / "docs" / "states.md").read_text() == diagram()
