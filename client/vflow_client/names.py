"""Resource names."""

OPERATIONS = "operations"
"""The collection of all operations."""


def strategy_name(strategy: str | None) -> str:
    """The resource name of a strategy given by it or by its last part (`preset-10`); empty for None, the active one."""
    if not strategy or "/" in strategy:
        return strategy or ""
    return f"strategies/{strategy}"


def operation_name(operation: str) -> str:
    """The resource name of an operation given by it or by its last part."""
    return operation if "/" in operation else f"{OPERATIONS}/{operation}"
