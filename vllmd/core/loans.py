"""Memory lent to something else: nothing of ours is put there while it lasts, and what had to go for it comes back after.

A loan counts from the moment it is given, whether its memory is free yet or not, so that nobody starts into it. What other
programs then take beyond what they had is taken as the use of the loan and not counted twice. Loans end with the daemon.
"""

from vllmd.core import room
from vllmd.core.candidates import answering
from vllmd.core.ledger import Account, Loan, device_label, takers
from vllmd.core.placing import coming_on
from vllmd.core.proofs import under_trial
from vllmd.core.starts import pump
from vllmd.core.states import State
from vllmd.core.victims import Offer, cheapest, leaving, price, worth
from vllmd.core.world import Instance, World
from vllmd.events import Lend
from vllmd.units import gib, gib_of, span

LENT = "(lent)"  # in the place of whom an instance makes room for


def lend(world: World, event: Lend, now: float) -> None:
    """Give a loan, or take all back (size 0). Refused with the sum where those who may go do not hold so much."""
    if event.size == 0:
        give_back(world, now)
        world.tell(event.ticket, 200, "nothing is lent any more")
        return
    accounts = [world.ledger.account(reading.id) for reading in answering(world)]
    named = [a for a in accounts if event.device in (None, a.reading.id, str(a.reading.index))]
    if not named:
        seen = ", ".join(f"{a.label} ({a.reading.id})" for a in accounts) or "none"
        world.tell(event.ticket, 404, f"there is no device {event.device!r} (seen: {seen})")
        return
    found = [(victims, a) for a in named if (victims := who_goes(world, a, event.size, now)) is not None]
    if not found:
        most = max(named, key=lambda a: a.untaken)
        world.tell(
            event.ticket, 409,
            f"cannot lend {gib(event.size)} of {most.label}: {gib_of(max(0, most.untaken), most.reading.total)} left, and what"
            f" may go does not suffice: {takers(most)}",
        )  # fmt: skip
        return
    victims, account = min(found, key=lambda each: (worth(each[0]), -each[1].untaken))
    loan = Loan(account.reading.id, event.size, now + event.seconds, account.external)
    world.ledger.loans.append(loan)
    for victim in victims:
        send(world, world.instances[victim.instance], now)
    world.note("lend", f"{gib(loan.size)} of {account.label} lent for {span(event.seconds)}", device=loan.device)
    world.tell(event.ticket, *describe(world, loan, now))


def who_goes(world: World, account: Account, size: int, now: float) -> tuple[Offer, ...] | None:
    """The cheapest set whose going frees so much; (): nobody has to; None: not even all of them suffice."""
    device = account.reading.id
    offered = [
        Offer(i.id, {device: held[device]}, price(world, i, now), i.used_at, now)
        for i in world.instances.values()
        if device in (held := world.ledger.held.get(i.id, {}))
        and not (i.spec.pinned or leaving(i) or under_trial(i))
        and i.state in (State.READY, State.ASLEEP, State.BACKOFF, State.WAITING)
    ]  # fmt: skip
    return cheapest({device: size - account.untaken - coming_on(world, device)}, offered)


def send(world: World, victim: Instance, now: float) -> None:
    """It goes, and comes back when the loan is over. One that sleeps ends: who asks for it starts it."""
    if victim.state is State.ASLEEP:
        room.evict(world, victim, LENT, now)
        return
    if victim.state is not State.READY:
        world.ledger.release(victim.id)
        return
    victim.evicted = victim.returns = True
    world.note("evict", f"its memory is lent; it comes back after that ({victim.under_way} under way)", victim)
    room.send_away(world, victim, LENT, now)


def describe(world: World, loan: Loan, now: float) -> tuple[int, str]:
    """200 and until when, once its memory is free; 202 and who is still to go."""
    account = world.ledger.account(loan.device)
    left = span(loan.until - now)
    if account.untaken >= 0:
        return 200, f"{gib(loan.size)} of {account.label} free for {left}"
    going = room.going_on(world, [loan.device])
    return 202, f"{gib(loan.size)} of {account.label} lent for {left}; freed when {', '.join(going) or 'others'} ended"


def expire(world: World, now: float) -> None:
    """Loans whose time is over."""
    over = [loan for loan in world.ledger.loans if loan.until <= now]
    for loan in over:
        world.ledger.loans.remove(loan)
        label = (
            device_label(world.ledger.readings[loan.device]) if loan.device in world.ledger.readings else loan.device
        )
        world.note("lend", f"{gib(loan.size)} of {label} are no longer lent", device=loan.device)
    if over:
        pump(world, now)


def give_back(world: World, now: float) -> None:
    for loan in world.ledger.loans:
        loan.until = now
    expire(world, now)
