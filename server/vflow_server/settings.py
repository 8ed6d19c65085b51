"""The settings of the service. A flag wins over an environment variable, that over the TOML file, that over a default.

Each setting is declared once, as a field of :class:`Settings`: ``kv_budget`` is the flag ``--kv-budget``, the
environment variable ``VFLOW_KV_BUDGET`` and the TOML key ``kv_budget``.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from vflow_server.access.caller import tenants
from vflow_server.access.tokens import TokenEntry, entries_or_file
from vflow_server.option import (
    Option,
    OptionError,
    Share,
    device_name,
    fraction,
    host_name,
    one_of,
    option,
    seconds,
    seconds_or_off,
    size,
    size_or_share,
    switch,
    whole,
)
from vflow_server.rpc.listener import is_loopback

ENVIRONMENT_PREFIX = "VFLOW_"
CONFIG_VARIABLE = "VFLOW_CONFIG"
"""Environment variable that names the TOML file."""


class Group(StrEnum):
    """Headings of the options in ``vflow serve --help``, in the order in which they are shown there."""

    MODEL = "model"
    LISTENING = "listening"
    ACCESS = "tokens and TLS"
    MEMORY = "memory"
    LIMITS = "limits"
    TENANTS = "limits of each tenant"
    STORAGE = "storage"
    STRATEGIES = "strategies"
    MONITORING = "monitoring"
    LOGGING = "logging"


@dataclass(frozen=True)
class Settings:
    """The settings of one service process."""

    model: str | None = option(Group.MODEL, None, "model folder or hub id (unset: the embedded model)", metavar="PATH")
    device: str = option(Group.MODEL, "cpu", "cpu, cuda or cuda:N", device_name, metavar="NAME")
    dtype: str = option(
        Group.MODEL,
        "float32",
        "float32, bfloat16 or float16",
        one_of(("float32", "bfloat16", "float16")),
        metavar="NAME",
    )
    tower_dtype: str = option(
        Group.MODEL,
        "auto",
        "type of the vision tower: float32, bfloat16, float16, or auto: as --dtype, but bfloat16 instead of float32 on "
        "a processor that multiplies it faster, if the two agree on a few pictures",
        one_of(("auto", "float32", "bfloat16", "float16")),
        metavar="NAME",
    )
    quantization: str | None = option(
        Group.MODEL,
        None,
        "8bit or 4bit: quantize the weights while they are read (unset: no quantization)",
        one_of(("8bit", "4bit")),
        metavar="NAME",
    )
    compile_cache: Path | None = option(
        Group.MODEL,
        None,
        "folder to compile the vision encoder into with torch.compile when the service starts; a later start finds it "
        "there (unset: not compiled). Not known to pay off yet",
        Path,
        metavar="FOLDER",
    )
    threads: int | None = option(
        Group.MODEL, None, "CPU threads of the model (unset: torch decides)", whole(1), metavar="N"
    )

    host: str = option(Group.LISTENING, "127.0.0.1", "address to listen on", host_name, metavar="HOST")
    port: int = option(Group.LISTENING, "50051", "port to listen on; 0 takes a free one", whole(0, 65535), metavar="N")
    admin_host: str = option(
        Group.LISTENING, "127.0.0.1", "address of the port for administrators", host_name, metavar="HOST"
    )
    admin_port: int | None = option(
        Group.LISTENING,
        None,
        "separate port for the services Strategies and Operations; 0 takes a free one (unset: --port serves them)",
        whole(0, 65535),
        metavar="N",
    )
    connection_idle: float = option(
        Group.LISTENING,
        "30m",
        "close a connection after this long without a call; clients reconnect",
        seconds,
        metavar="TIME",
    )
    connection_age: float = option(
        Group.LISTENING,
        "1h",
        "accept no more calls on a connection of this age; clients reconnect",
        seconds,
        metavar="TIME",
    )
    grace: float = option(
        Group.LISTENING,
        "10s",
        "how long running calls may take to finish when the service is stopped",
        seconds,
        metavar="TIME",
    )

    tokens: Path | tuple[TokenEntry, ...] | None = option(
        Group.ACCESS,
        None,
        "file that lists who may call, in the format of `vflow token`, or the entries themselves (unset: everybody who "
        "can reach the service may call, so it listens on this machine only)",
        entries_or_file,
        metavar="FILE",
    )
    insecure: bool = option(
        Group.ACCESS, "off", "accept calls from other machines even without tokens", switch, metavar="on|off"
    )
    tls_cert: Path | None = option(
        Group.ACCESS,
        None,
        "certificate chain of the service, PEM; reloaded when the file changes (unset: no TLS)",
        Path,
        metavar="FILE",
    )
    tls_key: Path | None = option(Group.ACCESS, None, "private key of that certificate, PEM", Path, metavar="FILE")
    tls_client_ca: Path | None = option(
        Group.ACCESS,
        None,
        "root certificates that sign client certificates, PEM (unset: clients need no certificate)",
        Path,
        metavar="FILE",
    )

    kv_budget: int | Share = option(
        Group.MEMORY,
        "25%",
        "memory for the KV cache of all sessions, in bytes or as a share of the available memory",
        size_or_share,
        metavar="SIZE",
    )
    kv_dtype: str = option(
        Group.MEMORY,
        "auto",
        "type in which the KV cache is stored: float32, bfloat16, float16 or fp8_e4m3, a byte for each number; auto is "
        "that of --dtype. Another type changes answers slightly",
        one_of(("auto", "float32", "bfloat16", "float16", "fp8_e4m3")),
        metavar="NAME",
    )
    offload_memory: int = option(
        Group.MEMORY, "1GiB", "memory for KV caches of idle sessions, beside the KV budget", size, metavar="SIZE"
    )
    picture_memory: int = option(
        Group.MEMORY, "256MiB", "memory for decoded pictures, which requests can name by digest", size, metavar="SIZE"
    )
    compressed_memory: int = option(
        Group.MEMORY,
        "256MiB",
        "memory for the compressed pictures of sessions, and as much again for those that may be reused",
        size,
        metavar="SIZE",
    )

    message_memory: int | None = option(
        Group.MEMORY,
        None,
        "memory for requests on the way and in use, and for answers; six times --max-message-bytes at least (unset: "
        "512MiB, or eight times --max-message-bytes where that is more)",
        size,
        metavar="SIZE",
    )

    max_sessions: int = option(
        Group.LIMITS, "1000", "sessions that may exist at the same time (*)", whole(1), metavar="N"
    )
    idle_timeout: float = option(
        Group.LIMITS, "15m", "delete a session that has not been used for this long", seconds, metavar="TIME"
    )
    max_running: int = option(Group.LIMITS, "32", "requests that run in one batch (*)", whole(1), metavar="N")
    max_waiting: int = option(
        Group.LIMITS, "64", "requests that may wait for a place in the batch (*)", whole(1), metavar="N"
    )
    max_picture_bytes: int = option(Group.LIMITS, "20MiB", "largest picture file", size, metavar="SIZE")
    max_picture_pixels: int = option(Group.LIMITS, "50000000", "largest picture, in pixels", whole(1), metavar="N")
    picture_seconds: float = option(
        Group.LIMITS,
        "10s",
        "processor time that decoding the largest picture may take; a smaller one gets its share",
        seconds,
        metavar="TIME",
    )
    picture_workers: int | None = option(
        Group.LIMITS,
        None,
        "processes that decode pictures (unset: half as many as there are processors, and 2 at least)",
        whole(2),
        metavar="N",
    )
    max_video_frames: int = option(
        Group.LIMITS, "256", "largest number of video frames in one request", whole(1), metavar="N"
    )
    max_message_bytes: int = option(Group.LIMITS, "64MiB", "largest request or response", size, metavar="SIZE")

    tenant_sessions: int | None = option(
        Group.TENANTS,
        None,
        "sessions of one tenant at the same time (unset: no limit)",
        whole(1),
        metavar="N",
    )
    tenant_pictures: int | None = option(
        Group.TENANTS, None, "pictures in the sessions of one tenant (unset: no limit)", whole(1), metavar="N"
    )
    tenant_kv: int | None = option(
        Group.TENANTS,
        None,
        "KV cache of the sessions of one tenant when a turn begins; idle sessions are offloaded to stay below it "
        "(unset: no limit)",
        size,
        metavar="SIZE",
    )
    tenant_turns: int | None = option(
        Group.TENANTS,
        None,
        "turns and pictures of one tenant in work at the same time (unset: no limit)",
        whole(1),
        metavar="N",
    )
    tenant_tokens: int | None = option(
        Group.TENANTS,
        None,
        "tokens that the model runs for one tenant per minute: visual tokens of pictures that it encodes, and tokens "
        "prefilled or generated (unset: no limit)",
        whole(1),
        metavar="N",
    )

    data: Path | None = option(
        Group.STORAGE,
        None,
        "folder for sessions, created strategies and searches (unset: they are lost when the service stops)",
        Path,
        metavar="PATH",
    )
    data_bytes: int = option(
        Group.STORAGE,
        "8GiB",
        "disk space for the data folder; KV caches in it use what sessions and compressed pictures leave",
        size,
        metavar="SIZE",
    )
    ephemeral: bool = option(
        Group.STORAGE, "off", "hold sessions in memory only, even with a data folder", switch, metavar="on|off"
    )
    spill_dir: Path | None = option(
        Group.STORAGE,
        None,
        "folder for KV caches that do not fit --offload-memory, and for those of idle sessions when the service stops "
        "(unset: `kv` in the data folder; without a data folder they are rebuilt when needed)",
        Path,
        metavar="PATH",
    )
    spill_bytes: int = option(Group.STORAGE, "8GiB", "disk space for KV caches in that folder", size, metavar="SIZE")

    calibration_samples: int = option(
        Group.STRATEGIES,
        "0",
        "how many of the latest conversations stay in memory, with picture and questions and within "
        "--picture-memory, so that their tenant can search for strategies on them",
        whole(0),
        metavar="N",
    )
    watch_share: float = option(
        Group.STRATEGIES,
        "0",
        "share of the turns, from 0 to 1, that are replayed without pruning in spare time",
        fraction,
        metavar="N",
    )
    watch_floor: float | None = option(
        Group.STRATEGIES,
        None,
        "roll the active strategy back when the mean cosine between the last hidden states of the replayed turns, "
        "pruned and unpruned, falls below this (unset: never)",
        fraction,
        metavar="N",
    )
    watch_window: int = option(
        Group.STRATEGIES,
        "20",
        "number of a tenant's replayed turns in that mean, the latest with the active strategy; tenants count equally, "
        "and most of them must be below the floor",
        whole(1),
        metavar="N",
    )
    watch_tenants: frozenset[str] | None = option(
        Group.STRATEGIES,
        None,
        "tenants whose turns are in that mean, separated by commas (unset: all)",
        tenants,
        metavar="NAMES",
    )

    metrics_host: str = option(Group.MONITORING, "127.0.0.1", "address of the metrics port", host_name, metavar="HOST")
    metrics_port: int | None = option(
        Group.MONITORING,
        None,
        "HTTP port that serves Prometheus metrics at /metrics; 0 takes a free one (unset: none)",
        whole(0, 65535),
        metavar="N",
    )
    status_page: bool = option(
        Group.MONITORING,
        "off",
        "serve a page with sessions, receipts and pictures at / of the metrics port, on this machine only",
        switch,
        metavar="on|off",
    )
    watchdog_timeout: float | None = option(
        Group.MONITORING,
        "2m",
        "end the process when a thread or task that the service needs stands still at its work for this long, or "
        "computes on one piece of it for ten times as long; `off`: never",
        seconds_or_off,
        metavar="TIME",
    )
    otlp_endpoint: str | None = option(
        Group.MONITORING,
        None,
        "OpenTelemetry collector that receives traces, such as http://localhost:4317 (unset: none)",
        metavar="URL",
    )

    log_format: str = option(Group.LOGGING, "console", "console or json", one_of(("console", "json")), metavar="NAME")
    log_level: str = option(
        Group.LOGGING,
        "info",
        "debug, info, warning or error",
        one_of(("debug", "info", "warning", "error")),
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        for given, needed in (("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("tls_client_ca", "tls_cert")):
            if getattr(self, given) and not getattr(self, needed):
                raise OptionError(f"{given} is set without {needed}; TLS needs a certificate and its key: set both")
        if self.message_memory is not None and self.message_memory < 6 * self.max_message_bytes:
            raise OptionError(
                f"message_memory is {self.message_memory} bytes and must be at least six times max_message_bytes, "
                f"{6 * self.max_message_bytes}, so that one slow message keeps out no other: set one of them"
            )
        if self.status_page and self.metrics_port is None:
            raise OptionError("status_page is on without metrics_port, which serves the page: set metrics_port, too")
        if self.status_page and not is_loopback(self.metrics_host):
            raise OptionError(
                f"status_page shows what users sent to everybody who reaches metrics_host, which is "
                f"{self.metrics_host!r}; set metrics_host to 127.0.0.1, or turn the page off"
            )
        hosts = {"host": self.host, **({} if self.admin_port is None else {"admin_host": self.admin_host})}
        for name, host in hosts.items():
            if self.tokens is None and not self.insecure and not is_loopback(host):
                raise OptionError(
                    f"{name} is {host!r}, and without tokens whoever reaches it may do everything; list who may call "
                    "(--tokens FILE; `vflow token` makes the entries), listen on 127.0.0.1, or give --insecure if "
                    "nobody else can reach it"
                )

    @property
    def messages_bytes(self) -> int:
        """Bytes of memory for messages."""
        return self.message_memory or max(512 * 2**20, 8 * self.max_message_bytes)

    def stored(self, file: str) -> Path | None:
        """Path of a file in the data folder; None without a data folder."""
        return None if self.data is None else self.data / file

    @property
    def spill_folder(self) -> Path | None:
        """Folder for KV caches that leave memory, and for all of them when the service stops; None: there is none."""
        return self.spill_dir if self.spill_dir is not None or self.ephemeral else self.stored("kv")


def options() -> dict[str, Option]:
    """The declaration of every setting, by name."""
    return {declared.name: declared.metadata["option"] for declared in fields(Settings)}


def load(flags: Mapping[str, str], environment: Mapping[str, str], file: Path | None = None) -> Settings:
    """Put the settings together.

    Args:
        flags: values from the command line, as text, by the name of the setting.
        environment: environment variables of the process.
        file: TOML file; None: the one that the environment names, if any.

    Raises:
        OptionError: a value cannot be used, the file cannot be read, or it sets something unknown.
    """
    if file is None and environment.get(CONFIG_VARIABLE):
        file = Path(environment[CONFIG_VARIABLE])
    document = _read(file) if file else {}
    values: dict[str, Any] = {}
    for name, declared in options().items():
        variable = f"{ENVIRONMENT_PREFIX}{name.upper()}"
        if name in flags:
            source, text = f"--{name.replace('_', '-')}", flags[name]
        elif environment.get(variable, "").strip() or (variable in environment and _protects(declared)):
            source, text = variable, environment[variable]
        elif name in document:
            source, text = f"{name} in {file}", document[name]
        else:
            continue
        if not text.strip():
            hint = "serve without it" if _protects(declared) else f"have {declared.shown or 'none'}"
            raise OptionError(f"{source} is empty; give a value, or leave it out to {hint}")
        try:
            values[name] = declared.parse(text)
        except ValueError as error:
            raise OptionError(f"{source} is {text!r}: {error}") from None
    return Settings(**values)


def _protects(declared: Option) -> bool:
    """Whether a service without this option is open to more callers, so that an empty variable is no way to leave it
    out: it may have been meant to have a value. Elsewhere it is, because containers are often given empty variables."""
    return declared.group == Group.ACCESS and declared.shown is None


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
