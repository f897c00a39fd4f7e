"""The core's books: which cards, how much on each, what is learned, whose memory is whose, and what is said of it."""

from collections.abc import Sequence

import pytest

from tests.sim import DAEMON, GIB, Sim, settings, spec
from vllmd.core import plan, view
from vllmd.core.need import learned_key
from vllmd.core.states import State
from vllmd.events import KillTree, Printed, Reload, Remember, Terminate
from vllmd.facts import DeviceReading, EngineFacts, Figures, Inspection, ModelFacts
from vllmd.spec import Cause, DeviceRule, Overrun, RestartRule, Settings
from vllmd.units import MIB, parse_size

OOM = Cause("out-of-memory", "CUDA out of memory", "out of memory")


def share(sim: Sim, name: str) -> float:
    """--gpu-memory-utilization of a start."""
    launch = sim.inst(name).launch
    assert launch is not None
    return float(launch.argv[launch.argv.index("--gpu-memory-utilization") + 1])


def found(name: str) -> Inspection:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
    return Inspection(ModelFacts(f"/m/{name}", config, 10_000_000, "f"), EngineFacts("/bin/vllm", "0.32.0"), None)


# -- which cards ------------------------------------------------------------------------------------------------------


def test_two_sets_of_four_fit_on_eight_cards() -> None:
    """However many ways there are to choose four of eight."""
    sim = Sim(settings(spec("a", 7, gpus=4), spec("b", 7, gpus=4)), gpus={f"g{n}": 8 for n in range(8)})
    for name in "ab":
        sim.up(name)
    assert set(sim.inst("a").devices) | set(sim.inst("b").devices) == set(sim.totals)


@pytest.mark.parametrize("cards", [16, 64])
def test_a_set_is_found_among_many_cards(cards: int) -> None:
    """The ones with most room, in the order of their numbers."""
    sim = Sim(settings(spec("a", 7, gpus=8)), gpus={f"g{n:02}": 8 for n in range(cards)})
    for name in list(sim.totals)[: cards - 8]:
        sim.external[name] = 2 * GIB
    sim.up("a")
    assert sim.inst("a").devices == tuple(list(sim.totals)[cards - 8 :])


def test_a_set_is_made_of_equal_cards() -> None:
    """Two of 12 GiB rather than one of those and the one of 24, which has more room."""
    sim = Sim(settings(spec("a", 9, gpus=2)), gpus={"g0": 12, "g1": 24, "g2": 12})
    sim.up("a")
    assert sim.inst("a").devices == ("g0", "g2")


@pytest.mark.parametrize("gpus", [("0", "1"), 2])
def test_on_unequal_cards_each_is_reserved_what_the_share_takes_of_it(gpus: object) -> None:
    """vLLM takes the same share of every card's own total."""
    sim = Sim(settings(spec("a", 9, gpus=gpus), spec("b", 9, gpus=("1",))), gpus={"g0": 12, "g1": 24})
    sim.start("a")
    sim.inspect("a")
    held = sim.core.world.ledger.held["a"]
    assert held["g0"] == 9 * GIB
    assert held["g1"] >= share(sim, "a") * 24 * GIB + 500 * MIB
    ticket = sim.start("b")
    sim.inspect("b")
    assert sim.answers[ticket].status == 409


def test_a_pinned_set_on_unequal_cards_takes_the_same_of_each() -> None:
    """Its share is only checked against what is free: small enough for the larger card."""
    sim = Sim(settings(spec("a", 9, gpus=2, kv_cache=GIB)), gpus={"g0": 12, "g1": 24})
    sim.start("a")
    sim.inspect("a")
    assert sim.core.world.ledger.held["a"] == {"g0": 9 * GIB, "g1": 9 * GIB}
    assert share(sim, "a") * 24 <= 9


def test_a_share_that_is_too_much_for_the_larger_card_is_refused_with_that() -> None:
    """Its limit counts for what it is asked for."""
    rules = {"0": DeviceRule(0), "1": DeviceRule(0, 12 * GIB)}
    config = Settings(DAEMON, devices=rules, models={"a": spec("a", 9, gpus=2)})
    sim = Sim(config, gpus={"g0": 12, "g1": 24})
    ticket = sim.start("a")
    sim.inspect("a")
    assert sim.answers[ticket].status == 422
    assert "on GPU 1" in sim.answers[ticket].message or "budget of GPU 1 is 12.0 GiB" in sim.answers[ticket].message


def test_one_card_named_twice_is_refused() -> None:
    """By number and by UUID it is the same card: two shards do not go there."""
    sim = Sim(settings(spec("a", gpus=("0", "g0"))), gpus={"g0": 8, "g1": 8})
    ticket = sim.start("a")
    sim.inspect("a")
    assert sim.answers[ticket].status == 422 and sim.state("a") is State.FAILED
    assert 'GPU 0 twice ("0" and "g0")' in sim.answers[ticket].message


def test_a_place_where_nobody_measures_is_taken_first() -> None:
    """Two starts go in parallel on two cards, even where one has more room."""
    sim = Sim(settings(spec("a"), spec("b")), gpus={"g0": 24, "g1": 24})
    sim.external["g1"] = 5 * GIB
    for name in "ab":
        sim.start(name)
        sim.inspect(name)
    assert [sim.state(n) for n in "ab"] == [State.STARTING] * 2
    assert [sim.inst(n).devices for n in "ab"] == [("g0",), ("g1",)]


def test_a_set_avoids_the_card_where_somebody_measures() -> None:
    """Two of the three that are calm, though the fourth has most room."""
    sim = Sim(settings(spec("a", gpus=("3",)), spec("b", gpus=2)), gpus={"g0": 8, "g1": 8, "g2": 8, "g3": 8})
    sim.external |= {"g0": 7 * GIB // 2, "g1": 4 * GIB, "g2": 5 * GIB}
    for name in "ab":
        sim.start(name)
        sim.inspect(name)
    assert sim.inst("b").devices == ("g0", "g1") and sim.state("b") is State.STARTING


def test_a_small_model_leaves_the_large_card_free() -> None:
    """Of unequal cards the smallest that holds it; of equal ones the emptiest."""
    sim = Sim(settings(spec("small"), spec("big", 22), spec("next")), gpus={"g0": 24, "g1": 12, "g2": 12})
    for name in ("small", "big", "next"):
        sim.up(name)
    assert [sim.inst(n).devices for n in ("small", "big", "next")] == [("g1",), ("g0",), ("g2",)]


# -- whose memory -----------------------------------------------------------------------------------------------------


def test_memory_of_a_tree_that_is_being_killed_counts_once() -> None:
    """Its processes are dead, its memory is still in use by nobody: it is its own until it is back."""
    sim = Sim(settings(spec("a", 7), spec("b", 7)))
    sim.up("a")
    sim.live(5)
    sim.stop("a", now=True)
    sim.dies("a")
    assert sim.notes("external") == []
    device = view.devices(sim.core.world, sim.now)[0]
    assert (device["external"], device["reserved"]) == (0, 7 * GIB)
    ticket = sim.start("b")
    sim.inspect("b")
    assert sim.answers[ticket].status == 202 and sim.inst("b").waits_for == ("a",)
    sim.gone("a", back=False)
    assert sim.state("a") is State.STOPPING and sim.state("b") is State.WAITING
    sim.ghosts.clear()
    sim.look()
    assert sim.state("a") is State.STOPPED and sim.state("b") is State.STARTING


def test_two_that_end_together_are_both_awaited() -> None:
    """The second one's end begins while the first one's memory is nobody's."""
    sim = Sim(settings(spec("a"), spec("b"), spec("c", 7)))
    for name in "ab":
        sim.up(name)
    sim.live(5)
    for name in "ab":
        sim.stop(name, now=True)
        sim.dies(name)
    for name in "ab":
        sim.gone(name, back=False)
    assert sim.core.world.ledger.account("GPU-a").external == 0
    ticket = sim.start("c")
    sim.inspect("c")
    assert sim.answers[ticket].status == 202
    sim.ghosts.clear()
    sim.look()
    assert sim.state("c") is State.STARTING


def test_what_another_program_takes_meanwhile_is_no_leak() -> None:
    """It has a name. Between the last look and the end it grew by a gigabyte."""
    sim = Sim(settings(spec("a")))
    sim.up("a")
    sim.live(5)
    sim.programs["GPU-a"] = {"firefox": GIB}
    sim.stop("a")
    sim.now += 0.1
    sim.breaks("a", status=0)
    sim.gone("a")
    assert sim.state("a") is State.STOPPED and sim.notes("leak") == []


def test_memory_that_nobody_has_is_awaited_beside_a_program_that_grows() -> None:
    """The program explains its own part only."""
    sim = Sim(settings(spec("a")))
    sim.up("a")
    sim.live(5)
    sim.stop("a", now=True)
    sim.programs["GPU-a"] = {"firefox": GIB}
    sim.gone("a", back=False)
    assert sim.state("a") is State.STOPPING
    sim.ghosts.clear()
    sim.look()
    assert sim.state("a") is State.STOPPED


def test_a_lower_limit_is_not_blamed_on_other_programs() -> None:
    """A reload offers less than is promised: said as what it is."""
    sim = Sim(settings(spec("a"), spec("b", 1)))
    sim.up("a")
    sim.send(Reload(settings(spec("a"), spec("b", 1), limit=2)))
    sim.look()
    sim.look()
    assert sim.notes("external") == []
    assert len(sim.notes("limit")) == 1
    assert "models hold 1.0 GiB more than the 2.0 GiB they may take together now" in sim.notes("limit")[0]
    assert sim.state("a") is State.READY
    ticket = sim.start("b")
    sim.inspect("b")
    assert sim.answers[ticket].status == 409


def test_a_device_takes_each_key_from_its_most_special_table() -> None:
    """UUID, else index, else "*": a reserve of its own does not lift the limit of all."""
    rules = {"*": DeviceRule(None, 4 * GIB), "0": DeviceRule(GIB, None), "g1": DeviceRule(None, 2 * GIB)}
    sim = Sim(Settings(DAEMON, devices=rules), gpus={"g0": 8, "g1": 8})
    zero, one = (sim.core.world.ledger.account(name) for name in ("g0", "g1"))
    assert (zero.reserve, zero.budget) == (GIB, 4 * GIB)
    assert (one.reserve, one.budget) == (512 * MIB, 2 * GIB)


# -- the measuring window ---------------------------------------------------------------------------------------------


def test_a_stop_at_once_waits_while_a_neighbour_measures_unless_it_is_repeated() -> None:
    """What comes free in the window would become the neighbour's KV cache."""
    for again in (False, True):
        sim = Sim(settings(spec("a"), spec("b")))
        sim.up("a")
        sim.start("b")
        sim.inspect("b")
        ticket = sim.stop("a", now=True)
        assert sim.count(KillTree) == 0 and "when b has measured" in sim.answers[ticket].message
        if again:
            sim.stop("a", now=True)
            assert sim.count(KillTree) == 1 and sim.inst("b").disturbed
        else:
            sim.spawned("b")
            sim.measured("b")
            assert sim.count(KillTree) == 1 and sim.count(Terminate) == 0 and not sim.inst("b").disturbed


def test_a_stop_at_once_of_one_whose_drain_is_held_waits_too() -> None:
    """The first wish was a drain."""
    sim = Sim(settings(spec("a"), spec("b")))
    sim.up("a")
    sim.start("b")
    sim.inspect("b")
    sim.stop("a")
    sim.stop("a", now=True)
    assert sim.count(KillTree) == 0
    sim.measured("b")
    assert sim.count(KillTree) == 1 and sim.count(Terminate) == 0


def test_a_start_that_a_crash_beside_it_fed_measures_again_once() -> None:
    """It took what came free while it measured. Alone it gets what it was promised."""
    sim = Sim(settings(spec("a"), spec("b")))
    sim.up("a")
    sim.live(5)
    sim.start("b")
    sim.inspect("b")
    sim.spawned("b")
    sim.breaks("a")
    sim.gone("a", OOM)
    sim.measured("b")
    sim.ready("b")
    sim.uses["b"] = 5 * GIB
    sim.look()
    assert sim.state("b") is State.DRAINING and sim.count(Remember) == 1
    sim.breaks("b", status=0)
    sim.gone("b")
    sim.up("b")
    sim.look()
    assert sim.state("b") is State.READY  # a second time it is its own
    assert (sim.inst("b").restarts, sim.inst("b").failures) == (0, [])


# -- what is learned --------------------------------------------------------------------------------------------------


def run(sim: Sim, *uses: float) -> None:
    """One life of model "a" that uses so many GiB, look by look."""
    sim.up("a")
    for size in uses:
        sim.uses["a"] = int(size * GIB)
        sim.live(5)
    sim.stop("a", now=True)
    sim.gone("a")


def base(sim: Sim) -> float:
    return sim.core.world.learned[sim.inst("a").key].base / GIB


def test_an_idle_run_does_not_make_a_model_smaller() -> None:
    """The most that was seen counts until the model, its flags or its card change."""
    sim = Sim(settings(spec("a", None, kv_cache=GIB // 2)), gpus={"cpu": 16})
    run(sim, 1.8, 2.3)  # more than was estimated
    for size in (1.8, 2.3):
        assert base(sim) == pytest.approx(1.8)
        run(sim, size)
    assert len(sim.notes("overrun")) == 1


@pytest.mark.parametrize("vram", [3.0, None])
def test_a_model_that_grows_beyond_its_vram_is_restarted_with_backoff_and_counted(vram: float | None) -> None:
    """on_overrun = "restart": what exceeds a given vram is not learned, or no start would be possible any more. What grows
    without one gets more the next time."""
    rule = RestartRule(max_failures=3)
    sim = Sim(settings(spec("a", vram, on_overrun=Overrun.RESTART, restart=rule, kv_cache=GIB)))
    sim.start("a")
    for failures in (1, 2):
        sim.up("a")
        sim.live(5)
        sim.uses["a"] = 5 * GIB
        sim.live(20)
        if vram is None and failures == 2:
            assert sim.state("a") is State.READY  # it has what it takes now
            return
        assert sim.state("a") is State.DRAINING
        sim.uses.clear()
        sim.breaks("a", status=0)
        sim.gone("a")
        assert sim.state("a") is State.BACKOFF and len(sim.inst("a").failures) == failures
        assert sim.inst("a").last is not None and sim.inst("a").last.kind == "overrun"  # type: ignore[union-attr]
        text = view.model(sim.core.world, sim.inst("a"), sim.now)["why"]["text"]
        assert text.startswith("stopped ") and "GiB more than reserved (on_overrun = restart)" in text
        sim.live(5)
        assert sim.inst("a").restarts == failures and sim.state("a") is State.WAITING


def test_a_need_is_learned_for_the_card_and_the_environment() -> None:
    """Another make, another size, another variable: another need. Which of two equal cards it was does not matter."""

    def card(name: str, total: int, ident: str = "g0") -> Sequence[DeviceReading]:
        return (DeviceReading(ident, "gpu", 0, name, total, 0, total, total),)

    model, facts = spec("a"), found("a")
    known = learned_key(model, facts, card("L4", 24 * GIB))
    assert known == learned_key(model, facts, card("L4", 24 * GIB, "g7"))
    others = [
        learned_key(model, facts, card("L40S", 24 * GIB)),
        learned_key(model, facts, card("L4", 12 * GIB)),
        learned_key(spec("a", env={"VLLM_ATTENTION_BACKEND": "FLASHINFER"}), facts, card("L4", 24 * GIB)),
        learned_key(model, facts, (*card("L4", 24 * GIB), *card("L4", 24 * GIB, "g1"))),
    ]
    assert len({known, *others}) == 5


# -- what can never fit -----------------------------------------------------------------------------------------------


def test_what_can_never_fit_has_failed_from_the_start() -> None:
    """Said when the daemon starts, not when somebody wants the model; all others go on."""
    models = (
        spec("a", 20),
        spec("b", autostart=True),
        spec("c", 20, autostart=True),
        spec("d", None, kv_cache=9 * GIB),
    )
    sim = Sim(settings(*models))
    assert [sim.state(n) for n in "abcd"] == [State.FAILED, State.WAITING, State.FAILED, State.FAILED]
    assert "vram: 20.0 GiB can never fit, the largest budget is 8.0 GiB of GPU 0" in sim.inst("a").cause.text  # type: ignore[union-attr]
    assert "models.d.kv_cache" in sim.inst("d").cause.text  # type: ignore[union-attr]


def test_a_limit_that_is_raised_lets_it_start() -> None:
    """What failed for the limit is thought over at the reload: started if it was to start, else stopped."""
    models = (spec("a", 6), spec("c", 6, autostart=True))
    sim = Sim(settings(*models, limit=4), gpus={"g0": 8, "g1": 8})
    assert [sim.state(n) for n in "ac"] == [State.FAILED, State.FAILED]
    sim.send(Reload(settings(*models, limit=7)))
    assert [sim.state(n) for n in "ac"] == [State.STOPPED, State.WAITING]
    assert sim.inst("a").cause is None


def test_a_silent_device_is_not_judged() -> None:
    """What it offers is not known."""
    sim = Sim(settings(spec("a", 20)), blind=True)
    assert sim.state("a") is State.STOPPED


# -- what is said -----------------------------------------------------------------------------------------------------


def test_a_refusal_names_what_helps_and_its_remedies_add_the_numbers() -> None:
    """With a given vram it is vram that can be lowered, to what is free; tried before it is proposed."""
    sim = Sim(settings(spec("a", 5), spec("b", 5)))
    sim.up("a")
    ticket = sim.start("b")
    sim.inspect("b")
    answer = sim.answers[ticket]
    assert answer.message.endswith("a 5.0 GiB (stop a, or lower vram)")
    assert answer.remedies == ("vllmctl stop a", 'models.b.vram = "3GiB"')
    sim.send(Reload(settings(spec("a", 5), spec("b", 3)), frozenset({"b"})))
    sim.up("b")
    assert sim.state("b") is State.READY


def test_a_refusal_without_a_given_vram_names_the_cache() -> None:
    """How much of it would fit now."""
    sim = Sim(settings(spec("a", 5), spec("b", None, kv_cache=5 * GIB)))
    sim.up("a")
    ticket = sim.start("b")
    sim.inspect("b")
    answer = sim.answers[ticket]
    assert "(stop a, or lower kv_cache)" in answer.message
    (size,) = [r.partition(" = ")[2] for r in answer.remedies if r.startswith("models.b.kv_cache")]
    smaller = spec("b", None, kv_cache=parse_size(size.strip('"')))
    sim.send(Reload(settings(spec("a", 5), smaller), frozenset({"b"})))
    sim.start("b")
    sim.inspect("b")
    assert sim.state("b") is State.STARTING and smaller.kv_cache > 1.4 * GIB  # type: ignore[operator]


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_does_not_depend_on_the_order() -> None:
    """Which of two starts first decides whether both fit; that they can is what is told."""
    for names in (("any", "fixed"), ("fixed", "any")):
        sim = Sim(settings(spec("any", 6), spec("fixed", 10, gpus=("0",))), gpus={"g0": 12, "g1": 16})
        answer = plan.plan(sim.core.world, {n: found(n) for n in names}, together=True)
        assert all(row["fits"] for row in answer["models"])
        assert {row["model"]: row["beside"] for row in answer["models"]} == {"any": ["fixed"], "fixed": ["any"]}


def test_a_plan_tries_the_largest_first_too() -> None:
    """The two small ones alone spread over both cards, where neither leaves room for the large one."""
    sizes = {"a": 3.0, "b": 3.0, "c": 7.0}
    sim = Sim(settings(*(spec(n, size) for n, size in sizes.items())), gpus={"g0": 8, "g1": 8})
    answer = plan.plan(sim.core.world, {n: found(n) for n in sizes}, together=True)
    assert all(row["fits"] for row in answer["models"]) and answer["text"] == "all fit together"


def test_a_plan_of_all_says_of_each_whether_it_fits_alone_and_with_whom() -> None:
    """Without names nobody is left out for standing behind another."""
    models = (spec("a", 5), spec("b", 5), spec("c", 3), spec("d", 20))
    sim = Sim(settings(*models))
    answer = plan.plan(sim.core.world, {m.name: found(m.name) for m in models}, together=False)
    rows = {row["model"]: row for row in answer["models"]}
    assert [rows[n]["fits"] for n in "abcd"] == [True, True, True, False]
    assert [rows[n]["beside"] for n in "abcd"] == [["c"], ["c"], ["a", "b"], []]
    assert not rows["d"]["alone"]
    named = plan.plan(sim.core.world, {m.name: found(m.name) for m in models[:2]}, together=True)
    second = named["models"][1]
    assert (second["fits"], second["alone"]) == (False, True)
    assert "it fits alone on GPU 0" in second["text"]
    assert named["text"] == "these 2 do not fit together: b left out"


def test_printed_figures_of_a_ready_engine_change_nothing() -> None:
    """Its window is over."""
    sim = Sim(settings(spec("a")))
    sim.up("a")
    sim.send(Printed("a", 1, Figures(kv_bytes=7 * GIB), True))
    assert sim.inst("a").figures.kv_bytes == GIB
