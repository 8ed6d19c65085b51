"""The client without its extra `cli`: the library, and commands that write plain text, need no rich or plotext."""

import subprocess
import sys

import pytest

BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(("rich", "plotext"), None))  # importing them raises ImportError
"""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True)


@pytest.mark.parametrize("module", ["vflow_client", "vflow_client.aio", "vflow_client.terminal"])
def test_modules_import(module: str) -> None:
    result = run(f"import {module}")
    assert result.returncode == 0, result.stderr


def test_a_conversation_and_json_for_programs(address: str) -> None:
    chat = run(f"from vflow_client.terminal import main; sys.exit(main(['--address', '{address}']))")
    assert chat.returncode == 0, chat.stderr
    listing = run(
        f"from vflow_server.cli import main; sys.exit(main(['strategies', 'list', '--json', '--address', '{address}']))"
    )
    assert listing.returncode == 0 and "strategies/full" in listing.stdout, listing.stderr


def test_the_block_is_effective() -> None:
    assert run("import rich").returncode != 0


@pytest.mark.parametrize("command", ["serve", "health", "strategies", "retune"])
def test_help_does_not_wait_for_them(command: str) -> None:
    result = run(f"from vflow_server.cli import main; main(['{command}', '--help'])")
    assert result.returncode == 0, result.stderr
