"""Python client of VFlow: multi-turn conversations about pictures.

    import vflow_client

    with vflow_client.connect("localhost:50051") as client, client.session() as session:
        session.add_image("picture.png")
        for piece in session.ask("What colour is the arrow?"):
            print(piece, end="", flush=True)

`vflow_client.aio` is the same for asyncio. Receipts, usage, sessions and strategies are messages of the contract
(`vflow.v1`), documented there field by field. Failures are exceptions; `vflow_client.errors` shows their hierarchy.
"""

from vflow_client.answer import Answer
from vflow_client.calibration import CalibrationSource, Sample
from vflow_client.chat_request import PartSource
from vflow_client.client import Client, connect
from vflow_client.errors import (
    AdminRequired,
    AnswerChanged,
    CalibrationUnavailable,
    Cancelled,
    CapacityExhausted,
    Conflict,
    ContextExceeded,
    DeadlineExceeded,
    EmptyTurn,
    EngineFailed,
    EtagMismatch,
    InvalidRequest,
    MessageInvalid,
    ModelChanged,
    NameInvalid,
    NotFound,
    NothingToRollBack,
    OperationCancelled,
    OperationInterrupted,
    OperationNotFound,
    OptionOutOfRange,
    PageTokenInvalid,
    PermissionDenied,
    PictureNotHeld,
    PictureRejected,
    ReaderStalled,
    RequestIdReused,
    ResourceExhausted,
    RetuneRunning,
    ServerFault,
    ServerStopping,
    SessionBusy,
    SessionDamaged,
    SessionDeleted,
    SessionNotFound,
    StorageFailed,
    StrategyExists,
    StrategyInvalid,
    StrategyNotFound,
    TenantForbidden,
    TenantInvalid,
    Unauthenticated,
    Unavailable,
    VFlowError,
    VideoRejected,
    VideoUnsupported,
)
from vflow_client.image_source import ImageSource
from vflow_client.retry import RetryPolicy
from vflow_client.retune import Retune
from vflow_client.sample_folder import load_samples
from vflow_client.session import Session
from vflow_client.strategy_admin import StrategyAdmin
from vflow_client.tls import Tls, TlsSource
from vflow_client.v1.compression_pb2 import CompressImageResponse
from vflow_client.v1.conversations_pb2 import Session as SessionState
from vflow_client.v1.conversations_pb2 import TurnReceipt, Usage
from vflow_client.v1.images_pb2 import Image, ImageReceipt
from vflow_client.v1.strategies_pb2 import CompareStrategiesResponse, LiveTraffic, RetuneMetadata, Strategy
from vflow_client.video_source import Video

__all__ = [
    "AdminRequired",
    "Answer",
    "AnswerChanged",
    "CalibrationSource",
    "CalibrationUnavailable",
    "Cancelled",
    "CapacityExhausted",
    "Client",
    "CompareStrategiesResponse",
    "CompressImageResponse",
    "Conflict",
    "ContextExceeded",
    "DeadlineExceeded",
    "EmptyTurn",
    "EngineFailed",
    "EtagMismatch",
    "Image",
    "ImageReceipt",
    "ImageSource",
    "InvalidRequest",
    "LiveTraffic",
    "MessageInvalid",
    "ModelChanged",
    "NameInvalid",
    "NotFound",
    "NothingToRollBack",
    "OperationCancelled",
    "OperationInterrupted",
    "OperationNotFound",
    "OptionOutOfRange",
    "PageTokenInvalid",
    "PartSource",
    "PermissionDenied",
    "PictureNotHeld",
    "PictureRejected",
    "ReaderStalled",
    "RequestIdReused",
    "ResourceExhausted",
    "RetryPolicy",
    "Retune",
    "RetuneMetadata",
    "RetuneRunning",
    "Sample",
    "ServerFault",
    "ServerStopping",
    "Session",
    "SessionBusy",
    "SessionDamaged",
    "SessionDeleted",
    "SessionNotFound",
    "SessionState",
    "StorageFailed",
    "Strategy",
    "StrategyAdmin",
    "StrategyExists",
    "StrategyInvalid",
    "StrategyNotFound",
    "TenantForbidden",
    "TenantInvalid",
    "Tls",
    "TlsSource",
    "TurnReceipt",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "VFlowError",
    "Video",
    "VideoRejected",
    "VideoUnsupported",
    "connect",
    "load_samples",
]
