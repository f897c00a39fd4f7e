"""What outlives the daemon on disk: nothing in it that makes no sense is believed, and what was written stays written."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from vllmd.edge.records import Records
from vllmd.edge.store import Store
from vllmd.facts import Learned, Proof
from vllmd.record import Record

GOOD = {"base": 1 << 30, "kv": 1 << 20, "phases": {"load": 1.5}, "total": 3.0}


@pytest.mark.parametrize(
    "change",
    [
        {"base": 0}, {"base": -(1 << 40)}, {"base": "1"}, {"base": 1e999}, {"base": None}, {"base": 1 << 70},
        {"kv": -1}, {"kv": [1]}, {"total": -1.0}, {"total": float("nan")}, {"total": float("inf")}, {"total": "soon"},
        {"phases": {"load": -0.5}}, {"phases": {"load": float("nan")}}, {"phases": [1]}, {"phases": None},
    ],
)  # fmt: skip
def test_a_need_that_no_start_can_have_taught_is_dropped_and_told(tmp_path: Path, change: dict[str, Any]) -> None:
    """A negative one would let others be promised more than there is. The one beside it counts."""
    (tmp_path / "needs.json").write_text(json.dumps({"odd": GOOD | change, "good": GOOD}))
    store = Store(tmp_path)
    if change == {"base": "1"}:  # read as it is meant
        assert store.learned()["odd"].base == 1
        return
    assert store.learned() == {"good": Learned(1 << 30, 1 << 20, {"load": 1.5}, 3.0)}
    (said,) = store.complaints()
    assert "needs.json: 1 of what was learned makes no sense" in said and "odd" in said


def test_what_makes_sense_is_read_back(tmp_path: Path) -> None:
    """As it was written; nothing is complained of."""
    needs = {"a": Learned(1, 0, {}, 0.0), "b": Learned(1 << 40, 1 << 30, {"load": 0.0}, 1e6)}
    store = Store(tmp_path)
    store.keep_learned(needs)
    assert store.learned() == needs
    assert store.complaints() == []


def test_a_new_name_is_on_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the rename the directory is written too: a power cut must not bring the old file back."""
    order: list[str] = []
    whole = os.fsync

    def fsync(fd: int) -> None:
        order.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        if order[-1] == "directory":
            assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".new")]
        whole(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    Store(tmp_path).keep_good({"a": {}})
    Records(tmp_path / "instances", "boot").write(Record("a", "a", "ready", 1))
    assert order == ["file", "directory", "file", "directory"]


def test_a_record_is_forgotten_with_what_is_noted_beside_it(tmp_path: Path) -> None:
    """How far its log was read, its shared memory; another model's notes stay."""
    records = Records(tmp_path, "boot")
    for name in ("a", "a.b"):
        records.write(Record(name, name, "ready", 1))
        for suffix in ("at", "shm"):
            (tmp_path / f"{name}.{suffix}").touch()
    records.remove("a")
    assert {path.name for path in tmp_path.iterdir()} == {"a.b.json", "a.b.at", "a.b.shm"}
    records.clear()
    assert list(tmp_path.iterdir()) == []


def test_proofs_of_sleep_are_kept_and_odd_ones_are_none(tmp_path: Path) -> None:
    """A model without a proof is ended instead of put to sleep: that is always right."""
    store, proof = Store(tmp_path), Proof(2, 1 << 30, 1 << 32, 0.5, 3.25)
    store.keep_proofs({"good": proof})
    assert Store(tmp_path).proofs() == {"good": proof}
    row = json.loads((tmp_path / "proofs.json").read_text())["good"]
    odd = [row | change for change in ({"level": 3}, {"residual": -1}, {"freed": 1 << 70}, {"wake_s": "soon"})] + [
        None,
        {},
    ]
    (tmp_path / "proofs.json").write_text(json.dumps({str(n): each for n, each in enumerate(odd)} | {"good": row}))
    assert store.proofs() == {"good": proof}
    (tmp_path / "proofs.json").write_text("[")
    assert store.proofs() == {}
    assert len(store.complaints()) == 1
