"""The errors of the service. Each has a status code, a google.rpc.ErrorInfo, and a message that says what to do.

    ServiceError
    ├── InvalidRequest        INVALID_ARGUMENT, with BadRequest field violations
    ├── NotFound              NOT_FOUND
    └── CapacityExhausted     RESOURCE_EXHAUSTED, with RetryInfo if waiting can help

:func:`foreseen` converts errors of the library, such as a picture that the model cannot take or a strategy that is not
valid. :mod:`vflow_server.interceptors.guard` ends a call with the status of its error.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import grpc
import structlog
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from vflow_client.v1 import errors_pb2
from vflowopt.compression.strategy import StrategyError
from vflowopt.media.picture import PictureError
from vflowopt.media.video import VideoError
from vflowopt.runtime.sampling import SamplingError
from vflowopt.search.calibration import CalibrationError

log = structlog.get_logger(__name__)

DOMAIN = "vflow.dev"
"""``domain`` of every ErrorInfo of this service."""


class ServiceError(Exception):
    """An error with a reason that programs can act on.

    Args:
        code: status code of the call.
        reason: name of a value of the contract's ``ErrorReason``.
        message: what is wrong, what was expected, and what to do next.
        metadata: numbers and names in the message, for programs.
        violations: field paths, with a description of what is wrong with each.
        retry_after: seconds after which a retry may succeed; None: not stated.

    Attributes:
        awaited: whether others wait for what the call lets go of when it ends, so that it must end at once.
    """

    awaited: bool = False

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, object] | None = None,
        violations: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.violations = dict(violations or {})
        self.retry_after = retry_after

    def status(self) -> status_pb2.Status:
        """The error as a google.rpc.Status with its details."""
        errors_pb2.ErrorReason.Value(self.reason)  # raises ValueError for a reason that is not in the contract: a bug
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        ]
        if self.violations:
            fields = [
                error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
                for field, text in self.violations.items()
            ]
            details.append(error_details_pb2.BadRequest(field_violations=fields))
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(round(self.retry_after * 1000))
            details.append(retry)
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        return status_pb2.Status(code=_RPC_CODES[self.code], message=self.message, details=packed)


_RPC_CODES = {code: code_pb2.Code.Value(code.name) for code in grpc.StatusCode}


class InvalidRequest(ServiceError):
    """A request with a ``field`` whose value is not allowed."""

    def __init__(self, reason: str, field: str, message: str, *, metadata: Mapping[str, object] | None = None) -> None:
        super().__init__(
            grpc.StatusCode.INVALID_ARGUMENT,
            reason,
            message,
            metadata={"field": field, **(metadata or {})},
            violations={field: message},
        )


class NotFound(ServiceError):
    """A resource that does not exist, or no longer."""

    def __init__(self, reason: str, message: str, *, metadata: Mapping[str, object] | None = None) -> None:
        super().__init__(grpc.StatusCode.NOT_FOUND, reason, message, metadata=metadata)


class CapacityExhausted(ServiceError):
    """``resource`` is exhausted; ``retry_after`` (seconds) is None if waiting cannot help."""

    def __init__(
        self,
        resource: str,
        message: str,
        *,
        metadata: Mapping[str, object] | None = None,
        retry_after: float | None = 1.0,
    ) -> None:
        super().__init__(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "CAPACITY_EXHAUSTED",
            message,
            metadata={"resource": resource, **(metadata or {})},
            retry_after=retry_after,
        )


def unauthenticated(reason: str, message: str) -> ServiceError:
    """The call has no valid token."""
    return ServiceError(grpc.StatusCode.UNAUTHENTICATED, reason, message)


def server_stopping() -> ServiceError:
    """The service is stopping."""
    return ServiceError(
        grpc.StatusCode.UNAVAILABLE,
        "SERVER_STOPPING",
        "the server is stopping and takes no new work; retry with another server, or with this one once it is back",
        retry_after=1.0,
    )


def engine_failed() -> ServiceError:
    """The engine's thread has died."""
    return ServiceError(
        grpc.StatusCode.UNAVAILABLE,
        "ENGINE_FAILED",
        "the server's engine has failed and answers nothing any more; the server must be restarted (its log says why)",
    )


def session_not_found(name: str) -> NotFound:
    """There is no session ``name``."""
    return NotFound(
        "SESSION_NOT_FOUND",
        f"there is no session {name!r}: it was never created, was deleted, or expired; create a new one",
        metadata={"session": name},
    )


def session_busy(name: str) -> ServiceError:
    """Other work is running in the session ``name``."""
    return ServiceError(
        grpc.StatusCode.ABORTED,
        "SESSION_BUSY",
        f"another turn or picture of {name!r} is being worked on; wait for its end or cancel it, then retry",
        metadata={"session": name},
    )


def session_deleted(name: str) -> ServiceError:
    """The session ``name`` was deleted while its work was running."""
    return ServiceError(
        grpc.StatusCode.ABORTED,
        "SESSION_DELETED",
        f"{name!r} was deleted while this was under way; create a new session",
        metadata={"session": name},
    )


def reader_stalled(seconds: float) -> ServiceError:
    """A caller did not read its answer."""
    return ServiceError(
        grpc.StatusCode.ABORTED,
        "READER_STALLED",
        f"nothing of the answer was taken for {seconds:g} seconds, so the call was ended; read it faster. "
        "If the answer was complete by then, the same request_id brings it again",
    )


def message_not_received(seconds: float) -> ServiceError:
    """A caller began a call, and did not send its message."""
    return ServiceError(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "MESSAGE_NOT_RECEIVED",
        f"the message of this call did not come within {seconds:g} seconds, so the call was ended; send it faster",
    )


def model_changed(name: str, revision: str, served: str) -> ServiceError:
    """The session ``name`` belongs to the model ``revision``, and the model ``served`` is served now."""
    return ServiceError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_CHANGED",
        f"{name!r} belongs to the model of revision {revision}, and the server serves {served} now: it is stored, but "
        "cannot continue; create a new session, or have the server started with the earlier model",
        metadata={"session": name, "revision": revision, "served": served},
    )


def session_damaged(name: str, because: object) -> ServiceError:
    """The record of the session ``name`` is damaged."""
    return ServiceError(
        grpc.StatusCode.DATA_LOSS,
        "SESSION_DAMAGED",
        f"what was stored of {name!r} cannot be read any more ({because}); delete it and create a new session, or have "
        "the server's data folder restored from a backup",
        metadata={"session": name},
    )


def video_unsupported(family: str) -> ServiceError:
    """The model, which is of ``family``, does not support videos."""
    return ServiceError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "VIDEO_UNSUPPORTED",
        f"the server's {family} model takes no videos; show frames as pictures, or have the server started with a "
        "model that takes videos (docs/models.md lists them)",
        metadata={"family": family},
    )


def storage_failed(because: object) -> ServiceError:
    """The data folder cannot be read or written."""
    return ServiceError(
        grpc.StatusCode.UNAVAILABLE,
        "STORAGE_FAILED",
        f"the server cannot use its data folder ({because}) and stored nothing of this; retry when its disk has space "
        "and can be written. Calls that write nothing still work",
        retry_after=10.0,
    )


def operation_not_found(name: str) -> NotFound:
    """There is no operation ``name``."""
    return NotFound(
        "OPERATION_NOT_FOUND",
        f"there is no operation {name!r}: it was never begun, was deleted, or ended long ago; ListOperations names "
        "those that are known",
        metadata={"operation": name},
    )


def operation_cancelled(name: str, draft: str = "") -> ServiceError:
    """The operation ``name`` was cancelled; ``draft`` is the strategy that it left, empty if there is none."""
    return ServiceError(
        grpc.StatusCode.CANCELLED,
        "OPERATION_CANCELLED",
        f"{name!r} was cancelled; {_left(draft)}",
        metadata={"operation": name, **({"strategy": draft} if draft else {})},
    )


def operation_interrupted(name: str, draft: str = "") -> ServiceError:
    """The service stopped while the operation ``name`` was running; ``draft`` as for :func:`operation_cancelled`."""
    return ServiceError(
        grpc.StatusCode.ABORTED,
        "OPERATION_INTERRUPTED",
        f"the server ended while {name!r} ran; {_left(draft)}. Begin it anew",
        metadata={"operation": name, **({"strategy": draft} if draft else {})},
    )


def _left(draft: str) -> str:
    return f"the best strategy found until then is {draft!r}" if draft else "no strategy was kept"


def incident(error: Exception, **where: object) -> ServiceError:
    """An internal error. It is logged with its traceback and ``where``; the caller gets the incident's id."""
    incident = secrets.token_hex(6)
    log.error("a fault of the service", incident=incident, exc_info=error, **where)
    return ServiceError(
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        f"the server failed on this request and kept nothing of it; retry once, and if it fails again report "
        f"incident {incident} with the server's log",
        metadata={"incident": incident},
    )


def foreseen(error: BaseException) -> ServiceError | None:
    """The service's error for ``error``; None if ``error`` is an internal one."""
    match error:
        case ServiceError():
            return error
        case PictureError():
            field = "video" if isinstance(error, VideoError) else "image"
            return InvalidRequest(error.reason, field, str(error), metadata=error.metadata)
        case CalibrationError():  # other invalid samples are refused before
            return InvalidRequest("CONTEXT_EXCEEDED", "calibration", str(error))
        case StrategyError():
            return InvalidRequest("STRATEGY_INVALID", f"strategy.{error.field}", str(error))
        case SamplingError():
            return InvalidRequest("OPTION_OUT_OF_RANGE", f"options.{error.field}", str(error))
        case _:
            return None
