"""Resource names."""


def strategy_name(strategy: str | None) -> str:
    """The resource name of a strategy given by it or by its last part (`preset-10`); empty for None, the active one."""
    if not strategy or "/" in strategy:
        return strategy or ""
    return f"strategies/{strategy}"
