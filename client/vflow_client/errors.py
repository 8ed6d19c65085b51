"""The exceptions of the client: one class for each reason that a program would treat differently.

    VFlowError                    everything below; also status codes that have no class of their own
    ├── InvalidRequest            the request is wrong: sending it again cannot help
    │   ├── PictureRejected       PICTURE_*: not a picture, damaged, too large, ... (see `reason`)
    │   ├── VideoRejected         VIDEO_*: no frames, too many, of different sizes, ... (see `reason`)
    │   ├── EmptyTurn
    │   ├── OptionOutOfRange
    │   ├── ContextExceeded       the conversation has outgrown the model's context
    │   ├── StrategyInvalid
    │   ├── RequestIdReused
    │   ├── PageTokenInvalid
    │   ├── NameInvalid           not a resource name or digest of the kind that was asked for
    │   ├── TenantInvalid         not the name of a tenant
    │   └── MessageInvalid        not the message that the method expects: client and service use different contracts
    ├── Unauthenticated           TOKEN_*: the token is missing or invalid (see `reason`)
    ├── PermissionDenied          the token is valid, but not for this
    │   ├── AdminRequired         the method is for administrators
    │   └── TenantForbidden       the token is of another tenant
    ├── NotFound
    │   ├── SessionNotFound       never created, deleted, or expired
    │   ├── StrategyNotFound
    │   ├── OperationNotFound     never started, deleted, or another tenant's
    │   └── PictureNotHeld        the service does not store that digest: send the bytes
    ├── Conflict                  the request is right, but not now
    │   ├── SessionBusy           another turn of the session is running
    │   ├── SessionDeleted        the session was deleted while the turn ran
    │   ├── AnswerChanged         the connection broke in the middle of an answer, and it cannot be continued
    │   ├── ModelChanged          the session belongs to another model and cannot go on with this one
    │   ├── VideoUnsupported      the model of the service does not support videos
    │   ├── ReaderStalled         this side did not read the answer for too long
    │   ├── StrategyExists
    │   ├── EtagMismatch          the active strategy changed since the etag was read
    │   ├── NothingToRollBack     no strategy was active before this one
    │   ├── RetuneRunning         another search runs; `metadata` names its operation
    │   ├── CalibrationUnavailable  the service has no live traffic to measure on
    │   └── OperationInterrupted  the service stopped while the operation ran: start it again
    ├── Unavailable               the service cannot be reached, or accepts no work
    │   ├── ServerStopping
    │   ├── EngineFailed
    │   └── StorageFailed         the service cannot use its data folder; nothing of the request was stored
    ├── ResourceExhausted         a limit on the way, such as the size of a message
    │   └── CapacityExhausted     no capacity; without a `retry_after`, waiting does not help
    ├── DeadlineExceeded          the timeout passed before the call ended
    ├── Cancelled                 the client cancelled the call, or the service stopped
    │   └── OperationCancelled    the operation was cancelled; `metadata` names the draft that it left
    ├── ServerFault               a fault of the service itself
    └── SessionDamaged            the stored session can no longer be read

Reasons are the values of `vflow.v1.ErrorReason`. A reason that this client does not know yet falls back to the class
for its status code.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "vflow.dev"


class VFlowError(Exception):
    """A call failed.

    Attributes:
        message: what is wrong and what to do about it.
        code: the gRPC status code.
        reason: the name of an `ErrorReason`, or None where the error did not come from the service.
        metadata: details of the reason, as documented with each `ErrorReason`.
        fields: the problem with each wrong field of the request, by the path of the field.
        retry_after: seconds after which the service suggests another attempt, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.fields = dict(fields or {})
        self.retry_after = retry_after

    def __str__(self) -> str:
        """The message, with the reason or status code in front."""
        return f"{self.reason or self.code.name}: {self.message}"


class InvalidRequest(VFlowError):
    """The request is wrong; sending it again cannot help."""


class PictureRejected(InvalidRequest):
    """The picture cannot be used; `reason` (PICTURE_...) says why."""


class VideoRejected(InvalidRequest):
    """The frames cannot be used as a video; `reason` (VIDEO_...) says why."""


class EmptyTurn(InvalidRequest):
    """The turn, or a part of it, is empty."""


class OptionOutOfRange(InvalidRequest):
    """A field is outside its documented range."""


class ContextExceeded(InvalidRequest):
    """The conversation with this turn does not fit the model's context; open a new session."""


class StrategyInvalid(InvalidRequest):
    """A field of the strategy is wrong, or its fields contradict each other."""


class RequestIdReused(InvalidRequest):
    """The request_id was used before, for another request."""


class PageTokenInvalid(InvalidRequest):
    """The page token was not issued by the service."""


class NameInvalid(InvalidRequest):
    """Not a resource name, or not a digest, of the kind that was asked for."""


class TenantInvalid(InvalidRequest):
    """Not the name of a tenant: 1 to 63 lower-case letters, digits and hyphens."""


class MessageInvalid(InvalidRequest):
    """Not the message that the method expects: this client and the service use different contracts."""


class Unauthenticated(VFlowError):
    """The service requires a token, and it is missing, invalid or expired; `reason` (TOKEN_...) says which."""


class PermissionDenied(VFlowError):
    """The token is valid, but not for this."""


class AdminRequired(PermissionDenied):
    """The method is for administrators, and the token belongs to a user."""


class TenantForbidden(PermissionDenied):
    """The token belongs to another tenant than the one that the call names."""


class NotFound(VFlowError):
    """The request names something that does not exist."""


class SessionNotFound(NotFound):
    """The session was never created, was deleted, or has expired."""


class StrategyNotFound(NotFound):
    """There is no such strategy."""


class OperationNotFound(NotFound):
    """The operation was never started, was deleted, or belongs to another tenant."""


class PictureNotHeld(NotFound):
    """The service does not store the picture with this digest; send its bytes."""


class Conflict(VFlowError):
    """The request contradicts the present state of the service."""


class SessionBusy(Conflict):
    """Another turn or picture of this session is being processed."""


class SessionDeleted(Conflict):
    """The session was deleted while the turn ran."""


class AnswerChanged(Conflict):
    """The connection broke in the middle of an answer, and the service, asked again, answered in other words.

    The text that was read is not the beginning of the new answer. Whether that one counts, `Session.state()` shows.
    """


class ModelChanged(Conflict):
    """The session belongs to another model than the service has now; it is still stored, but cannot go on."""


class VideoUnsupported(Conflict):
    """The model of the service does not support videos: add the frames as pictures."""


class ReaderStalled(Conflict):
    """The answer was not read for too long, so the service ended the call."""


class StrategyExists(Conflict):
    """The identifier belongs to another strategy."""


class EtagMismatch(Conflict):
    """The active strategy changed since the etag was read."""


class NothingToRollBack(Conflict):
    """No strategy was active before the present one."""


class RetuneRunning(Conflict):
    """Another search is running; `metadata["operation"]` names it."""


class CalibrationUnavailable(Conflict):
    """The service has no live traffic: it records none, or there was none since the last search."""


class OperationInterrupted(Conflict):
    """The service stopped while the operation ran: start it again. `metadata["strategy"]` names the draft, if any."""


class Unavailable(VFlowError):
    """The service cannot be reached, or accepts no work."""


class ServerStopping(Unavailable):
    """The service is shutting down."""


class EngineFailed(Unavailable):
    """The engine of the service has failed; it must be restarted."""


class StorageFailed(Unavailable):
    """The service cannot use its data folder and stored nothing of the request; try again after `retry_after`."""


class ResourceExhausted(VFlowError):
    """A limit on the way was hit, such as the size of a message."""


class CapacityExhausted(ResourceExhausted):
    """The service has no room; nothing was changed. Where `retry_after` is None, waiting does not help."""


class DeadlineExceeded(VFlowError):
    """The timeout passed before the call ended, or the service waited too long for the request to arrive.

    A turn that the service had not finished does not count.
    """


class Cancelled(VFlowError):
    """The client cancelled the call, or the service stopped before it handled the call."""


class OperationCancelled(Cancelled):
    """The operation was cancelled; `metadata["strategy"]` names the draft, if any."""


class ServerFault(VFlowError):
    """An internal error of the service; see its log."""


class SessionDamaged(VFlowError):
    """The stored session can no longer be read; delete it and open a new one."""


CLASS_OF_REASON: Mapping[str, type[VFlowError]] = {
    "SESSION_NOT_FOUND": SessionNotFound,
    "SESSION_BUSY": SessionBusy,
    "SESSION_DELETED": SessionDeleted,
    "STRATEGY_NOT_FOUND": StrategyNotFound,
    "STRATEGY_INVALID": StrategyInvalid,
    "STRATEGY_EXISTS": StrategyExists,
    "ETAG_MISMATCH": EtagMismatch,
    "NOTHING_TO_ROLL_BACK": NothingToRollBack,
    "RETUNE_RUNNING": RetuneRunning,
    "CALIBRATION_UNAVAILABLE": CalibrationUnavailable,
    "OPERATION_NOT_FOUND": OperationNotFound,
    "OPERATION_CANCELLED": OperationCancelled,
    "OPERATION_INTERRUPTED": OperationInterrupted,
    "PICTURE_EMPTY": PictureRejected,
    "PICTURE_NOT_AN_IMAGE": PictureRejected,
    "PICTURE_TRUNCATED": PictureRejected,
    "PICTURE_TOO_LARGE": PictureRejected,
    "PICTURE_TOO_MANY_PIXELS": PictureRejected,
    "PICTURE_TOO_SMALL": PictureRejected,
    "PICTURE_TOO_NARROW": PictureRejected,
    "PICTURE_UNSUPPORTED": PictureRejected,
    "PICTURE_TOO_COMPLEX": PictureRejected,
    "VIDEO_EMPTY": VideoRejected,
    "VIDEO_TOO_LONG": VideoRejected,
    "VIDEO_FRAMES_UNEQUAL": VideoRejected,
    "VIDEO_TIMES_INVALID": VideoRejected,
    "VIDEO_UNSUPPORTED": VideoUnsupported,
    "PICTURE_NOT_HELD": PictureNotHeld,
    "DIGEST_INVALID": NameInvalid,
    "EMPTY_TURN": EmptyTurn,
    "OPTION_OUT_OF_RANGE": OptionOutOfRange,
    "CONTEXT_EXCEEDED": ContextExceeded,
    "REQUEST_ID_REUSED": RequestIdReused,
    "PAGE_TOKEN_INVALID": PageTokenInvalid,
    "NAME_INVALID": NameInvalid,
    "TENANT_INVALID": TenantInvalid,
    "MESSAGE_INVALID": MessageInvalid,
    "MESSAGE_NOT_RECEIVED": DeadlineExceeded,
    "TOKEN_MISSING": Unauthenticated,
    "TOKEN_INVALID": Unauthenticated,
    "TOKEN_EXPIRED": Unauthenticated,
    "ADMIN_REQUIRED": AdminRequired,
    "TENANT_FORBIDDEN": TenantForbidden,
    "CAPACITY_EXHAUSTED": CapacityExhausted,
    "SERVER_STOPPING": ServerStopping,
    "ENGINE_FAILED": EngineFailed,
    "READER_STALLED": ReaderStalled,
    "INTERNAL": ServerFault,
    "MODEL_CHANGED": ModelChanged,
    "SESSION_DAMAGED": SessionDamaged,
    "STORAGE_FAILED": StorageFailed,
}

CLASS_OF_CODE: Mapping[grpc.StatusCode, type[VFlowError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: ServerFault,
}

_CODE_OF_NUMBER: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def error_from_call(call: grpc.RpcError) -> VFlowError:
    """Turns the error of a gRPC call, synchronous or asyncio, into the exception of this module that fits it best."""
    return _error(call.code(), call.details(), _details(call.trailing_metadata() or ()))


def error_from_status(status: status_pb2.Status) -> VFlowError:
    """Turns the status with which an operation failed into the exception of this module that fits it best."""
    return _error(_CODE_OF_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN), status.message, status.details)


def _details(trailers: Iterable[Any]) -> Iterator[any_pb2.Any]:
    """The details of the status that trailers (key, value) carry."""
    for key, value in trailers:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            yield from status_pb2.Status.FromString(value).details


def _error(code: grpc.StatusCode, message: str | None, details: Iterable[any_pb2.Any]) -> VFlowError:
    """The exception for a status whose details name this service's reason, field violations and retry delay."""
    info: error_details_pb2.ErrorInfo | None = None
    fields: dict[str, str] = {}
    retry_after: float | None = None
    for detail in details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            candidate = error_details_pb2.ErrorInfo()
            detail.Unpack(candidate)
            if candidate.domain == DOMAIN:
                info = candidate
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            request = error_details_pb2.BadRequest()
            detail.Unpack(request)
            fields.update((violation.field, violation.description) for violation in request.field_violations)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    reason = info.reason if info is not None else None
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and info is None and "message larger than max" in (message or ""):
        # gRPC refuses the message before the service sees it, so the advice is added here.
        message = f"{message}: send fewer or smaller pictures at once, or raise the service's --max-message-bytes"
    kind = CLASS_OF_REASON.get(reason or "", CLASS_OF_CODE.get(code, VFlowError))
    return kind(
        message or f"the call failed with status {code.name}",
        code=code,
        reason=reason,
        metadata=info.metadata if info is not None else None,
        fields=fields,
        retry_after=retry_after,
    )
