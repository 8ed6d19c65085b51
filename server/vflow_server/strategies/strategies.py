"""The strategies that exist, presets and created ones, and which of them is active. A strategy never changes.

Belongs to the event loop's thread, except for writing the file.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import structlog

from vflow_server.rpc.errors import CapacityExhausted, NotFound, ServiceError, storage_failed
from vflow_server.store.files import WrittenByNewerRelease, check_schema, replace_file, set_aside
from vflow_server.strategies.history import History, Provenance, StrategyEvent
from vflowopt.compression.strategy import Strategy, StrategyError

DEFAULT = "strategies/preset-10"
MOST = 1000
"""Number of strategies that may exist."""

_SCHEMA = 2

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StrategyRevision:
    """A strategy under a name.

    Attributes:
        name: resource name.
        number: position in the order of creation.
        strategy: the strategy itself.
        description: a description for people.
        created: Unix time in seconds.
        built_in: whether it is part of the service or of the model.
        draft: whether it is the best result of a search that did not complete.
        provenance: how a search found it; None if it was created otherwise.
    """

    name: str
    number: int
    strategy: Strategy
    description: str
    created: float
    built_in: bool = False
    draft: bool = False
    provenance: Provenance | None = None


class StrategyStore:
    """The strategies for one model.

    Args:
        layers: number of decoder layers of the model; presets are fitted to it (also an attribute).
        brought: strategies that are part of the model, by name. The first of them is active at first.
        file: stores created strategies and the history; None: they are in memory only.
        check: called before the file is written; raises OSError if its folder is not the one that it was read from.

    Raises:
        WrittenByNewerRelease: a newer release wrote the file, which stays unchanged.
    """

    def __init__(
        self,
        layers: int,
        brought: Mapping[str, Strategy],
        file: Path | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.layers = layers
        self._file = file
        self._check = check
        # Changes are made one at a time, and become visible once they are written.
        self._changing = asyncio.Lock()
        self._revisions: dict[str, StrategyRevision] = {}
        # Stored entries, by name, that do not fit this model. They stay in the file for the model that they belong to.
        self._misfits: dict[str, dict[str, Any]] = {}
        now = time.time()
        self._build_in("full", Strategy.full(), "keeps every token: the unpruned model", now)
        for budget in (0.5, 0.25, 0.1):
            percent = f"{budget * 100:.0f}"
            try:
                preset = Strategy.preset(budget, layers)
            except StrategyError as error:  # a decoder of one or two layers cannot have three stages
                log.warning("preset left out", budget=budget, because=str(error))
                continue
            description = f"the published strategy for {percent}%, fitted to this model's depth"
            self._build_in(f"preset-{percent}", preset, description, now)
        for name, strategy in brought.items():
            description = f"made for this model, {strategy.budget(layers):.0%}"
            self._build_in(name, strategy, description, now)
        default = f"strategies/{next(iter(brought))}" if brought else DEFAULT
        self._history = History(active=default if default in self._revisions else "strategies/full")
        if file is not None and file.exists():
            self._load(file)

    def __iter__(self) -> Iterator[StrategyRevision]:
        """The strategies: built-in ones, then created ones, oldest first."""
        return iter(self._revisions.values())

    @property
    def active(self) -> StrategyRevision:
        """The strategy that is the default of new sessions."""
        return self._revisions[self._history.active]

    @property
    def etag(self) -> str:
        """A tag that changes whenever the active strategy changes."""
        return self._history.etag

    def events(self, name: str) -> tuple[StrategyEvent, ...]:
        """The events of the strategy ``name``, oldest first."""
        return self._history.events.get(name, ())

    def get(self, name: str) -> StrategyRevision:
        """The strategy ``name``; the active one if ``name`` is empty.

        Raises:
            NotFound: STRATEGY_NOT_FOUND.
        """
        if not name:
            return self.active
        try:
            return self._revisions[name]
        except KeyError:
            raise NotFound(
                "STRATEGY_NOT_FOUND",
                f"there is no strategy {name!r}; ListStrategies names those that exist",
                metadata={"strategy": name},
            ) from None

    def has(self, name: str) -> bool:
        """Whether a strategy of this or another model has the name ``name``."""
        return name in self._revisions or name in self._misfits

    def check_free(self, name: str) -> None:
        """Check that a strategy ``name`` can be created.

        Raises:
            ServiceError: STRATEGY_EXISTS, or CAPACITY_EXHAUSTED if there are too many strategies.
        """
        if self.has(name):
            raise ServiceError(
                grpc.StatusCode.ALREADY_EXISTS,
                "STRATEGY_EXISTS",
                f"{name!r} exists, and strategies never change; choose another identifier",
                metadata={"strategy": name},
            )
        if len(self._revisions) >= MOST:
            raise CapacityExhausted("strategies", f"{MOST} strategies exist, the most there can be", retry_after=None)

    async def create(
        self,
        name: str,
        strategy: Strategy,
        description: str,
        *,
        draft: bool = False,
        provenance: Provenance | None = None,
    ) -> StrategyRevision:
        """Add a strategy.

        Raises:
            StrategyError: the strategy does not fit the model's depth.
            ServiceError: STRATEGY_EXISTS, CAPACITY_EXHAUSTED, STORAGE_FAILED.
        """
        strategy.check(self.layers)

        async def create() -> StrategyRevision:
            async with self._changing:
                self.check_free(name)
                revision = StrategyRevision(
                    name,
                    len(self._revisions),
                    strategy,
                    description,
                    time.time(),
                    draft=draft,
                    provenance=provenance,
                )
                await self._write([*self, revision], self._history)
                self._revisions[name] = revision
                return revision

        return await asyncio.shield(create())  # a cancelled caller must not leave the file and the memory different

    async def activate(self, name: str, etag: str) -> StrategyRevision:
        """Make the strategy ``name`` the default of new sessions.

        Raises:
            ServiceError: STRATEGY_NOT_FOUND; ETAG_MISMATCH if ``etag`` is neither empty nor the current one;
                STORAGE_FAILED.
        """
        revision = self.get(name)

        async def activate() -> StrategyRevision:
            async with self._changing:
                self._check_etag(etag)
                if revision is not self.active:
                    await self._become(self._history.activated(revision.name))
                return revision

        return await asyncio.shield(activate())

    async def roll_back(self, etag: str, reason: str) -> StrategyRevision:
        """Activate the strategy that was active before the present one; returns it.

        Args:
            etag: the etag of the strategy to roll back; empty: the one that is active now.
            reason: the reason, for the history.

        Raises:
            ServiceError: ETAG_MISMATCH; NOTHING_TO_ROLL_BACK if none was active before; STORAGE_FAILED.
        """

        async def roll_back() -> StrategyRevision:
            async with self._changing:
                self._check_etag(etag)
                earlier = self._history.rolled_back(self._revisions, reason)
                if earlier is None:
                    raise ServiceError(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        "NOTHING_TO_ROLL_BACK",
                        f"no strategy was active before {self.active.name!r}; activate the one that you want",
                        metadata={"strategy": self.active.name},
                    )
                await self._become(earlier)
                return self.active

        return await asyncio.shield(roll_back())

    def _check_etag(self, etag: str) -> None:
        if etag and etag != self.etag:
            raise ServiceError(
                grpc.StatusCode.ABORTED,
                "ETAG_MISMATCH",
                f"another strategy was activated meanwhile ({self.active.name!r} now); read again and decide anew",
                metadata={"strategy": self.active.name, "etag": self.etag},
            )

    async def _become(self, history: History) -> None:
        await self._write(list(self), history)
        log.info("strategy activated", strategy=history.active, before=self._history.active)
        self._history = history

    def _build_in(self, identifier: str, strategy: Strategy, description: str, now: float) -> None:
        name = f"strategies/{identifier}"
        self._revisions[name] = StrategyRevision(name, len(self._revisions), strategy, description, now, built_in=True)

    def _load(self, file: Path) -> None:
        """Read the file. A strategy that does not fit this model is left out; a damaged file is set aside.

        Raises:
            WrittenByNewerRelease: a newer release wrote the file, which stays unchanged.
        """
        revisions, misfits = dict(self._revisions), dict(self._misfits)
        try:
            document = _current(json.loads(file.read_text()), file)
            for entry in document["strategies"]:
                try:
                    strategy = Strategy.from_json(entry["strategy"])
                    strategy.check(self.layers)
                except StrategyError as error:
                    log.warning("stored strategy left out", strategy=entry["name"], because=str(error))
                    misfits[entry["name"]] = entry
                    continue
                found = entry["provenance"]
                revisions[entry["name"]] = StrategyRevision(
                    entry["name"],
                    len(revisions),
                    strategy,
                    entry["description"],
                    float(entry["created"]),
                    draft=bool(entry["draft"]),
                    provenance=None if found is None else Provenance(**found),
                )
            history = History.from_document(document["history"])
            # The model's default replaces an active strategy that does not fit this model.
            active = history.active if history.active in revisions else self._history.active
        except WrittenByNewerRelease:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            set_aside(file, because=error)
            return
        self._revisions, self._misfits = revisions, misfits
        self._history = replace(history, active=active)

    async def _write(self, revisions: list[StrategyRevision], history: History) -> None:
        if self._file is None:
            return
        document = {
            "schema": _SCHEMA,
            "history": history.to_document(),
            "strategies": [
                *self._misfits.values(),
                *(
                    {
                        "name": revision.name,
                        "description": revision.description,
                        "created": revision.created,
                        "strategy": revision.strategy.to_json(),
                        "draft": revision.draft,
                        "provenance": None if revision.provenance is None else asdict(revision.provenance),
                    }
                    for revision in revisions
                    if not revision.built_in
                ),
            ],
        }
        try:
            self._check()
            await asyncio.to_thread(replace_file, self._file, json.dumps(document, indent=1))
        except OSError as error:
            raise storage_failed(error) from error


def _current(document: dict[str, Any], file: Path) -> dict[str, Any]:
    """Convert a stored document to the current schema; the first schema had no searches and no events.

    Raises:
        KeyError, TypeError, ValueError: the document is not valid.
        WrittenByNewerRelease: it has a later schema.
    """
    if document["schema"] == 1:
        return {
            "schema": _SCHEMA,
            "history": {
                "active": document["active"],
                "generation": document["generation"],
                "before": [],
                "events": {},
            },
            "strategies": [{**entry, "draft": False, "provenance": None} for entry in document["strategies"]],
        }
    check_schema(file, document["schema"], _SCHEMA)
    return document
