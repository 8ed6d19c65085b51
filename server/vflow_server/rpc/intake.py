"""The intake: which messages may be on the way at the same time, and for how long.

gRPC says neither how long a message is nor how much of it has come, before all of it is there. It buffers up to 64 KiB
of a call's message by itself, and the rest only once the message is read. So the moment of reading is what can be
chosen. A reading takes a *place*, which stands for the longest message that there can be. If somebody waits for a
place, a reading that has not ended promptly can lose its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import exp
from typing import Any

from vflow_server.rpc.errors import CapacityExhausted, ServiceError, message_not_received

SHORT = 64 * 1024
"""Bytes of a message that comes promptly, since gRPC buffers as much before it is read. Shorter ones are not counted:
the number of calls bounds them."""

PROMPT_PLACES = 2
"""Places that no slow message keeps while others wait, so that there is always one for messages that come promptly."""

PACE = 32 << 20
"""Bytes that all senders together may send in a second, once they have used up their :data:`BURST`. Long messages keep
the event loop busy for as long as it takes to copy them."""

BURST = 64 << 20
"""Bytes that all senders together may send ahead of their pace."""

LOOP_SECOND = PACE * 10
"""Bytes that a second of the event loop counts for: reading what they send may take a tenth of it, once the burst is
used up. To read text takes twenty times as long as to copy a picture."""

CALL = 32 << 10
"""Bytes that a call counts for, beside those of its message: it takes the event loop's time, too."""

HEAVY = 0.1
"""Seconds of places that a sender has used lately, after which it leaves the last place to others. Messages that come
promptly take milliseconds."""

MEMORY = 10.0
"""Seconds after which what a sender has used counts for a third."""

LOOKS = 3
"""Looks at which a message must not have come yet, to count as slow. After the event loop itself was held up, a message
that has come long ago is only noticed at the second look."""

_SOON = 0.01

_LEAVING = 0.05
"""Seconds in which gRPC usually lets go of a message whose call has ended."""

# Each call runs in its own task and context.
_release: ContextVar[Callable[[], None]] = ContextVar("release")
_charge: ContextVar[Callable[[float], None]] = ContextVar("charge")


@dataclass(frozen=True)
class Bounds:
    """The bounds of one intake.

    Attributes:
        memory: bytes of messages in all: the places of those on the way, and the length of those in use.
        most_bytes: bytes of one message at most; the size of a place.
        waiting: calls that may wait for a place.
        waiting_each: calls of one sender that may wait.
        prompt: seconds after which a reading can lose its place to others.
        patience: seconds after which it can lose even a place that slow messages may keep.
        longest: seconds that a message may take in any case, and those that a call may wait for a place.
        resource: what a refusal says is exhausted.
    """

    memory: int
    most_bytes: int
    waiting: int = 1024
    waiting_each: int = 128
    prompt: float = 0.25
    patience: float = 10.0
    longest: float = 60.0
    resource: str = "messages"

    @property
    def most_held(self) -> int:
        """Bytes of messages in use at most."""
        return self.memory - PROMPT_PLACES * self.most_bytes

    @property
    def most_held_each(self) -> int:
        """Bytes of one sender's messages in use at most; with less of room than that left, others can still send."""
        return max(self.most_held - self.most_bytes, self.most_bytes)


@dataclass(eq=False)
class _Reading:
    """A message on the way."""

    sender: _Sender
    lost: asyncio.Future[None]
    """Done once the place was taken away."""
    begun: float = field(default_factory=time.monotonic)
    looks: int = 0
    """How often it was found not to have ended."""
    lost_at: float = 0.0

    @property
    def age(self) -> float:
        return time.monotonic() - self.begun

    def lose(self) -> None:
        """Take the place away."""
        if not self.lost.done():
            self.lost.set_result(None)
            self.lost_at = time.monotonic()


@dataclass(eq=False)
class _Sender:
    """What one sender waits for, sends and has used."""

    waiting: deque[asyncio.Future[_Reading]] = field(default_factory=deque)
    readings: set[_Reading] = field(default_factory=set)
    asked: float = 0.0
    held: int = 0
    owed: float = 0.0
    _used: float = 0.0
    _used_at: float = 0.0

    @property
    def used(self) -> float:
        """Seconds of places used lately."""
        return self._used * exp((self._used_at - time.monotonic()) / MEMORY)

    @property
    def load(self) -> float:
        """Seconds of places used lately, with those of the readings that go on."""
        return self.used + sum(reading.age for reading in self.readings)

    def use(self, seconds: float) -> None:
        """Count ``seconds`` of a place as used."""
        self._used, self._used_at = self.used + seconds, time.monotonic()

    @property
    def forgettable(self) -> bool:
        return not (self.waiting or self.readings or self.held or self.owed) and self.used < 0.001


class Intake:
    """Gives places to senders. Belongs to the event loop's thread.

    Who has used least goes first. So a sender whose messages come promptly hardly waits, whatever others do.

    Args:
        bounds: what may be on the way.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._senders: dict[str, _Sender] = {}
        self._remembered = 64
        self._asking: set[_Sender] = set()
        self._owing: set[_Sender] = set()
        self._readings: set[_Reading] = set()
        self._paced_at = time.monotonic()
        self._held = 0
        self._newest_first = True
        self._timer: asyncio.TimerHandle | None = None
        self._stopping: ServiceError | None = None

    @property
    def waiting(self) -> int:
        """Number of calls that wait for a place."""
        return sum(len(sender.waiting) for sender in self._asking)

    @property
    def readings(self) -> int:
        """Number of messages on the way."""
        return len(self._readings)

    @property
    def bytes_held(self) -> int:
        """Bytes of messages in use; short ones are not counted."""
        return self._held

    async def receive(self, name: str, read: Callable[[], Coroutine[Any, Any, bytes]]) -> bytes:
        """Await ``read()`` when there is a place for its message.

        Args:
            name: the sender.
            read: reads the message. It is not cancelled when it takes too long, since gRPC would not release what had
                come. It ends with its call.

        Raises:
            CapacityExhausted: too many calls wait for a place, or others waited while the message was slow.
            ServiceError: MESSAGE_NOT_RECEIVED, or the error given to :meth:`stop`.
        """
        place = await self._place(name)
        reading = asyncio.create_task(read())
        reading.add_done_callback(_forget)
        reading.add_done_callback(lambda _: self._leave(place))
        either: set[asyncio.Future[Any]] = {reading, place.lost}
        await asyncio.wait(either, timeout=self._bounds.longest, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            message = reading.result()
            self.charge(name, len(message))
            return message
        if self._stopping is not None:
            raise self._stopping
        if place.lost.done():
            refusal = self._exhausted("the message of this call was slow while others waited; send it again")
            refusal.awaited = True  # gRPC lets go of the message, and so of the place, when the call ends
            raise refusal
        raise message_not_received(self._bounds.longest)

    @contextmanager
    def holding(self, name: str, size: int) -> Iterator[Callable[[], None]]:
        """Count a message of ``size`` bytes as in use until the block ends, or until what this yields is called.

        Raises:
            CapacityExhausted: too many bytes are in use.
        """
        sender, size = self._sender(name), size if size > SHORT else 0
        if size and (self._held + size > self._bounds.most_held or sender.held + size > self._bounds.most_held_each):
            raise self._exhausted(
                f"messages in use may take {self._bounds.most_held} bytes, and {self._bounds.most_held_each} of one "
                "sender; retry when some calls have ended"
            )
        sender.held += size
        self._held += size

        def release() -> None:
            nonlocal size
            sender.held -= size
            self._held -= size
            size = 0
            self._grant()

        try:
            yield release
        finally:
            release()

    def charge(self, name: str, size: int) -> None:
        """Count ``size`` bytes against the pace of a sender."""
        sender = self._sender(name)
        sender.owed += size
        self._owing.add(sender)

    def charge_time(self, name: str, seconds: float) -> None:
        """Count ``seconds`` of the event loop against the pace of a sender."""
        self.charge(name, int(seconds * LOOP_SECOND))

    def stop(self, refusal: ServiceError) -> None:
        """End all readings, and refuse further ones, with ``refusal``."""
        self._stopping = refusal
        for sender in self._asking:
            for waiter in sender.waiting:
                if not waiter.done():
                    waiter.set_exception(refusal)
        for reading in self._readings:
            reading.lose()

    async def _place(self, name: str) -> _Reading:
        if self._stopping is not None:
            raise self._stopping
        self.charge(name, CALL)
        sender = self._sender(name)
        if not self._asking and self._may_begin(sender):
            return self._begin(sender)
        self._make_way(sender)
        waiter: asyncio.Future[_Reading] = asyncio.get_running_loop().create_future()
        sender.waiting.append(waiter)
        sender.asked = time.monotonic()
        self._asking.add(sender)
        self._grant()
        try:
            async with asyncio.timeout(self._bounds.longest):
                return await waiter
        except BaseException as error:
            if waiter in sender.waiting:
                self._take_out(sender, waiter)
            elif not waiter.cancelled() and waiter.exception() is None:
                self._leave(waiter.result())  # the place came too late
            if isinstance(error, TimeoutError):
                raise self._exhausted("there was no place for the message of this call; send it again") from None
            raise

    def _make_way(self, newcomer: _Sender) -> None:
        """Make room among the waiting calls. If there are too many, the sender with most of them loses its oldest."""
        if len(newcomer.waiting) >= self._bounds.waiting_each:
            raise self._exhausted("too many calls wait for a place for their messages; retry later")
        if self.waiting < self._bounds.waiting:
            return
        longest = max(self._asking, key=lambda sender: len(sender.waiting))
        refusal = self._exhausted("too many calls wait for a place for their messages; retry later")
        if len(longest.waiting) <= len(newcomer.waiting) + 1:
            raise refusal
        oldest = longest.waiting[0]
        self._take_out(longest, oldest)
        if not oldest.done():
            oldest.set_exception(refusal)

    def _take_out(self, sender: _Sender, waiter: asyncio.Future[_Reading]) -> None:
        sender.waiting.remove(waiter)
        if not sender.waiting:
            self._asking.discard(sender)

    def _may_begin(self, sender: _Sender) -> bool:
        """Whether there is a place for ``sender``. The last one is for senders who use little, and have no other."""
        return (
            len(self._readings) < self._places_for(sender)
            and len(sender.readings) < max(self._places - 1, 1)
            and self._seconds_ahead(sender) <= 0
        )

    def _places_for(self, sender: _Sender) -> int:
        return max(self._places - 1, 1) if sender.used > HEAVY else self._places

    def _begin(self, sender: _Sender) -> _Reading:
        reading = _Reading(sender, asyncio.get_running_loop().create_future())
        sender.readings.add(reading)
        self._readings.add(reading)
        return reading

    def _leave(self, reading: _Reading) -> None:
        """Free a place, once gRPC has let go of its message."""
        reading.sender.readings.discard(reading)
        self._readings.discard(reading)
        reading.sender.use(reading.age)
        self._grant()

    def _grant(self) -> None:
        """Give free places to those who wait, or take one away from a slow message if there is none."""
        while ready := [sender for sender in self._asking if self._may_begin(sender)]:
            sender = min(ready, key=self._claim)
            self._newest_first = not self._newest_first
            waiter = sender.waiting[0]
            self._take_out(sender, waiter)
            if not waiter.done():
                waiter.set_result(self._begin(sender))
        if self._asking:
            self._displace()
            self._look_again()

    def _displace(self) -> None:
        """Take places away from slow messages, for those who wait and have used least."""
        now = time.monotonic()
        for reading in self._readings:
            reading.looks += 1
        leaving = sum(0 < now - each.lost_at < _LEAVING for each in self._readings)
        asking = [sender for sender in self._asking if self._seconds_ahead(sender) <= 0]
        for sender in sorted(asking, key=self._claim)[leaving:]:
            victim = self._victim(sender)
            if victim is not None:
                victim.lose()

    def _victim(self, sender: _Sender) -> _Reading | None:
        """The slow message that loses its place to ``sender``; None if all slow ones may stay."""
        load = sender.load
        slow = [
            each
            for each in self._readings
            if each.age >= self._bounds.prompt
            and each.looks >= LOOKS
            and not each.lost.done()
            and each.sender.load >= load
        ]
        if len(slow) <= self._places - PROMPT_PLACES:  # as many may be slow
            slow = [
                each
                for each in slow
                if each.age >= self._bounds.patience or len(each.sender.readings) > len(sender.readings) + 1
            ]
        if len(self._readings) < self._places_for(sender):  # there is a place, but not for a sender with so many
            slow = [each for each in slow if each.sender is sender]
        return max(slow, key=self._blame, default=None)

    def _claim(self, sender: _Sender) -> tuple[int, float]:
        """Orders senders: who has used least goes first, and of those who have used as much, the newest and the oldest
        by turns. So one that comes among many hardly waits, and nobody waits for ever."""
        return int(sender.load / HEAVY), -sender.asked if self._newest_first else sender.asked

    def _blame(self, reading: _Reading) -> tuple[int, float, float]:
        """Orders slow messages: the last one loses its place first. The youngest has most to come, for some time."""
        impatient = reading.age >= self._bounds.patience
        return len(reading.sender.readings), reading.sender.used, reading.age if impatient else -reading.age

    def _look_again(self) -> None:
        """Grant again when the next message becomes slow, or the next sender has kept its pace."""
        if self._timer is not None:
            return
        bounds = self._bounds
        times = [bounds.prompt / LOOKS]
        times += [bounds.prompt - each.age for each in self._readings if each.age < bounds.prompt]
        times += [seconds for each in self._asking if (seconds := self._seconds_ahead(each)) > 0]

        def look() -> None:
            self._timer = None
            self._grant()

        self._timer = asyncio.get_running_loop().call_later(max(min(times), _SOON), look)

    @property
    def _places(self) -> int:
        """Number of places, beside what the messages in use leave."""
        return (self._bounds.memory - self._held) // self._bounds.most_bytes

    def _seconds_ahead(self, sender: _Sender) -> float:
        """Seconds until ``sender`` has kept its pace and may send again; 0 or less if it may now."""
        elapsed = time.monotonic() - self._paced_at
        if elapsed > _SOON and self._owing:
            paid = elapsed * PACE / len(self._owing)
            for each in list(self._owing):
                each.owed = max(each.owed - paid, 0.0)
                if not each.owed:
                    self._owing.discard(each)
            self._paced_at += elapsed
        elif elapsed > _SOON:
            self._paced_at += elapsed
        owing = max(len(self._owing), 1)
        return (sender.owed * owing - BURST) / PACE

    def _sender(self, name: str) -> _Sender:
        if name not in self._senders:
            if len(self._senders) >= self._remembered:
                self._senders = {each: sender for each, sender in self._senders.items() if not sender.forgettable}
                self._remembered = max(2 * len(self._senders), 64)
            self._senders[name] = _Sender()
        return self._senders[name]

    def _exhausted(self, why: str) -> CapacityExhausted:
        return CapacityExhausted(self._bounds.resource, why)


def _forget(reading: asyncio.Task[Any]) -> None:
    """Let a reading end whose message nobody wants any more."""
    if not reading.cancelled():
        reading.exception()


def bind_request(release: Callable[[], None], charge: Callable[[float], None]) -> None:
    """Set what the request of the call that is served in this context holds and costs.

    Args:
        release: what :func:`let_go_of_request` calls.
        charge: takes the seconds of :func:`reading_request`.
    """
    _release.set(release)
    _charge.set(charge)


def let_go_of_request() -> None:
    """Say that the request of the call that is served in this context is not in memory any more."""
    _release.get()()


@contextmanager
def reading_request() -> Iterator[None]:
    """Charge the block, which waits for nothing, to the sender of the request that it reads."""
    begun = time.thread_time()  # what it waits for others to let go of the processor is not the sender's
    try:
        yield
    finally:
        _charge.get()(time.thread_time() - begun)
