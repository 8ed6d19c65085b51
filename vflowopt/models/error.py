"""What is wrong with a model."""

from __future__ import annotations


class ModelError(RuntimeError):
    """A model that cannot be served.

    Attributes:
        reason: ``MODEL_NOT_FOUND``, ``MODEL_UNREACHABLE``, ``MODEL_FAMILY_UNKNOWN``, ``MODEL_UNREADABLE`` or
            ``MODEL_UNSUPPORTED``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
