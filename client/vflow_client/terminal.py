"""A conversation in the terminal with a running service: `vflow chat`, or `python -m vflow_client`.

Each answer is printed while it streams, followed by one line of receipt. Ctrl-C cancels the current answer, Ctrl-D ends
the conversation.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO, get_args

from vflow_client.commands.connection import add_connection_arguments, connected
from vflow_client.commands.exit_code import DONE, FAILED, exit_code_of, print_error
from vflow_client.commands.typed_paths import typed_paths
from vflow_client.commands.whole_number import at_least
from vflow_client.errors import VFlowError
from vflow_client.image_source import Detail
from vflow_client.picture_path import names_picture
from vflow_client.quantities import size
from vflow_client.retry import DEFAULT_TIMEOUT
from vflow_client.session import FAREWELL, Session
from vflow_client.v1.conversations_pb2 import TurnReceipt, Usage
from vflow_client.v1.images_pb2 import ImageReceipt

HELP = "/image PATH adds a picture, Ctrl-C cancels an answer, Ctrl-D or /quit ends the conversation"

_ASKS_FOR_HELP = ("/help", "/?", "?")
_QUITS = ("/quit", "/exit")


class Terminal:
    """A conversation between a person and a session.

    Args:
        out: stream for answers and receipts.
        err: stream for errors.
        read: reads a line after showing a prompt; raises EOFError at the end, as `input` does.
    """

    def __init__(self, out: TextIO, err: TextIO, read: Callable[[str], str] = input) -> None:
        self._out = out
        self._err = err
        self._read = read

    def converse(
        self,
        session: Session,
        pictures: Sequence[str | Path],
        *,
        detail: Detail = "auto",
        max_new_tokens: int | None = None,
    ) -> bool:
        """Adds `pictures`, then reads questions until there are no more. Returns whether everything succeeded.

        Args:
            session: the session.
            pictures: added before the first question; one that cannot be added ends the conversation.
            detail: how closely the model looks at the pictures.
            max_new_tokens: tokens of an answer at most.
        """
        for picture in pictures:
            if not self._add_image(session, picture, detail):
                return False
        self._print(HELP)
        succeeded = True
        while True:
            try:
                line = self._read("> ").strip()
            except EOFError:
                self._print("")
                return succeeded
            except KeyboardInterrupt:
                self._print("")
                continue
            command, *argument = line.split(maxsplit=1)[:2] or [""]
            if command == "/image" and argument:
                for path in typed_paths(argument[0]):
                    succeeded &= self._add_image(session, path, detail)
            elif line in _QUITS:
                return succeeded
            elif line in _ASKS_FOR_HELP:
                self._print(HELP)
            elif command.startswith("/") and not names_pictures(line):
                succeeded = self._print_error(f"{line!r} is no command; {HELP}")
            elif names_pictures(line):
                self._print(f"this is the name of a file; to show it: /image {line}")
            elif line:
                succeeded &= self._ask(session, line, max_new_tokens)

    def _add_image(self, session: Session, picture: str | Path, detail: Detail) -> bool:
        try:
            receipt = session.add_image(str(picture), detail=detail)
        except OSError as error:
            return self._print_error(f"{picture}: {error.strerror or error}")
        except ValueError as error:
            return self._print_error(str(error))
        except VFlowError as error:
            return self._print_error(f"{picture}: {error}")
        except KeyboardInterrupt:
            return self._print_error(f"{picture}: interrupted")
        self._print(f"{picture}: {describe_picture(receipt)}")
        return True

    def _ask(self, session: Session, question: str, max_new_tokens: int | None) -> bool:
        try:
            with session.ask(_sendable(question), max_new_tokens=max_new_tokens) as answer:
                for piece in answer:
                    self._out.write(piece)
                    self._out.flush()
        except KeyboardInterrupt:
            self._print("\n[cancelled]")
            return True
        except VFlowError as error:
            self._print("")
            return self._print_error(str(error))
        self._print(f"\n{describe_turn(answer.usage, answer.receipt)}")
        return True

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def _print_error(self, text: str) -> bool:
        print(f"error: {text}", file=self._err, flush=True)
        return False


def names_pictures(line: str) -> bool:
    """Whether a line is nothing but names of pictures that exist, as when files are dropped on the terminal."""
    return all(map(names_picture, typed_paths(line))) if line else False


def _sendable(text: str) -> str:
    """`text` with U+FFFD in place of bytes that were no text."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def describe_picture(receipt: ImageReceipt) -> str:
    """The receipt of a picture in one line."""
    kept = "/".join(str(count) for count in receipt.kept_tokens)
    seconds = (receipt.encode_ms + receipt.score_ms + receipt.prune_ms + receipt.prefill_ms) / 1000
    return (
        f"[{receipt.width} x {receipt.height}, {receipt.visual_tokens} visual tokens, kept {kept} "
        f"({receipt.recycled_tokens} recycled), KV {_saving(receipt.kv_bytes, receipt.kv_bytes_full)}, {seconds:.2f} s"
        f"{', from the cache' if receipt.cache_hit else ''}]"
    )


def describe_turn(usage: Usage, receipt: TurnReceipt) -> str:
    """The receipt of a turn in one line."""
    return (
        f"[{usage.completion_tokens} tokens, {usage.reused_tokens} of {usage.prompt_tokens} prompt tokens reused, "
        f"first token {receipt.first_token_ms:.0f} ms, in all {receipt.total_ms / 1000:.2f} s, "
        f"KV {_saving(receipt.kv_bytes, receipt.kv_bytes_full)}{', cache restored' if receipt.restored else ''}]"
    )


def _saving(used: int, full: int) -> str:
    """`12.3 KiB instead of 98.4 KiB`."""
    return f"{size(used)} instead of {size(full)}" if full > used else size(used)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the conversation on `parser`."""
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="pictures to talk about")
    add_connection_arguments(parser, timeout=DEFAULT_TIMEOUT, limits="per answer")
    parser.add_argument(
        "--strategy", help="strategy that compresses the pictures, such as preset-25 (default: the active one)"
    )
    parser.add_argument(
        "--detail",
        choices=get_args(Detail),
        default="auto",
        help="how closely the model looks at the pictures; low costs fewer tokens (default: auto)",
    )
    parser.add_argument("--max-new-tokens", type=at_least(1), help="most tokens of an answer (default: the service's)")


def run(arguments: argparse.Namespace) -> int:
    """Holds a conversation with the parsed `arguments`; returns the exit code: 0, or 1 if anything failed."""
    # With this module, input() has line editing and a history. Some platforms lack it.
    with suppress(ImportError):
        import readline

        if os.environ.get("TERM", "dumb") != "dumb":
            # A text of several lines that is pasted is one question, not several.
            readline.parse_and_bind("set enable-bracketed-paste on")
    _tolerate(sys.stdin, "surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        _tolerate(stream, "replace")
    return exit_code_of(lambda: _converse(arguments), arguments.address)


def _tolerate(stream: TextIO | None, errors: str) -> None:
    """Has a stream take what its encoding cannot, so that one character does not end the conversation."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=errors)


def _converse(arguments: argparse.Namespace) -> int:
    terminal = Terminal(sys.stdout, sys.stderr)
    with connected(arguments) as client:
        session = client.session(arguments.strategy)
        try:
            succeeded = terminal.converse(
                session, arguments.pictures, detail=arguments.detail, max_new_tokens=arguments.max_new_tokens
            )
        finally:
            _delete(session)
    return DONE if succeeded else FAILED


def _delete(session: Session) -> None:
    """Deletes the session, unless the service is away: a person who leaves does not wait for it to come back."""
    try:
        session.delete(timeout=FAREWELL)
    except VFlowError as error:
        print_error(f"the conversation was not deleted, and expires in time: {error}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m vflow_client`."""
    parser = argparse.ArgumentParser("python -m vflow_client", description="Talk about pictures with a VFlow service.")
    add_arguments(parser)
    return run(parser.parse_args(argv))
