"""What keeps the service from starting, told before the model's libraries are imported, which takes seconds.

Each check is made again where what it looks at is used: files and ports can change until then.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import structlog

from vflow_server.access.certificates import CertificateFiles
from vflow_server.access.tokens import read_token_file
from vflow_server.rpc.listener import check_port, is_loopback
from vflow_server.settings import Settings
from vflow_server.store.folder_lock import lock_data, lock_spill
from vflowopt.models.error import ModelError
from vflowopt.models.model_folder import find_model

log = structlog.get_logger(__name__)

_MAY_PASS = {
    getattr(errno, name)
    for name in "EADDRINUSE EADDRNOTAVAIL EBUSY ENOSPC EDQUOT EMFILE ENFILE ENOMEM EIO EAGAIN ESTALE ETIMEDOUT".split()
}
"""Errors that may be gone when the service is started again."""


class StartError(Exception):
    """The service cannot start; the message says why and what to do.

    Args:
        message: the message.
        may_pass: whether it may be able to start later, without any change to its settings.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


def check(settings: Settings) -> None:
    """Check what can be checked without the model.

    Folders that the service would make are made.

    Raises:
        StartError: the service could not start with these settings, as things are.
    """
    _warn(settings)
    with start_errors():
        if settings.model is not None:
            find_model(settings.model)
        _check_device(settings.device)
        _check_extras(settings)
        if isinstance(settings.tokens, Path):
            read_token_file(settings.tokens)
        if settings.tls_cert and settings.tls_key:
            CertificateFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca).check()
        _check_ports(settings)
        if settings.data is not None:
            lock_data(settings.data).close()
        if settings.spill_folder is not None:
            lock_spill(settings.spill_folder).close()


@contextmanager
def start_errors() -> Iterator[None]:
    """Turn what settings that cannot be used raise into a :class:`StartError`."""
    try:
        yield
    except OSError as error:
        may_pass = error.errno in _MAY_PASS
        if error.filename is None:  # our own words
            raise StartError(error.strerror or str(error), may_pass=may_pass) from error
        raise StartError(
            f"{error.filename} cannot be used ({error.strerror}); choose another path, or mend its rights",
            may_pass=may_pass,
        ) from error
    except ModelError as error:
        raise StartError(str(error), may_pass=error.reason == "MODEL_UNREACHABLE") from error
    except ValueError as error:
        raise StartError(str(error)) from error


def _warn(settings: Settings) -> None:
    """Say what is allowed, but may not be meant."""
    if settings.tokens is not None and settings.insecure:
        log.warning("--insecure has no effect: there are tokens, and every call must bring one")
    elif settings.insecure and not is_loopback(settings.host):
        log.warning("everybody who reaches the service may do everything: --insecure is on", host=settings.host)


def _check_device(device: str) -> None:
    """Refuse CUDA where this torch, or this machine, cannot have it: torch itself takes seconds to say so."""
    if not device.startswith("cuda"):
        return
    build = version("torch")
    if "+cpu" in build:
        raise ValueError(f"--device is {device}, but this torch ({build}) is a build for CPUs; install a CUDA build")
    if "+rocm" in build:
        return
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise ValueError(f"--device is {device}, but this machine has no NVIDIA driver; give --device cpu") from None


def _check_extras(settings: Settings) -> None:
    """Refuse options that need a package which is not installed."""
    needed = (
        (settings.otlp_endpoint, "otlp_endpoint", "opentelemetry.exporter", "otel"),
        (settings.quantization, "quantization", "bitsandbytes", "quantization"),
    )
    for value, name, package, extra in needed:
        if value is None:
            continue
        try:
            found = find_spec(package)
        except ModuleNotFoundError:  # of its parent
            found = None
        if found is None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} needs {package}, which is not installed: pip install 'vflowopt[{extra}]', or leave the "
                "option out"
            )


def _check_ports(settings: Settings) -> None:
    ports = [(settings.host, settings.port, "--port")]
    if settings.admin_port is not None:
        ports.append((settings.admin_host, settings.admin_port, "--admin-port"))
    if settings.metrics_port is not None:
        ports.append((settings.metrics_host, settings.metrics_port, "--metrics-port"))
    taken: dict[tuple[str, int], str] = {}
    for host, port, option in ports:
        check_port(host, port, option)
        if port and (other := taken.setdefault((host, port), option)) != option:
            raise ValueError(f"{other} and {option} are both {port}; give each a port of its own")
