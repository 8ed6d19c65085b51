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
    succeeded = Terminal(out, err, typing(lines)).converse(client.attach("sessions/one"), list(pictures))
    return succeeded, out.getvalue(), err.getvalue()


def test_pictures_answers_and_receipts(client: vflow_client.Client, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"picture")
    succeeded, out, err = converse(client, ["How many?", "", f"/image {picture}"], [picture])
    assert succeeded and err == ""
    shown = (
        f"{picture}: [30 x 20, 256 visual tokens, kept 40/20/10 (4 recycled), KV 2.0 KiB instead of 20.0 KiB, 0.00 s]"
    )
    assert out.count(shown) == 2
    assert "two red stars\n[4 tokens, 40 of 50 prompt tokens reused, first token 5 ms" in out


def test_errors_are_told_and_the_conversation_goes_on(client: vflow_client.Client, service: FakeService) -> None:
    service.refusals["Chat"] = [Refusal(grpc.StatusCode.ABORTED, "SESSION_BUSY")]
    succeeded, out, err = converse(client, ["How many?", "And now?", "/image /no/such/picture.png"])
    assert not succeeded
    assert "error: SESSION_BUSY: refused on purpose" in err
    assert "error: /no/such/picture.png: No such file or directory" in err
    assert "two red stars" in out


def test_a_first_picture_that_cannot_be_shown_ends_it(client: vflow_client.Client, service: FakeService) -> None:
    succeeded, out, err = converse(client, ["How many?"], [Path("/no/such/picture.png")])
    assert not succeeded and "No such file" in err and "Chat" not in service.requests


@pytest.mark.parametrize("line", ["/quit", "/image", "/images a.png"])
def test_what_is_no_command_is_not_asked_of_the_model(
    client: vflow_client.Client, service: FakeService, line: str
) -> None:
    succeeded, _, err = converse(client, [line, "How many?"])
    assert not succeeded and f"error: '{line}' is no command; /image PATH adds a picture" in err
    assert [request.parts[0].text for request in service.requests["Chat"]] == ["How many?"]


def test_a_picture_may_be_named_from_home(
    client: vflow_client.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.png").write_bytes(b"picture")
    succeeded, out, _ = converse(client, ["/image ~/a b.png"])
    assert succeeded and f"{tmp_path}/a b.png: [30 x 20" in out


def test_interrupting_at_the_prompt_does_nothing(client: vflow_client.Client) -> None:
    succeeded, out, _ = converse(client, [KeyboardInterrupt, "How many?"])
    assert succeeded and "two red stars" in out


def test_interrupting_an_answer_cancels_it(
    client: vflow_client.Client, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.go_on.clear()
    read_piece = vflow_client.Answer.__next__
    pieces = iter([read_piece])

    def interrupted(answer: vflow_client.Answer) -> str:
        for read in pieces:
            return read(answer)
        raise KeyboardInterrupt

    monkeypatch.setattr(vflow_client.Answer, "__next__", interrupted)
    succeeded, out, _ = converse(client, ["How many?"])
    assert succeeded and "two \n[cancelled" in out
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
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {picture}\nHow many?\n"))
    options = ["--address", address, "--strategy", "preset-25", "--max-new-tokens", "7", "--tenant", "red"]
    assert main([str(picture), *options, "--detail", "low"]) == 0
    assert "two red stars" in capsys.readouterr().out
    assert service.requests["CreateSession"][0].session.strategy == "strategies/preset-25"
    assert [request.image.detail for request in service.requests["AddImage"]] == [vflow_client.Image.LOW] * 2
    assert service.requests["Chat"][0].options.max_new_tokens == 7
    assert set(service.tenants) == {"red"}
    assert len(service.requests["DeleteSession"]) == 1


def test_the_command_line_without_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--address", "127.0.0.1:1"]) == 1
    assert "no service answers at 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--detail", "medium"], ["--max-new-tokens", "0"], ["--timeout", "-3"], ["--timeout", "soon"]]
)
def test_options_that_cannot_be(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2 and options[1] in capsys.readouterr().err


def test_a_service_that_gives_its_reason_is_there(
    address: str, service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.refusals["CreateSession"] = [Refusal(grpc.StatusCode.UNAVAILABLE, "ENGINE_FAILED")]
    assert main(["--address", address]) == 1
    assert capsys.readouterr().err == "error: ENGINE_FAILED: refused on purpose\n"


def test_an_unknown_strategy_leads_to_the_list(
    address: str, service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.refusals["CreateSession"] = [Refusal(grpc.StatusCode.NOT_FOUND, "STRATEGY_NOT_FOUND")]
    assert main(["--address", address, "--strategy", "nope"]) == 1
    assert "(vflow strategies list)" in capsys.readouterr().err
