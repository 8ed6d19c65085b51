"""The parts of a service that the pages and gauges for operators read, in one object."""

from __future__ import annotations

from dataclasses import dataclass

from vflow_server.access.access import Access
from vflow_server.engine.engine import Engine
from vflow_server.images.store import PictureStore
from vflow_server.interceptors.messages import Messages
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.manager import KVCacheManager
from vflow_server.sessions.sessions import SessionStore
from vflow_server.strategies.strategies import StrategyStore
from vflow_server.telemetry.metrics import Metrics
from vflow_server.telemetry.receipt_log import ReceiptLog
from vflow_server.tuning.fidelity_monitor import FidelityMonitor
from vflow_server.tuning.retune import Retunes
from vflowopt.runtime.model_runner import Runtime


@dataclass(frozen=True)
class ServiceParts:
    """The parts of one service, which makes this object once.

    Attributes:
        runtime: the model and its KV pool.
        engine: runs the model, a step at a time.
        kv: manages the KV pages, the cached prefixes and the offloaded caches.
        images: the cache of compressed pictures.
        pictures: the decoded pictures that are held.
        sessions: the sessions that exist.
        strategies: the strategies that exist, and which of them is active.
        fidelity_monitor: compares live turns with the unpruned model.
        retunes: the searches for strategies.
        receipt_log: the latest receipts.
        messages: the messages on the way and in use.
        metrics: the counters and histograms.
        access: decides which callers may see what.
    """

    runtime: Runtime
    engine: Engine
    kv: KVCacheManager
    images: ImageCache
    pictures: PictureStore
    sessions: SessionStore
    strategies: StrategyStore
    fidelity_monitor: FidelityMonitor
    retunes: Retunes
    receipt_log: ReceiptLog
    messages: Messages
    metrics: Metrics
    access: Access
