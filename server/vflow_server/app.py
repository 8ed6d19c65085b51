"""The process: load the model, serve until a signal comes, stop gracefully."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import structlog
import torch
import uvloop
from transformers.utils import logging as transformers_logging

from vflow_server import collector
from vflow_server.exit_code import FAILED
from vflow_server.kv.memory import available_memory
from vflow_server.preflight import StartError, start_errors
from vflow_server.rpc.errors import ServiceError
from vflow_server.rpc.listener import address
from vflow_server.service import Service
from vflow_server.settings import Settings
from vflow_server.telemetry.logging import flush
from vflow_server.tower_dtype import choose_tower_dtype
from vflowopt.demo import model_path
from vflowopt.models.compilation import compile_encoder
from vflowopt.models.error import ModelError
from vflowopt.models.interface import MultimodalModel
from vflowopt.models.loading import DTYPES, load_model
from vflowopt.runtime.model_runner import Runtime

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that stop the service gracefully. SIGHUP says that the terminal is gone: files that change are read again
without it."""

MARGIN = 8.0
"""Seconds beyond the grace after which a process that should stop is ended in any case."""

log = structlog.get_logger(__name__)


class ServiceFailed(Exception):
    """The service has failed; whoever runs the process should start it again. The log says what happened."""


def run(settings: Settings) -> None:
    """Serve until a signal to stop; a second signal does not wait.

    Raises:
        ServiceFailed: a part that the service needs has failed.
        StartError: the model cannot be served, or the address cannot be listened on.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    uvloop.run(_serve(_load(settings), settings))


def _load(settings: Settings) -> Runtime:
    model = settings.model or str(model_path())
    log.info("loading the model", model=model, device=settings.device, dtype=settings.dtype)
    # The library's log goes where ours goes, without bars of progress between the lines.
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    try:
        loaded = load_model(model, device=settings.device, dtype=settings.dtype, quantization=settings.quantization)
        if settings.compile_cache is not None:
            _compile(loaded, settings.compile_cache)
        tower_dtype = DTYPES.get(settings.tower_dtype)  # none of "auto"
        kv_dtype = None if settings.kv_dtype == "auto" else settings.kv_dtype
        kv_budget = _kv_budget(settings, loaded.device)
        runtime = Runtime(loaded, kv_budget=kv_budget, tower_dtype=tower_dtype, kv_dtype=kv_dtype)
        if tower_dtype is None:
            choose_tower_dtype(runtime)
        revision = runtime.revision
    except ModelError as error:
        raise StartError(str(error), may_pass=error.reason == "MODEL_UNREACHABLE") from error
    except ValueError as error:
        raise StartError(str(error)) from error
    except (RuntimeError, MemoryError) as error:  # how torch says that memory is short, or a device not there
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise StartError(
            f"the model and a KV cache of {settings.kv_budget} cannot be set up on {settings.device} ({reason}); "
            "check --device, or lower --kv-budget",
            may_pass=True,
        ) from error
    log.info(
        "model loaded",
        revision=revision,
        layers=runtime.layers,
        attention=runtime.backend.name,
        kv_bytes=runtime.pool.bytes_total,
        kv_dtype=str(runtime.pool.keys.dtype).removeprefix("torch."),
    )
    return runtime


def _compile(model: MultimodalModel, cache: Path) -> None:
    log.info("compiling the vision encoder", cache=str(cache))
    try:
        compile_encoder(model, cache)
    except (OSError, RuntimeError) as error:
        raise StartError(f"{error}; start without --compile-cache, or check the folder and the compiler") from error


def _kv_budget(settings: Settings, device: torch.device) -> int:
    """Bytes for the KV cache; a share is of what the loaded model leaves."""
    if isinstance(settings.kv_budget, int):
        return settings.kv_budget
    available = available_memory(device)
    budget = settings.kv_budget.of(available)
    log.info("KV budget", share=str(settings.kv_budget), of_available_bytes=available, bytes=budget)
    return budget


async def _serve(runtime: Runtime, settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    try:
        with start_errors():
            service = Service(runtime, settings, on_failure=lambda: _end_within(settings.grace + MARGIN))
            port = await service.start()
    except ServiceError as error:  # the data folder cannot be read or written
        raise StartError(str(error), may_pass=True) from error
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup wants it
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    # Standard output carries this line alone: whoever started the process reads from it where to call.
    _announce(f"VFlow is ready on {address(settings.host, port)}\n")
    log.info(
        "ready", host=settings.host, port=port, admin_port=service.admin_port, strategy=service.strategies.active.name
    )
    collector.go_on()
    await service.pictures.start()  # only now: it takes processor time that the start above needs
    waits = [asyncio.create_task(event.wait()) for event in (stop, service.failed)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    for number in numbers:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process
    log.info("stopping", grace=settings.grace)
    _end_within(settings.grace + MARGIN)
    await service.stop()
    log.info("stopped")
    if service.failed.is_set():
        raise ServiceFailed


def _announce(line: str) -> None:
    """Write ``line`` to standard output, whoever reads it or does not."""

    def write() -> None:
        try:
            os.write(1, line.encode())
        except OSError as error:
            log.warning("standard output cannot be written", because=error.strerror)

    threading.Thread(target=write, name="vflow-stdout", daemon=True).start()


def _end_within(seconds: float) -> None:
    """End the process as failed if it has not ended after ``seconds``, even if its event loop stands still."""

    def end() -> None:
        time.sleep(seconds)
        log.critical("the process did not stop in time and is ended", seconds=seconds)
        flush(1.0)
        os._exit(FAILED)

    threading.Thread(target=end, name="vflow-end", daemon=True).start()
