"""The public names of the library, and the cost of importing it."""

import inspect
import subprocess
import sys

import pytest

import vflowopt

HEAVY = ("torch", "transformers", "PIL", "numpy")


def test_every_public_name_is_there_and_documented() -> None:
    for name in vflowopt.__all__:
        value = getattr(vflowopt, name)
        assert name == "__version__" or inspect.getdoc(value), f"{name} says nothing of itself"
        assert name in dir(vflowopt)


def test_names_are_the_very_ones_of_their_modules() -> None:
    from vflowopt.compression.strategy import Strategy
    from vflowopt.runtime.generate import generate

    assert vflowopt.Strategy is Strategy and vflowopt.generate is generate


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vflowopt' has no attribute 'Conversation'"):
        vflowopt.Conversation  # noqa: B018


@pytest.mark.parametrize(
    ("code", "needed"),
    [
        ("import vflowopt", set()),
        ("from vflowopt import Strategy", set()),
        ("from vflowopt import Picture, Video", {"PIL", "numpy"}),
        ("import vflow_server.settings", set()),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str, needed: set[str]) -> None:
    command = f"{code}; import sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert set(ran.stdout.split()) == needed
