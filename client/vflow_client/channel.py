"""The options of a channel to the service."""

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
"""Largest message that this side takes or sends. Generous, because the service has limits of its own and explains them,
which a limit here would keep from the caller."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A prefill can be silent for long, and routers drop silent connections: ask for a sign of life during calls.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
)
