"""The options of a channel to the service."""

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
"""Largest message that the client sends or receives. The limit is high because the service has limits of its own, whose
errors say what to do."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Routers drop idle connections, and a prefill can take long without any message: ping during calls.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
)
