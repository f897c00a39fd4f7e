"""`vllmctl swap-test`, `sleep`, `wake`: a model's sleep, tested or asked for, and watched until it is done.

The wish is vllmd's once it has answered: Ctrl-C and --timeout end the watching only.
"""

from __future__ import annotations

import time

from vllmd.ctl.call import print_json, print_lines
from vllmd.ctl.faults import FAILED, OK, TIMEOUT, Fault, Garbled
from vllmd.ctl.feed import Feed
from vllmd.ctl.words import clean, field, listed, nested, number, pad, sized, span

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vllmd.ctl.call import Call

    Model = dict[str, Any]
    Until = Callable[[Model], bool]

HEAD = ("CYCLE", "ASLEEP IN", "KEEPS", "AWAKE IN", "ANSWER")
WIDTHS = (8, 11, 22, 10, 10)
LOST = 30.0  # seconds that a vllmd may be away


class Late(Fault):
    """--timeout is over."""

    code = TIMEOUT
    kind = "timeout"


def run(call: Call) -> int:
    """Test, with a line for each time that it slept and woke; 0 = its sleep is proved."""
    answer = call.client.post(call.path("/swap-test"), {}, timeout=60.0)
    if call.args.no_wait:
        return tell(call, answer)
    shown = [0]

    def over(model: Model) -> bool:
        test = nested(model, "swap_test")
        cycles = listed(test, "cycles")
        if not call.args.json:
            if cycles and not shown[0]:
                print_lines([row(HEAD)])
            for n, cycle in enumerate(cycles[shown[0] :], shown[0] + 1):
                print_lines([row(cells(n, test, cycle, labels))])
        shown[0] = len(cycles)
        return bool(test.get("result"))

    labels = {clean(d.get("id")): clean(d.get("label")) for d in listed(call.status(), "devices")}
    model = watch(call, over)
    test = nested(model, "swap_test")
    proved = test.get("proved") is True
    if call.args.json:
        print_json(test)
    else:
        word = "" if proved else "failed: "
        print_lines([*before(test, labels), f"{call.args.model}: {word}{clean(test.get('result'))}"])
    return OK if proved else FAILED


def cells(n: int, test: Model, cycle: Model, labels: dict[str, str]) -> tuple[str, ...]:
    """One time asleep and awake, as the table's row."""
    same = "same" if cycle.get("same") is True else "other" if cycle.get("same") is False else "answered"
    return (
        f"{n} of {field(test, 'of'):.0f}", f"{field(cycle, 'sleep_s'):.2f} s", memory(nested(cycle, "residual"), labels),
        f"{field(cycle, 'wake_s'):.2f} s", same,
    )  # fmt: skip


def memory(sizes: Model, labels: dict[str, str]) -> str:
    """ "GPU 0 1.2 GiB, GPU 1 1.1 GiB"."""
    return ", ".join(
        f"{labels.get(device, clean(device))} {sized(number(size) or 0)}" for device, size in sizes.items()
    )


def before(test: Model, labels: dict[str, str]) -> list[str]:
    """What it used awake, to compare with."""
    used = memory(nested(test, "before"), labels)
    return [f"awake it used {used}"] if used else []


def row(words: tuple[str, ...]) -> str:
    return "  ".join(pad(word, wide) for word, wide in zip(words, WIDTHS, strict=True)).rstrip()


def rest(call: Call) -> int:
    """`vllmctl sleep`: until it sleeps."""
    answer = call.client.post(call.path("/sleep"), {})
    if call.args.no_wait or answer.get("status") != 202:
        return tell(call, answer)
    return ended(call, watch(call, lambda model: model.get("state") in ("asleep", "stopped", "failed")), "asleep")


def wake(call: Call) -> int:
    """`vllmctl wake`: until it serves."""
    answer = call.client.post(call.path("/wake"), {})
    if call.args.no_wait or answer.get("status") != 202:
        return tell(call, answer)
    return ended(call, watch(call, lambda model: model.get("state") in ("ready", "stopped", "failed")), "ready")


def tell(call: Call, answer: Any) -> int:
    """vllmd's answer is all there is to say."""
    if not isinstance(answer, dict):
        raise Garbled("cannot read the answer of vllmd: it is no object")
    if call.args.json:
        print_json(answer)
    else:
        print_lines([clean(answer.get("message"))])
    return OK


def ended(call: Call, model: Model, wanted: str) -> int:
    """In which state it came to rest."""
    state = clean(model.get("state"))
    if call.args.json:
        print_json({"model": call.args.model, "state": state})
    else:
        why = clean(nested(model, "why").get("text"))
        print_lines([f"{call.args.model} is {state}" + (f": {why}" if why and state not in why else "")])
    return OK if state == wanted else FAILED


def watch(call: Call, done: Until) -> Model:
    """The model once it is `done`; each event of it is shown to `done`. Raises Fault when it is gone, or the time is over."""
    limit = None if call.args.timeout is None else time.monotonic() + call.args.timeout
    feed = Feed(call.client)
    try:
        model = feed.model(call.args.model)
        while model is not None and not done(model):
            if limit is not None and time.monotonic() > limit:
                raise Late(f"not done after {span(call.args.timeout)}; it goes on", f"vllmctl why {call.args.model}")
            if (feed.lost or 0.0) > LOST:
                raise Fault("cannot hear vllmd any more", "vllmctl status")
            feed.poll(0.5)
            model = feed.model(call.args.model)
        if model is None:
            raise Fault(f"{call.args.model} is no longer configured", "vllmctl status")
        return model
    finally:
        feed.close()
