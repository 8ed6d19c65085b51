"""Decodes pictures in worker processes: within limits of time and memory, and fair between tenants."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog

from vflow_server.images.decoded_memory import DecodedMemory
from vflow_server.images.decoding_process import Task
from vflow_server.images.decoding_queue import DecodingQueue, Job, UsedTime
from vflow_server.images.decoding_worker import MemoryUsedUp, Worker, WorkerDied, describe
from vflow_server.rpc.errors import CapacityExhausted, server_stopping
from vflow_server.telemetry.metrics import Metrics
from vflowopt.media.error import damaged
from vflowopt.media.file_format import format_of
from vflowopt.media.picture import Picture, PictureError, PictureLimits

MOST_WAITING = 64
"""Pictures that may wait to be decoded in each lane."""

WAITING_FILES = 8
"""Bytes of these at most, as a multiple of the largest file."""

SMALL_PIXELS = 4_000_000
"""Pixels of a picture that is decoded in the fast lane at most."""

BYTES_PER_PIXEL = 20
"""Memory that decoding may take. `python -m benchmarks.decoding` measures what it takes: up to 17, for a WebP."""

BASE_MEMORY = 64 << 20
"""Memory for any picture beside that, and beside two copies of its file."""

BASE_SECONDS = 0.25
"""Processor time for any picture, beside what it gets for its pixels."""

_FAST_NICENESS, _SLOW_NICENESS = 3, 10
"""The model goes on while hostile files take all the time that they may."""

_SLOWEST = 20
"""Time on the clock at most, as a multiple of the processor time. Where others need the processor, a worker waits."""

_RESTART_SECONDS = 0.1
"""Processor time that a new process takes, about. Who causes one is charged for it."""

log = structlog.get_logger(__name__)


def default_workers() -> int:
    """Number of workers where none is set: half of the processors that this process may use, and 2 at least."""
    return max(2, len(os.sched_getaffinity(0)) // 2)


class _Lane:
    """Workers, and the jobs that wait for them or are decoded by them."""

    def __init__(self, workers: int, niceness: int, queue: DecodingQueue, most_pixels: int) -> None:
        self.queue = queue
        self.most_pixels = most_pixels
        self.workers = [Worker(niceness) for _ in range(workers)]
        self.idle = list(self.workers)
        self.running: dict[Job, Worker] = {}

    def next(self) -> Job | None:
        """The job to begin; None if none may begin now."""
        if not self.idle:
            return None
        job = self.queue.first(Counter(each.tenant for each in self.running))
        # Together they may have as many pixels as one picture may: that bounds the memory of all workers.
        taken = sum(each.most_pixels for each in self.running)
        if job is None or (self.running and taken + job.most_pixels > self.most_pixels):
            return None
        self.queue.remove(job)
        return job


class Decoders:
    """Decodes pictures in two lanes, each with workers of its own. Belongs to the event loop's thread.

    Every file begins in the fast lane. A worker there reads its header, and goes on if the picture is small. A large
    one moves to the other lane, so that small pictures never wait for large ones, nor for files that are made to take
    long.

    Args:
        limits: the limits of a picture.
        workers: number of processes, at least 2.
        seconds: processor time that decoding the largest picture may take; a smaller one gets its share.
        memory: counts the decoded pixels.
        held: returns the picture that a tenant has sent earlier, by its digest, if it is still held.
        metrics: counts how decoding ended.
    """

    def __init__(
        self,
        limits: PictureLimits,
        *,
        workers: int,
        seconds: float,
        memory: DecodedMemory,
        held: Callable[[str, str], Picture | None],
        metrics: Metrics,
    ) -> None:
        self._limits = limits
        self._seconds = seconds
        self._memory = memory
        self._held = held
        self._metrics = metrics
        small = min(SMALL_PIXELS, limits.max_pixels)
        used = UsedTime()

        def lane(workers: int, niceness: int, most_pixels: int) -> _Lane:
            queue = DecodingQueue(used, most=MOST_WAITING, most_bytes=WAITING_FILES * limits.max_bytes)
            return _Lane(workers, niceness, queue, most_pixels)

        fast = workers - workers // 2
        self._fast = lane(fast, _FAST_NICENESS, fast * small)
        self._slow = lane(workers // 2, _SLOW_NICENESS, limits.max_pixels)
        self._small = small
        self._used = used
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="vflow-decoding")
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Start the fast lane's workers, which otherwise start when they are needed first."""
        for worker in [self._fast.idle.pop() for _ in self._fast.workers if self._fast.idle]:
            await self._started(worker)
            self._fast.idle.append(worker)
            self._begin(self._fast)

    async def decode(self, data: bytes, tenant: str) -> Picture:
        """The picture that the file ``data`` of ``tenant`` holds.

        Raises:
            PictureError: the file is no valid picture within the limits, or takes too much time or memory.
            ServiceError: too many pictures wait or are in memory, no worker can be started, or the service stops.
        """
        if self._closed:
            raise server_stopping()
        job = Job(tenant, data, self._small)
        self._fast.queue.put(job)
        self._begin(self._fast)
        try:
            return await job.result
        finally:
            for lane in (self._fast, self._slow):
                lane.queue.remove(job)
                if job in lane.running:  # the caller has gone
                    lane.running[job].kill()

    async def close(self) -> None:
        """End all processes and threads now; what waits is refused."""
        self._closed = True
        for lane in (self._fast, self._slow):
            for worker in lane.workers:
                worker.close()
            while (job := lane.queue.first(Counter())) is not None:
                lane.queue.remove(job)
                _fail(job, server_stopping())
        await asyncio.gather(*self._tasks)
        for worker in (*self._fast.workers, *self._slow.workers):
            await asyncio.get_running_loop().run_in_executor(self._threads, worker.release)
        self._threads.shutdown()

    def _begin(self, lane: _Lane) -> None:
        """Begin as many of the waiting jobs as may run."""
        while not self._closed and (job := lane.next()) is not None:
            if job.result.done():
                continue
            nbytes = 3 * job.most_pixels
            try:
                self._memory.reserve(job.tenant, nbytes)
            except CapacityExhausted as error:
                _fail(job, error)
                continue
            worker = lane.running[job] = lane.idle.pop()
            task = asyncio.create_task(self._run(lane, worker, job, nbytes))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, lane: _Lane, worker: Worker, job: Job, reserved: int) -> None:
        outcome = await self._outcome(worker, job)
        del lane.running[job]
        self._memory.give_back(job.tenant, reserved)
        if isinstance(outcome, _Larger):
            job.most_pixels = outcome.pixels
            self._slow.queue.put(job)
            self._begin(self._slow)
        elif isinstance(outcome, Exception):
            _fail(job, outcome)
        elif not job.result.done():
            job.result.set_result(outcome)
        if worker.pid is None:
            self._used.add(job.tenant, _RESTART_SECONDS)
            await self._started(worker)
        lane.idle.append(worker)
        self._begin(lane)

    async def _outcome(self, worker: Worker, job: Job) -> Picture | _Larger | Exception:
        """How decoding ended."""
        loop = asyncio.get_running_loop()
        limits = PictureLimits(self._limits.max_bytes, job.most_pixels, self._limits.max_aspect)
        seconds = BASE_SECONDS + self._seconds * job.most_pixels / self._limits.max_pixels
        memory = BASE_MEMORY + 2 * len(job.data) + BYTES_PER_PIXEL * job.most_pixels
        deadline = loop.call_later(_SLOWEST * seconds, worker.kill)
        try:
            digest = await loop.run_in_executor(self._threads, worker.load, job.data)
            if (held := self._held(job.tenant, digest)) is not None:
                return held
            pixels = await loop.run_in_executor(self._threads, worker.decode, Task(limits, seconds, memory))
            self._metrics.decoded("decoded")
            self._memory.count(job.tenant, pixels)
            return Picture(pixels, digest)
        except PictureError as error:
            if error.reason == "PICTURE_TOO_MANY_PIXELS" and job.most_pixels < self._limits.max_pixels:
                return _Larger(error, self._limits)
            self._metrics.decoded("refused")
            return error
        except MemoryUsedUp:
            self._metrics.decoded("out_of_memory")
            return _too_complex("memory", memory, f"more than {memory} bytes of memory")
        except WorkerDied as death:
            return self._cause(death, job, seconds)
        except Exception as error:
            self._metrics.decoded("failed")
            log.error("a picture could not be handed to a worker", because=str(error), exc_info=error)
            worker.kill()  # whatever is the matter with it
            return CapacityExhausted("picture_decoding", "the server cannot decode pictures now; retry in a moment")
        finally:
            deadline.cancel()
            self._used.add(job.tenant, worker.seconds)

    def _cause(self, death: WorkerDied, job: Job, seconds: float) -> Exception:
        """Why a worker has died, as its job's caller is to hear it."""
        if death.exit_code == -signal.SIGPROF or (death.killed and not self._closed and not job.result.done()):
            self._metrics.decoded("out_of_time")
            return _too_complex("seconds", seconds, f"more than {seconds:.2g} s of processor time")
        if death.killed:  # the caller has gone, or the service stops
            self._metrics.decoded("cancelled")
            return server_stopping()
        self._metrics.decoded("crashed")
        log.error("a worker died of a picture", cause=describe(death.exit_code), bytes=len(job.data), tenant=job.tenant)
        if death.exit_code == -signal.SIGKILL:  # the system does that when memory is short
            return CapacityExhausted("picture_decoding", "the server had no memory for the picture; retry in a moment")
        return damaged(format_of(job.data) or "unknown", f"its decoder ended with {describe(death.exit_code)}")

    async def _started(self, worker: Worker) -> None:
        """Start a process for ``worker``. If that fails, its next job tries again."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, worker.start)
        except (OSError, WorkerDied) as error:
            if not self._closed:
                log.error("a worker that decodes pictures cannot be started", because=str(error))


class _Larger:
    """The picture has too many pixels for the fast lane. ``pixels`` are those that it may have in the other one."""

    def __init__(self, error: PictureError, limits: PictureLimits) -> None:
        size = [int(error.metadata[side]) for side in ("width", "height") if side in error.metadata]
        pixels = size[0] * size[1] if len(size) == 2 else limits.max_pixels
        # With more than it may have it is refused there, and the message names the right bound.
        self.pixels = min(pixels, limits.max_pixels)


def _fail(job: Job, error: Exception) -> None:
    if not job.result.done():
        job.result.set_exception(error)


def _too_complex(resource: str, most: float, what: str) -> PictureError:
    return PictureError(
        "PICTURE_TOO_COMPLEX",
        f"decoding the picture takes {what}, which no picture of its size should; save it anew, and send a plain JPEG "
        "or PNG",
        resource=resource,
        max=most,
    )
