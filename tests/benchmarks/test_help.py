"""Every benchmark explains its options."""

import importlib

import pytest

from tests.repository.source import ROOT

COMMANDS = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]
COMMANDS += [f"{path.parent.name}.__main__" for path in sorted((ROOT / "benchmarks").glob("*/__main__.py"))]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_printed(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out or name == "demo"
