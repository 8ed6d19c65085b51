"""Offloading: copying a sequence's keys and values out of the pool, to host memory or a file, and restoring them.

Offloading is exact: a restored cache has the same numbers. Files are safetensors, never pickle, and are written whole
or not at all.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from enum import Enum, auto
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vflowopt.runtime.cache import as_bytes
from vflowopt.runtime.sequence import CachedLength, Sequence


class Tier(Enum):
    """Where a cache was restored from; the names are those of ``RestoredFrom`` in the gRPC contract."""

    HOST_MEMORY = auto()
    DISK = auto()
    LOG = auto()
    """It was computed again from the sequence's log."""


class OffloadError(RuntimeError):
    """A file is no offloaded cache, or an offloaded cache does not belong to the sequence."""


@dataclass(frozen=True, eq=False)
class OffloadedCache:
    """The cache of one sequence, copied out of the pool.

    Attributes:
        keys: per stage, [layers, tokens, heads, head_dim], on the host.
        values: like ``keys``.
        cached: how much of the sequence's log they cover.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cached: CachedLength

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def save(self, path: Path) -> None:
        """Write to ``path``, atomically: the file is whole, or there is none.

        Raises:
            OSError, SafetensorError: the file cannot be written, for example because the disk is full; no part of it is
                left.
        """
        tensors = {f"keys.{stage}": tensor for stage, tensor in enumerate(self.keys)}
        tensors |= {f"values.{stage}": tensor for stage, tensor in enumerate(self.values)}
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, metadata={"cached": json.dumps(asdict(self.cached))})
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> OffloadedCache:
        """Read what :meth:`save` wrote.

        Raises:
            OffloadError: the file is missing, damaged or of another kind.
        """
        try:
            with safe_open(path, framework="pt") as file:
                cached = CachedLength(**json.loads(file.metadata()["cached"]))
                stages = len(file.keys()) // 2
                return cls(
                    keys=tuple(file.get_tensor(f"keys.{stage}") for stage in range(stages)),
                    values=tuple(file.get_tensor(f"values.{stage}") for stage in range(stages)),
                    cached=cached,
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise OffloadError(f"{path} does not hold an offloaded cache: {error}; rebuild it from the log") from error


def offload(sequence: Sequence) -> OffloadedCache:
    """Copy a sequence's cache to the host and release its pages."""
    keys, values = [], []
    for stage in sequence.cache.stages:
        slots = stage.slots()
        # One read for all layers of the stage.
        keys.append(stage.pool.key_store[slots].cpu().view(stage.pool.keys.dtype))
        values.append(stage.pool.value_store[slots].cpu().view(stage.pool.values.dtype))
    offloaded = OffloadedCache(tuple(keys), tuple(values), sequence.cached)
    sequence.release()
    return offloaded


def restore(sequence: Sequence, offloaded: OffloadedCache) -> None:
    """Copy an offloaded cache back into the pool. If it raises, nothing has changed.

    Args:
        sequence: has no cache. Its log must begin with the items that were cached when the cache was offloaded; this is
            not checked.
        offloaded: the cache.

    Raises:
        PoolExhausted: too few pages are free.
        OffloadError: the sequence has a cache already, has other stages, or has a shorter log; or the pool stores keys
            and values in another type.
    """
    cache = sequence.cache
    lengths = [keys.shape[1] for keys in offloaded.keys]
    fits = [len(stage.layers) for stage in cache.stages] == [len(keys) for keys in offloaded.keys]
    if sequence.resident or not fits or offloaded.cached.items > len(sequence.log):
        raise OffloadError("the offloaded cache is not of this sequence, or the sequence holds a cache already")
    types = {tensor.dtype for tensor in (*offloaded.keys, *offloaded.values)}
    if types != {cache.pool.keys.dtype}:
        raise OffloadError(f"the offloaded cache is stored as {types}, and the pool as {cache.pool.keys.dtype}")
    cache.reserve(lengths)
    try:
        for stage, keys, values in zip(cache.stages, offloaded.keys, offloaded.values, strict=True):
            slots = stage.slots(range(keys.shape[1]))
            stage.pool.key_store[slots] = as_bytes(keys).to(slots.device)
            stage.pool.value_store[slots] = as_bytes(values).to(slots.device)
    except BaseException:
        cache.truncate(cache.lengths)  # gives back the pages
        raise
    cache.advance(lengths)
    sequence.cached = offloaded.cached
