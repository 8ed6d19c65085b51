"""The strategies that exist: presets and created ones, none of which ever changes, and which of them is active.

Belongs to the event loop's thread, but for reading and writing its file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from vflow_server.errors import CapacityExhausted, NotFound, ServiceError
from vflowopt.strategy import Strategy, StrategyError

DEFAULT = "strategies/preset-10"
MOST = 1000
"""Strategies that may exist."""

_SCHEMA = 1

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StrategyRevision:
    """A strategy under a name.

    Attributes:
        name: resource name.
        sequence: strategies count up in the order of their creation.
        strategy: what it says.
        description: what it is for, in a person's words.
        created: Unix time in seconds.
        built_in: whether it came with the service.
    """

    name: str
    sequence: int
    strategy: Strategy
    description: str
    created: float
    built_in: bool = False


class StrategyStore:
    """The strategies for one model.

    Args:
        layers: decoder layers of the model; presets are fitted to them.
        brought: strategies that the model itself brings, by name. One that keeps least of them is active at first.
        file: where created strategies and the choice of the active one are kept; None keeps them in memory only.
    """

    def __init__(self, layers: int, brought: Mapping[str, Strategy], file: Path | None = None) -> None:
        self.layers = layers
        self._file = file
        self._writing = asyncio.Lock()
        self._revisions: dict[str, StrategyRevision] = {}
        # Stored entries, by name, that do not fit this model: kept for the model that they were made for.
        self._misfits: dict[str, dict[str, object]] = {}
        self._generation = 0
        now = time.time()
        self._add("strategies/full", Strategy.full(), "keeps every token: the unpruned model", now, built_in=True)
        for budget in (0.5, 0.25, 0.1):
            percent = f"{budget * 100:.0f}"
            try:
                preset = Strategy.preset(budget, layers)
            except StrategyError as error:  # a decoder of one or two layers has no three stages
                log.warning("preset left out", budget=budget, because=str(error))
                continue
            description = f"the published strategy for {percent}%, fitted to this model's depth"
            self._add(f"strategies/preset-{percent}", preset, description, now, built_in=True)
        for name, strategy in brought.items():
            description = f"made for this model, {strategy.budget(layers):.0%}"
            self._add(f"strategies/{name}", strategy, description, now, built_in=True)
        smallest = min(brought, key=lambda name: brought[name].budget(layers), default=None)
        default = DEFAULT if smallest is None else f"strategies/{smallest}"
        self.active = self._revisions.get(default, self._revisions["strategies/full"])
        if file is not None and file.exists():
            self._load(file)

    def __iter__(self) -> Iterator[StrategyRevision]:
        """The strategies, oldest first, built-in ones before all."""
        return iter(self._revisions.values())

    @property
    def etag(self) -> str:
        """Changes whenever the active strategy changes."""
        return hashlib.blake2b(f"{self._generation} {self.active.name}".encode(), digest_size=8).hexdigest()

    def get(self, name: str) -> StrategyRevision:
        """The strategy ``name``; the active one if it is empty.

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

    async def create(self, name: str, strategy: Strategy, description: str) -> StrategyRevision:
        """Add a strategy.

        Raises:
            StrategyError: it does not fit the model's depth.
            ServiceError: STRATEGY_EXISTS, CAPACITY_EXHAUSTED.
        """
        strategy.check(self.layers)
        if name in self._revisions or name in self._misfits:
            raise ServiceError(
                grpc.StatusCode.ALREADY_EXISTS,
                "STRATEGY_EXISTS",
                f"{name!r} exists, and strategies never change; choose another identifier",
                metadata={"strategy": name},
            )
        if len(self._revisions) >= MOST:
            raise CapacityExhausted("strategies", f"{MOST} strategies exist, the most there can be", retry_after=None)
        revision = self._add(name, strategy, description, time.time())
        try:
            await self._save()
        except BaseException:
            del self._revisions[name]  # refused as a whole: the caller may try again
            raise
        return revision

    async def activate(self, name: str, etag: str) -> StrategyRevision:
        """Make the strategy ``name`` the default of new sessions.

        Raises:
            ServiceError: STRATEGY_NOT_FOUND; ETAG_MISMATCH where ``etag`` is not empty and not the current one.
        """
        revision = self.get(name)
        if etag and etag != self.etag:
            raise ServiceError(
                grpc.StatusCode.ABORTED,
                "ETAG_MISMATCH",
                f"another strategy was activated meanwhile ({self.active.name!r} now); read again and decide anew",
                metadata={"strategy": self.active.name, "etag": self.etag},
            )
        if revision is not self.active:
            log.info("strategy activated", strategy=name, before=self.active.name)
            self.active = revision
            self._generation += 1
            await self._save()
        return revision

    def _add(
        self, name: str, strategy: Strategy, description: str, created: float, *, built_in: bool = False
    ) -> StrategyRevision:
        revision = StrategyRevision(name, len(self._revisions), strategy, description, created, built_in)
        self._revisions[name] = revision
        return revision

    def _load(self, file: Path) -> None:
        """Read what :meth:`_save` wrote; a strategy that does not fit this model is not offered.

        Raises:
            ValueError: the file was not written by this service.
        """
        try:
            document = json.loads(file.read_text())
            if document["schema"] != _SCHEMA:
                raise ValueError(f"schema {document['schema']}, expected {_SCHEMA}")
            self._generation = int(document["generation"])
            for entry in document["strategies"]:
                try:
                    strategy = Strategy.from_json(entry["strategy"])
                    strategy.check(self.layers)
                except StrategyError as error:
                    log.warning("stored strategy left out", strategy=entry["name"], because=str(error))
                    self._misfits[entry["name"]] = entry
                else:
                    self._add(entry["name"], strategy, entry["description"], float(entry["created"]))
            self.active = self._revisions.get(document["active"], self.active)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} does not hold strategies of this service ({error}); move it away") from error

    async def _save(self) -> None:
        if self._file is None:
            return
        async with self._writing:
            document = {
                "schema": _SCHEMA,
                "generation": self._generation,
                "active": self.active.name,
                "strategies": [
                    *self._misfits.values(),
                    *(
                        {
                            "name": revision.name,
                            "description": revision.description,
                            "created": revision.created,
                            "strategy": revision.strategy.to_json(),
                        }
                        for revision in self
                        if not revision.built_in
                    ),
                ],
            }
            await asyncio.to_thread(_write, self._file, json.dumps(document, indent=1))


def _write(file: Path, text: str) -> None:
    """Replace the file as a whole, so that a crash leaves the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.new")
    with draft.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    draft.replace(file)
