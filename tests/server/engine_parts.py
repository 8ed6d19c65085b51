"""The parts of an engine, without a service around it."""

from dataclasses import dataclass
from pathlib import Path

from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.piece_thread import PieceThread
from vflow_server.engine.scheduler import Scheduler
from vflow_server.engine.token_meter import TokenMeter
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.logged_images import LoggedImages
from vflow_server.kv.manager import KVCacheManager
from vflow_server.kv.offload import OffloadStore
from vflow_server.kv.prefix_cache import PrefixCache
from vflow_server.telemetry.metrics import Metrics
from vflowopt.runtime.model_runner import Runtime


@dataclass(frozen=True)
class EngineParts:
    runtime: Runtime
    kv: KVCacheManager
    images: ImageCache
    encoder: EncoderThread
    tokenizer: PieceThread

    @classmethod
    def load(cls, model_folder: Path, kv_budget: int) -> "EngineParts":
        """The parts for a small model, without offloading."""
        runtime = Runtime.load(model_folder, kv_budget=kv_budget)
        kv = KVCacheManager(runtime, PrefixCache(64), OffloadStore(0, None), LoggedImages(1 << 20), Metrics())
        return cls(
            runtime, kv, ImageCache(1 << 20, runtime.model.device), EncoderThread(runtime), PieceThread("tokenizer")
        )

    def scheduler(self) -> Scheduler:
        return Scheduler(self.runtime, self.kv, self.images, self.encoder, Metrics(), TokenMeter())

    def close(self) -> None:
        self.tokenizer.close()
        self.encoder.close()
        self.kv.close()
        assert self.kv.check() == 0
