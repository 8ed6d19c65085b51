"""The conversation in the terminal."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import grpc
import pytest

import vflow_client
from tests.client.fake_service import FakeService, Refusal
from vflow_client.terminal import Terminal, main


def typing(lines: Iterable[str | type[BaseException]]) -> Callable[[str], str]:
    """Stands in for `input`: the given lines, exceptions raised where they come, then the end."""
    remaining = iter(lines)

    def read(prompt: str) -> str:
        line = next(remaining, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def converse(
    client: vflow_client.Client, lines: Iterable[str | type[BaseException]], pictures: Iterable[Path] = ()
) -> tuple[bool, str, str]:
    out, err = io.StringIO(), io.StringIO()
    went_well = Terminal(out, err, typing(lines)).converse(client.attach("sessions/one"), list(pictures))
    return went_well, out.getvalue(), err.getvalue()


def test_pictures_answers_and_receipts(client: vflow_client.Client, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"picture")
    went_well, out, err = converse(client, ["How many?", "", f"/image {picture}"], [picture])
    assert went_well and err == ""
    shown = (
        f"{picture}: [30 x 20, 256 visual tokens, kept 40/20/10 (4 recycled), KV 2.0 KiB instead of 20.0 KiB, 0.00 s]"
    )
    assert out.count(shown) == 2
    assert "two red stars\n[4 tokens, 40 of 50 prompt tokens reused, first token 5 ms" in out


def test_errors_are_told_and_the_conversation_goes_on(client: vflow_client.Client, service: FakeService) -> None:
    service.refusals["Chat"] = [Refusal(grpc.StatusCode.ABORTED, "SESSION_BUSY")]
    went_well, out, err = converse(client, ["How many?", "And now?", "/image /no/such/picture.png"])
    assert not went_well
    assert "error: SESSION_BUSY: refused on purpose" in err
    assert "error: /no/such/picture.png: No such file or directory" in err
    assert "two red stars" in out


def test_a_first_picture_that_cannot_be_shown_ends_it(client: vflow_client.Client, service: FakeService) -> None:
    went_well, out, err = converse(client, ["How many?"], [Path("/no/such/picture.png")])
    assert not went_well and "No such file" in err and "Chat" not in service.requests


def test_interrupting_at_the_prompt_does_nothing(client: vflow_client.Client) -> None:
    went_well, out, _ = converse(client, [KeyboardInterrupt, "How many?"])
    assert went_well and "two red stars" in out


def test_interrupting_an_answer_cancels_it(
    client: vflow_client.Client, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.go_on.clear()
    taken = vflow_client.Answer.__next__
    pieces = iter([taken])

    def interrupted(answer: vflow_client.Answer) -> str:
        for take in pieces:
            return take(answer)
        raise KeyboardInterrupt

    monkeypatch.setattr(vflow_client.Answer, "__next__", interrupted)
    went_well, out, _ = converse(client, ["How many?"])
    assert went_well and "two \n[cancelled" in out
    assert service.cancelled.wait(timeout=5)


def test_the_command_line(
    address: str,
    service: FakeService,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"picture")
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))
    options = ["--address", address, "--strategy", "preset-25", "--max-new-tokens", "7", "--tenant", "red"]
    assert main([str(picture), *options]) == 0
    assert "two red stars" in capsys.readouterr().out
    assert service.requests["CreateSession"][0].session.strategy == "strategies/preset-25"
    assert service.requests["Chat"][0].options.max_new_tokens == 7
    assert set(service.tenants) == {"red"}
    assert len(service.requests["DeleteSession"]) == 1


def test_the_command_line_without_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--address", "127.0.0.1:1"]) == 1
    assert "no service at 127.0.0.1:1" in capsys.readouterr().err
