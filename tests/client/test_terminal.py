"""The conversation in the terminal."""

import io
import os
import subprocess
import sys
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


@pytest.mark.parametrize("line", ["/image", "/images a.png", "/quit now", "/Image a.png"])
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


@pytest.mark.parametrize("line", ["/help", "/?", "?"])
def test_help(client: vflow_client.Client, service: FakeService, line: str) -> None:
    succeeded, out, err = converse(client, [line])
    assert succeeded and out.count("/image PATH adds a picture") == 2 and err == "" and "Chat" not in service.requests


@pytest.mark.parametrize("line", ["/quit", "/exit", " /quit "])
def test_quitting(client: vflow_client.Client, service: FakeService, line: str) -> None:
    succeeded, _, err = converse(client, [line, "How many?"])
    assert succeeded and err == "" and "Chat" not in service.requests


def test_several_pictures_are_dropped_with_quotes_escapes_and_addresses(
    client: vflow_client.Client, service: FakeService, tmp_path: Path
) -> None:
    for name in ("a b.png", "c d.png", "e.png"):
        (tmp_path / name).write_bytes(name.encode())
    escaped = str(tmp_path / "c d.png").replace(" ", "\\ ")
    line = f"/image '{tmp_path}/a b.png' {escaped} {(tmp_path / 'e.png').as_uri()}"
    succeeded, out, err = converse(client, [line])
    assert succeeded and err == ""
    assert [request.image.data for request in service.requests["AddImage"]] == [b"a b.png", b"c d.png", b"e.png"]


def test_the_name_of_a_picture_is_no_question(
    client: vflow_client.Client, service: FakeService, tmp_path: Path
) -> None:
    picture = tmp_path / "a b.png"
    picture.write_bytes(b"picture")
    for line in (str(picture), f"'{picture}'", picture.as_uri()):
        succeeded, out, _ = converse(client, [line])
        assert succeeded and f"to show it: /image {line}" in out
    assert not service.requests


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("https://example.org/a.png", "is not fetched: download it"),
        (".", ".: Is a directory"),
        ("a.pgn", "did you mean 'a.png'?"),
    ],
)
def test_pictures_that_cannot_be_read(
    client: vflow_client.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"picture")
    succeeded, out, err = converse(client, [f"/image {name}", "How many?"])
    assert not succeeded and complaint in err and "two red stars" in out


def in_a_process(address: str, typed: bytes, **environment: str) -> tuple[int, bytes, bytes]:
    """What a terminal of its own makes of `typed`: exit code, output and errors."""
    process = subprocess.run(
        [sys.executable, "-m", "vflow_client", "--address", address],
        input=typed,
        capture_output=True,
        env={"PATH": os.environ["PATH"], **environment},
        timeout=60,
        check=False,
    )
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C.UTF-8"},
        {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"},  # as in any other UTF-8 locale
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=["UTF-8", "strict UTF-8", "ASCII", "Latin-1"],
)
def test_bytes_that_are_no_text_do_not_end_it(
    address: str, service: FakeService, tmp_path: Path, environment: dict[str, str]
) -> None:
    picture = os.fsencode(tmp_path) + b"/\xff\xe9.png"
    with open(picture, "wb") as file:
        file.write(b"picture")
    service.pieces = ["\N{SNOWMAN} ", "here"]
    # The names of files are in the encoding of the system, whatever that of the terminal is said to be.
    show = b"" if environment.get("PYTHONIOENCODING") == "latin-1" else b"/image " + picture
    typed = b"What is \xff this?\n" + show + b"\nAnd that?\n" + "H\N{SNOWMAN}?\n".encode() + b"/quit\n"
    code, out, err = in_a_process(address, typed, **environment)
    assert (code, err) == (0, b"")
    assert out.count(b"here\n[4 tokens") == 3
    asked = [request.parts[0].text for request in service.requests["Chat"]]
    assert asked[0].startswith("What is ") and asked[0].endswith(" this?") and asked[1] == "And that?"
    assert len(service.requests.get("AddImage", [])) == bool(show)
    assert len(service.requests["DeleteSession"]) == 1


def test_a_reader_that_leaves_ends_it_quietly(address: str, service: FakeService) -> None:
    """As in `vflow chat | head -1`."""
    service.pieces = ["word "] * 50
    command = [sys.executable, "-m", "vflow_client", "--address", address]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PATH": os.environ["PATH"]}
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write(b"How many?\n" * 20)
        process.stdin.close()
        assert process.wait(30) == 1 and process.stderr.read() == b""
    assert len(service.requests["DeleteSession"]) == 1


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
    assert main(["--address", "127.0.0.1:1", "--timeout", "3"]) == 1
    waiting, gave_up = capsys.readouterr().err.splitlines()
    assert waiting.startswith("waiting for the service at 127.0.0.1:1, trying again for up to")
    assert gave_up.startswith("error: no service answers at 127.0.0.1:1")


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
