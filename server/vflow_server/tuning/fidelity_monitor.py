"""The fidelity monitor: compares a share of the turns with the unpruned model.

It rolls the active strategy back if its mean cosine falls below a floor. Tenants count equally, however many turns each
of them takes, and most of them must be below the floor: none of them decides alone what all others get. Belongs to the
event loop's thread, except the methods that turns call.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import fmean

import structlog

from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.engine import Engine, Steps
from vflow_server.engine.idle_work import idle_work
from vflow_server.images.store import PictureStore
from vflow_server.kv.manager import KVCacheManager
from vflow_server.rpc.errors import ServiceError
from vflow_server.strategies.strategies import StrategyStore
from vflowopt.media.picture import Identity, Picture
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.replay import AnsweredTurn, Fidelity, Replay

MOST_WAITING = 16
"""Turns that may wait for their comparison; further ones are skipped, of the tenant that has the most of them."""

MOST_TENANTS = 256
"""Tenants whose latest compared turns are remembered: those that were compared last."""

_Watched = tuple[AnsweredTurn, Mapping[Identity, Picture]]
"""A turn, and its pictures."""

log = structlog.get_logger(__name__)


@dataclass
class FidelityTotals:
    """Counters and sums of one strategy since the service started. They only grow.

    Attributes:
        watched: turns that were compared.
        skipped: turns that were chosen but not compared, because a picture was no longer held or too many turns waited.
        cosine_sum: sum of the cosines of the turns that were compared.
        tokens: tokens of their answers.
        tokens_agreed: see :class:`Fidelity`.
        rollbacks: how often the monitor rolled the strategy back.
    """

    watched: int = 0
    skipped: int = 0
    cosine_sum: float = 0.0
    tokens: int = 0
    tokens_agreed: int = 0
    rollbacks: int = 0

    def add(self, turn: Fidelity) -> None:
        """Add the result of a turn."""
        self.watched += 1
        self.cosine_sum += turn.cosine
        self.tokens += turn.tokens
        self.tokens_agreed += turn.tokens_agreed

    @property
    def cosine(self) -> float | None:
        """Mean cosine; None before the first turn."""
        return self.cosine_sum / self.watched if self.watched else None

    @property
    def agreement(self) -> float | None:
        """Share of the answers' tokens that agree, 0 to 1; None before the first."""
        return self.tokens_agreed / self.tokens if self.tokens else None


class FidelityMonitor:
    """Compares turns with the unpruned model, one at a time, in idle time.

    Args:
        share: share of the turns to compare, 0 to 1.
        floor: mean cosine below which the active strategy is rolled back; None: it never is.
        window: number of the latest compared turns of a tenant that its mean is taken of. While all tenants have fewer
            together, nothing is rolled back.
        judges: the tenants that count; None: all.
        engine: runs the comparisons.
        runtime: the model.
        kv: frees KV pages for them.
        encoder: encodes the pictures again.
        strategies: the strategies; the active one may be rolled back.
        pictures: holds the pictures of recent turns.

    Attributes:
        totals: the totals by resource name of the strategy.
    """

    def __init__(
        self,
        *,
        share: float,
        floor: float | None,
        window: int,
        judges: frozenset[str] | None,
        engine: Engine,
        runtime: Runtime,
        kv: KVCacheManager,
        encoder: EncoderThread,
        strategies: StrategyStore,
        pictures: PictureStore,
    ) -> None:
        self.totals: defaultdict[str, FidelityTotals] = defaultdict(FidelityTotals)
        self._share = share
        self._floor = floor
        self._engine = engine
        self._runtime = runtime
        self._kv = kv
        self._encoder = encoder
        self._strategies = strategies
        self._pictures = pictures
        self._loop = asyncio.get_running_loop()
        # By tenant; the tenant that was served longest ago comes first.
        self._waiting: OrderedDict[str, deque[_Watched]] = OrderedDict()
        self._submitted = asyncio.Event()
        self._enough = window
        self._judges = judges
        # The windows belong to this activation: another one, even of the same strategy, begins new ones.
        self._windows: OrderedDict[str, deque[float]] = OrderedDict()
        # By activation, of which there is one: two of the tenants that used it, whether they were compared or not.
        self._users: dict[str, set[str]] = {}
        self._etag = strategies.etag
        self._resigned = False

    def chooses(self, tenant: str, strategy_name: str, *, pictures: int) -> bool:
        """Whether to compare the turn that has just ended. For any thread.

        Args:
            tenant: the tenant of its session.
            strategy_name: resource name of its strategy.
            pictures: number of pictures that the strategy has compressed in its session.
        """
        if pictures and strategy_name == self._strategies.active.name:
            etag = self._strategies.etag
            if (users := self._users.get(etag)) is None:
                users = set()
                self._users = {etag: users}
            if len(users) < 2:
                users.add(tenant)
        return random.random() < self._share

    def submit(self, turn: AnsweredTurn) -> None:
        """Queue ``turn`` for comparison. For any thread."""
        with suppress(RuntimeError):  # the event loop is closed: the service has ended
            self._loop.call_soon_threadsafe(self._put, turn)

    async def watch_forever(self) -> None:
        """Compare the turns that were submitted; never returns."""
        while True:
            turn, pictures = await self._next()
            totals = self.totals[turn.strategy_name]
            try:
                fidelity = await self._look(turn, pictures)
            except Exception as error:
                totals.skipped += 1
                log.warning("a watched turn was skipped", strategy=turn.strategy_name, because=str(error))
                continue
            totals.add(fidelity)
            if totals.watched % self._enough == 0:
                log.info("watched", strategy=turn.strategy_name, **asdict(totals))
            await self._judge(turn.strategy_name, turn.tenant, fidelity.cosine)

    def _put(self, turn: AnsweredTurn) -> None:
        if not turn.pictures:
            return  # nothing was pruned
        pictures: dict[Identity, Picture] = {}
        for digest, detail in turn.pictures:
            if (picture := self._pictures.held(turn.tenant, digest)) is not None:
                pictures[digest, detail] = picture.in_detail(detail)
        # Turns with a video are skipped: of a video only the frames are held.
        if len(pictures) < len(turn.pictures):
            self.totals[turn.strategy_name].skipped += 1
            return
        self._waiting.setdefault(turn.tenant, deque()).append((turn, pictures))
        self._submitted.set()
        if sum(map(len, self._waiting.values())) > MOST_WAITING:
            skipped, _ = max(self._waiting.values(), key=len).pop()
            self.totals[skipped.strategy_name].skipped += 1

    async def _next(self) -> _Watched:
        """The turn to compare next; tenants take turns."""
        while not self._waiting:
            self._submitted.clear()
            await self._submitted.wait()
        tenant, turns = self._waiting.popitem(last=False)
        first = turns.popleft()
        if turns:
            self._waiting[tenant] = turns
        return first

    async def _look(self, turn: AnsweredTurn, pictures: Mapping[Identity, Picture]) -> Fidelity:
        replay = Replay(self._runtime, turn, pictures)

        def work(emit: Callable[[object], None]) -> Steps[Fidelity]:
            results: list[Fidelity] = []
            yield from idle_work(self._kv, self._encoder, replay.pieces(), lambda: replay.sequences, results.append)
            return results[0]

        ticket = self._engine.submit(work, turn.tenant, background=True)
        try:
            return await ticket.result()
        finally:
            ticket.cancel()

    async def _judge(self, name: str, tenant: str, cosine: float) -> None:
        """Add a turn of the strategy ``name`` to the tenant's window; roll back if the tenants' means are too low."""
        if self._etag != self._strategies.etag:
            self._etag = self._strategies.etag
            self._windows.clear()
            self._resigned = False
        if name != self._strategies.active.name or (self._judges is not None and tenant not in self._judges):
            return
        self._windows.setdefault(tenant, deque(maxlen=self._enough)).append(cosine)
        self._windows.move_to_end(tenant)
        if len(self._windows) > MOST_TENANTS:
            self._windows.popitem(last=False)
        turns = sum(map(len, self._windows.values()))
        if self._floor is None or turns < self._enough or self._resigned:
            return
        if self._judges is None and len(self._windows) < len(self._users.get(self._etag, ())):
            return  # others use it, too, and were not heard yet
        means = [fmean(window) for window in self._windows.values()]
        mean, below = fmean(means), sum(each < self._floor for each in means)
        if mean >= self._floor or 2 * below <= len(means):
            return
        reason = (
            f"the mean cosine of the last {turns} watched turns is {mean:.4f}, with {len(means)} tenants counted "
            f"equally, below the floor of {self._floor:g}; so it is for {below} of them"
        )
        try:
            restored = await self._strategies.roll_back(self._etag, reason)
        except ServiceError as error:
            # The next turn would fail in the same way, unless the disk is the reason.
            self._resigned = error.reason != "STORAGE_FAILED"
            log.error(
                "a strategy is below the floor, and stays active", strategy=name, mean_cosine=mean, because=str(error)
            )
        else:
            self.totals[name].rollbacks += 1
            log.warning("strategy rolled back", strategy=name, restored=restored.name, because=reason)
