"""What can be set about the service, and from where: flag, then environment, then TOML file, then default.

Each setting is declared once, as a field of :class:`Settings`: ``kv_budget`` is the flag ``--kv-budget``, the
environment variable ``VFLOW_KV_BUDGET`` and the TOML key ``kv_budget``.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vflow_server.access.tokens import TokenEntry, entries_or_file
from vflow_server.option import (
    Option,
    OptionError,
    Share,
    fraction,
    one_of,
    option,
    seconds,
    size,
    size_or_share,
    switch,
    whole,
)
from vflow_server.rpc.listener import is_loopback

ENVIRONMENT_PREFIX = "VFLOW_"
CONFIG_VARIABLE = "VFLOW_CONFIG"
"""Environment variable that names the TOML file."""


@dataclass(frozen=True)
class Settings:
    """The settings of one service process."""

    model: str | None = option(None, "model folder or hub id (unset: the embedded model)", metavar="PATH")
    device: str = option("cpu", "cpu, cuda or cuda:N", metavar="NAME")
    dtype: str = option("float32", "float32, bfloat16 or float16", metavar="NAME")
    quantization: str | None = option(
        None, "8bit or 4bit: quantize the weights as they are read (unset: leave them as they come)", metavar="NAME"
    )
    threads: int | None = option(None, "CPU threads of the model (unset: torch decides)", whole(1), metavar="N")
    kv_budget: int | Share = option(
        "25%",
        "memory for the KV cache of all sessions; N% is of what is available",
        size_or_share,
        metavar="SIZE",
    )
    host: str = option("127.0.0.1", "address to listen on", metavar="HOST")
    port: int = option("50051", "port to listen on; 0 takes a free one", whole(0, 65535), metavar="N")
    tokens: Path | tuple[TokenEntry, ...] | None = option(
        None,
        "file that lists those who may call, as `vflow token` writes it, or the entries themselves (unset: whoever "
        "reaches the service may do everything, so that it listens to this machine only)",
        entries_or_file,
        metavar="FILE",
    )
    insecure: bool = option("off", "on listens to other machines without tokens, too", switch, metavar="on|off")
    tls_cert: Path | None = option(
        None, "certificate chain to show callers, PEM; read again when it changes (unset: no TLS)", Path, metavar="FILE"
    )
    tls_key: Path | None = option(None, "its private key, PEM", Path, metavar="FILE")
    tls_client_ca: Path | None = option(
        None, "roots of the certificates that callers must show, PEM (unset: they need none)", Path, metavar="FILE"
    )
    admin_host: str = option("127.0.0.1", "address of the port for administrators", metavar="HOST")
    admin_port: int | None = option(
        None,
        "port of its own for the services Strategies and Operations (unset: the same as all; 0 takes a free one)",
        whole(0, 65535),
        metavar="N",
    )
    max_sessions: int = option("1000", "sessions that may live at the same time (*)", whole(1), metavar="N")
    idle_timeout: float = option("15m", "a session unused for this long is deleted", seconds, metavar="TIME")
    max_running: int = option("32", "requests that share the model's steps (*)", whole(1), metavar="N")
    max_waiting: int = option("64", "requests that may wait for the model (*)", whole(1), metavar="N")
    tenant_sessions: int | None = option(
        None, "sessions of one tenant that may live at the same time (unset: no limit)", whole(1), metavar="N"
    )
    tenant_pictures: int | None = option(
        None, "pictures in the sessions of one tenant (unset: no limit)", whole(1), metavar="N"
    )
    tenant_kv: int | None = option(
        None,
        "KV cache that the sessions of one tenant may hold when a turn begins; idle ones are parked for it (unset: no "
        "limit)",
        size,
        metavar="SIZE",
    )
    tenant_turns: int | None = option(
        None,
        "turns, and pictures to show or compress, of one tenant at the same time (unset: no limit)",
        whole(1),
        metavar="N",
    )
    tenant_tokens: int | None = option(
        None, "tokens run or generated a minute for one tenant (unset: no limit)", whole(1), metavar="N"
    )
    max_picture_bytes: int = option("20MiB", "largest picture file", size, metavar="SIZE")
    max_picture_pixels: int = option("50000000", "most pixels of a picture", whole(1), metavar="N")
    max_video_frames: int = option("256", "most frames of the videos of one request", whole(1), metavar="N")
    max_message_bytes: int = option("64MiB", "largest request, and largest response", size, metavar="SIZE")
    picture_memory: int = option("256MiB", "decoded pictures held, to be named by digest", size, metavar="SIZE")
    compressed_memory: int = option(
        "256MiB", "compressed pictures in sessions, and as much again for use again", size, metavar="SIZE"
    )
    parked_memory: int = option("1GiB", "KV caches of idle sessions held outside the KV budget", size, metavar="SIZE")
    spill_dir: Path | None = option(
        None,
        "folder for KV caches beyond parked_memory, and of idle sessions when the service stops (unset: kv in the data "
        "folder; without one they are rebuilt when needed)",
        Path,
        metavar="PATH",
    )
    spill_bytes: int = option("8GiB", "KV caches in that folder", size, metavar="SIZE")
    data: Path | None = option(
        None,
        "folder for sessions, created strategies and searches (unset: forgotten at the end)",
        Path,
        metavar="PATH",
    )
    data_bytes: int = option(
        "8GiB",
        "sessions and their compressed pictures in that folder; KV caches in it have what these leave",
        size,
        metavar="SIZE",
    )
    ephemeral: bool = option(
        "off", "keep sessions in memory only, though there is such a folder", switch, metavar="on|off"
    )
    calibration_samples: int = option(
        "0",
        "latest conversations whose picture and questions are kept in memory, of at most picture_memory, for their "
        "tenant to search for strategies with",
        whole(0),
        metavar="N",
    )
    watch_share: float = option(
        "0",
        "share of the turns that are read again without pruning, in spare time",
        fraction,
        metavar="N",
    )
    watch_floor: float | None = option(
        None,
        "mean cosine of the last hidden states of such turns with the unpruned ones, below which the active strategy "
        "is rolled back (unset: it never is)",
        fraction,
        metavar="N",
    )
    watch_window: int = option(
        "20", "latest such turns of the active strategy that this mean is of", whole(1), metavar="N"
    )
    metrics_host: str = option("127.0.0.1", "address of the side port", metavar="HOST")
    metrics_port: int | None = option(
        None,
        "HTTP port that tells Prometheus its metrics at /metrics (unset: none; 0 takes a free one)",
        whole(0, 65535),
        metavar="N",
    )
    status_page: bool = option(
        "off",
        "on shows sessions, receipts and pictures at / of the side port, on this machine alone",
        switch,
        metavar="on|off",
    )
    otlp_endpoint: str | None = option(
        None, "OpenTelemetry collector to send traces to, such as http://localhost:4317 (unset: none)", metavar="URL"
    )
    connection_idle: float = option(
        "30m", "a connection without a call for this long is closed; callers make another", seconds, metavar="TIME"
    )
    connection_age: float = option(
        "1h", "a connection of this age takes no more calls; callers make another", seconds, metavar="TIME"
    )
    grace: float = option("10s", "time for running calls to end when the service is stopped", seconds, metavar="TIME")
    log_format: str = option("console", "console or json", one_of(("console", "json")), metavar="NAME")
    log_level: str = option(
        "info", "debug, info, warning or error", one_of(("debug", "info", "warning", "error")), metavar="NAME"
    )

    def __post_init__(self) -> None:
        for given, needed in (("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("tls_client_ca", "tls_cert")):
            if getattr(self, given) and not getattr(self, needed):
                raise OptionError(f"{given} is set without {needed}; TLS needs a certificate and its key: set both")
        if self.status_page and self.metrics_port is None:
            raise OptionError("status_page is on without metrics_port, where the page would be: set that, too")
        if self.status_page and not is_loopback(self.metrics_host):
            raise OptionError(
                f"status_page shows what users sent to whoever reaches metrics_host, which is {self.metrics_host!r}; "
                "make that 127.0.0.1, or leave the page out"
            )
        hosts = {"host": self.host, **({} if self.admin_port is None else {"admin_host": self.admin_host})}
        for name, host in hosts.items():
            if self.tokens is None and not self.insecure and not is_loopback(host):
                raise OptionError(
                    f"{name} is {host!r}, and without tokens whoever reaches it may do everything; list those who may "
                    "call (--tokens FILE, `vflow token` makes them), listen on 127.0.0.1, or say --insecure if nobody "
                    "else can reach it"
                )

    def stored(self, file: str) -> Path | None:
        """Where a file of the data folder is; None where there is no such folder."""
        return None if self.data is None else self.data / file

    @property
    def spill_folder(self) -> Path | None:
        """Where KV caches go beyond memory, and when the service stops; None: they do not."""
        return self.spill_dir if self.spill_dir is not None or self.ephemeral else self.stored("kv")


def options() -> dict[str, Option]:
    """Every setting's declaration, by name."""
    return {declared.name: declared.metadata["option"] for declared in fields(Settings)}


def load(flags: Mapping[str, str], environment: Mapping[str, str], file: Path | None = None) -> Settings:
    """Put the settings together.

    Args:
        flags: given on the command line, by name, as text.
        environment: the process's variables.
        file: a TOML file; None takes the one that the environment names, if it does.

    Raises:
        OptionError: a value cannot be used, or the file cannot be read or sets what there is not.
    """
    if file is None and environment.get(CONFIG_VARIABLE):
        file = Path(environment[CONFIG_VARIABLE])
    written = _read(file) if file else {}
    values: dict[str, Any] = {}
    for name, declared in options().items():
        variable = f"{ENVIRONMENT_PREFIX}{name.upper()}"
        if name in flags:
            source, text = f"--{name.replace('_', '-')}", flags[name]
        elif environment.get(variable):
            source, text = variable, environment[variable]
        elif name in written:
            source, text = f"{name} in {file}", written[name]
        else:
            continue
        try:
            values[name] = declared.parse(text)
        except ValueError as error:
            raise OptionError(f"{source} is {text!r}: {error}") from None
    return Settings(**values)


def _read(file: Path) -> dict[str, str]:
    try:
        document = tomllib.loads(file.read_text())
    except OSError as error:
        raise OptionError(f"the settings file {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"the settings file {file} is not valid TOML: {error}") from None
    known = options()
    for name, value in document.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known)}"
            raise OptionError(f"{name!r} in {file} is no setting; {hint}")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise OptionError(f"{name} in {file} must be a text or a number")
    return {name: str(value) for name, value in document.items()}
