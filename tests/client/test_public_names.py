"""`__all__` against drift: what is public is listed, and what is listed exists."""

import inspect
from types import ModuleType

import pytest

import vflow_client
import vflow_client.aio
from vflow_client import errors


@pytest.mark.parametrize("module", [vflow_client, vflow_client.aio])
def test_all_lists_exactly_the_public_names(module: ModuleType) -> None:
    public = {name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert set(module.__all__) == public
    assert module.__all__ == sorted(module.__all__)


def test_every_exception_is_public() -> None:
    exceptions = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert exceptions <= set(vflow_client.__all__)


def test_every_public_name_is_documented_by_this_package_or_the_contract() -> None:
    for name in vflow_client.__all__:
        value = getattr(vflow_client, name)
        if inspect.isclass(value) and value.__module__.startswith("vflow_client"):
            assert value.__doc__, name
