"""The process: load the model, serve until a signal comes, stop gracefully."""

from __future__ import annotations

import asyncio
import signal

import structlog
import torch
import uvloop
from transformers.utils.logging import disable_progress_bar

from vflow_server.kv.memory import available_memory
from vflow_server.preflight import StartError, start_errors
from vflow_server.service import Service
from vflow_server.settings import Settings
from vflowopt.demo import model_path
from vflowopt.models.error import ModelError
from vflowopt.models.loading import load_model
from vflowopt.runtime.model_runner import Runtime

log = structlog.get_logger(__name__)


class EngineDied(Exception):
    """The engine ended by a fault; whoever runs the process should start it again. The log says what happened."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second signal does not wait.

    Raises:
        EngineDied: nothing can be served any more.
        StartError: the model cannot be served, or the address cannot be listened on.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    uvloop.run(_serve(_load(settings), settings))


def _load(settings: Settings) -> Runtime:
    model = settings.model or str(model_path())
    log.info("loading the model", model=model, device=settings.device, dtype=settings.dtype)
    disable_progress_bar()  # it would stand between the lines of the log
    try:
        loaded = load_model(model, device=settings.device, dtype=settings.dtype, quantization=settings.quantization)
        runtime = Runtime(loaded, kv_budget=_kv_budget(settings, loaded.device))
        revision = runtime.revision
    except (ModelError, ValueError) as error:
        raise StartError(str(error)) from error
    except RuntimeError as error:  # how torch says that memory is short, or a device not there
        reason = str(error).partition("\n")[0]
        raise StartError(
            f"the model and a KV cache of {settings.kv_budget} cannot be set up on {settings.device} ({reason}); "
            "check --device, or lower --kv-budget"
        ) from error
    log.info("model loaded", revision=revision, layers=runtime.layers, kv_bytes=runtime.pool.bytes_total)
    return runtime


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
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with start_errors():
        service = Service(runtime, settings)
        port = await service.start()
    # Standard output carries this line alone: whoever started the process reads from it where to call.
    print(f"VFlow is ready on {settings.host}:{port}", flush=True)
    log.info(
        "ready", host=settings.host, port=port, admin_port=service.admin_port, strategy=service.strategies.active.name
    )
    await service.pictures.start()  # only now: it takes processor time that the start above needs
    waits = [asyncio.create_task(event.wait()) for event in (stop, service.failed)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    log.info("stopping", grace=settings.grace)
    await service.stop()
    log.info("stopped")
    if service.failed.is_set():
        raise EngineDied
