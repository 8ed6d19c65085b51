"""What it costs that pictures are decoded in worker processes: time against decoding in this process, and memory.

Both ways take turns, and medians are shown. The time in a worker is that of a request: the file goes there, and the
pixels come back; large pictures also change workers. Memory is the most that a worker held for the picture, beyond what
it needs for none.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.table import Row, publish
from vflow_client.v1 import images_pb2
from vflow_server.images.decoding_process import Task
from vflow_server.images.decoding_worker import Worker
from vflow_server.images.store import PictureStore
from vflow_server.telemetry.metrics import Metrics
from vflowopt.media.picture import Picture, PictureLimits

PICTURES: Sequence[tuple[str, int, int, str, dict[str, object]]] = (
    ("448 x 448 PNG", 448, 448, "PNG", {}),
    ("1 megapixel JPEG", 1000, 1000, "JPEG", {"quality": 90}),
    ("12 megapixel JPEG", 3000, 4000, "JPEG", {"quality": 90}),
    ("12 megapixel WebP", 3000, 4000, "WEBP", {"method": 0}),
    ("12 megapixel WebP, lossless", 3000, 4000, "WEBP", {"lossless": True, "quality": 0, "method": 0}),
    ("50 megapixel PNG", 6000, 8000, "PNG", {"compress_level": 1}),
)
"""Name, height, width, format and options of what is decoded."""

_LIMITS = PictureLimits(max_bytes=1 << 30)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="decoding", description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="times that each picture is decoded in each way")
    parser.add_argument("--largest", type=int, default=50, help="leave out pictures of more megapixels")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    chosen = [picture for picture in PICTURES if picture[1] * picture[2] <= options.largest * 1_000_000]
    publish([asyncio.run(_row(*picture, repeats=options.repeats)) for picture in chosen], options.json)
    return 0


async def _row(name: str, height: int, width: int, form: str, options: dict[str, object], *, repeats: int) -> Row:
    data = _picture(height, width, form, options)
    image = images_pb2.Image(data=data)
    store = PictureStore(_LIMITS, held_bytes=0, metrics=Metrics())
    await store.read(image, "image", "tenant")  # starts the workers
    here, there = [], []
    for _ in range(repeats):
        begun = time.perf_counter()
        await asyncio.to_thread(Picture.decode, data, _LIMITS)
        here.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        await store.read(image, "image", "tenant")
        there.append(time.perf_counter() - begun)
    await store.close()
    return {
        "picture": name,
        "file_kB": len(data) / 1000,
        "in_process_ms": statistics.median(here) * 1000,
        "in_worker_ms": statistics.median(there) * 1000,
        "worker_bytes_a_pixel": (await asyncio.to_thread(_memory, data)) / (height * width),
    }


def _picture(height: int, width: int, form: str, options: dict[str, object]) -> bytes:
    """A file whose pixels are smooth, with a little noise, as those of photographs are."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(smooth // 4 * 4 + random.integers(0, 4, smooth.shape, dtype=np.uint8)).save(buffer, form, **options)
    return buffer.getvalue()


def _memory(data: bytes) -> int:
    """Bytes that a worker came to hold for the file."""
    worker = Worker()
    worker.start()
    before = _held(worker, "VmRSS")
    worker.load(data)
    worker.decode(Task(_LIMITS, seconds=1000.0, memory=1 << 34))
    most = _held(worker, "VmHWM") - before
    worker.close()
    worker.release()
    return most


def _held(worker: Worker, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{worker.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    raise SystemExit(main())
