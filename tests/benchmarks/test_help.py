"""Every benchmark explains its options."""

import importlib

import pytest


@pytest.mark.parametrize("name", ["capacity", "conversation", "demo", "fidelity", "geometry", "retention", "scoring"])
def test_help_is_printed(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out or name == "demo"
