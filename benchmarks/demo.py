"""The whole service in one command: a picture, a conversation over gRPC, and what compression saved.

Starts a real service on the embedded model, holds the same conversation with the active strategy and with all tokens,
prints the cost of each, and draws the picture with its importance map and the tokens that each stage keeps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

import vflow_client
from benchmarks.figure import TokenMap, draw
from benchmarks.line_chart import save
from benchmarks.service import running_service
from benchmarks.table import Row, render
from vflowopt.demo import picture_path

FULL = "strategies/full"
GENERIC_QUESTIONS = (
    "What colour is the background?",
    "What colour is the circle?",
    "Where is the star?",
    "What shape is the red object?",
    "Is there a blue square?",
)


@dataclass
class Held:
    """A finished conversation: its receipts and answers."""

    image: vflow_client.ImageReceipt
    answers: list[str] = field(default_factory=list)
    turns: list[vflow_client.TurnReceipt] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--image", type=Path, help="a picture of yours (default: a bundled one)")
    parser.add_argument("--question", action="append", help="a question; give it several times (default: five)")
    parser.add_argument("--strategy", help="the strategy to show (default: the service's active one)")
    parser.add_argument("--out", type=Path, help="where to write the figure (default: demo-PICTURE.png, here)")
    options = parser.parse_args(arguments)
    picture = options.image or picture_path() / "cat.png"
    try:
        data = picture.read_bytes()
        shown = ImageOps.exif_transpose(Image.open(picture))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        print(f"demo: cannot read {picture} as a picture: {error}; give a PNG or JPEG file by IMAGE=", file=sys.stderr)
        return 2
    questions, truths = _questions(picture, options)
    figure = options.out or Path(f"demo-{picture.stem}.png")

    print(f"Picture: {picture.name}, {shown.width} x {shown.height} pixels. Starting the service ...", flush=True)
    try:
        with running_service("--log-level", "warning") as address, vflow_client.connect(address) as client:
            # Both once before they are measured: the first pass of a process allocates memory that later ones reuse.
            for name in (options.strategy, FULL):
                _hold(client, name, data, questions[:1], None, quiet=True, warm_up=True)
            compressed = _hold(client, options.strategy, data, questions, truths, quiet=False)
            full = _hold(client, FULL, data, questions, None, quiet=True)
            response = client.compress(data, strategy=options.strategy)
    except (vflow_client.VFlowError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    _print_table(compressed, full)
    same = sum(first == second for first, second in zip(compressed.answers, full.answers, strict=True))
    print(f"\nAnswers equal to those at 100%: {same} of {len(questions)}.")
    drawn = draw(
        shown.convert("RGB"),
        _token_maps(response),
        _stage_names(response),
        title=f"{picture.name}: {_summary(compressed.image)}",
        answers=list(zip(questions, compressed.answers, full.answers, strict=True)),
    )
    save(drawn, figure)
    print(f"Figure: {figure}")
    return 0


def _questions(picture: Path, options: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """The questions, and their true answers if they are known."""
    if options.question:
        return options.question, None
    if options.image:
        print("The embedded model knows coloured shapes only; on other pictures its answers mean little.")
        return list(GENERIC_QUESTIONS), None
    known = json.loads(picture.with_name("questions.json").read_text())[picture.name]
    return [each["question"] for each in known], [each["answer"] for each in known]


def _hold(
    client: vflow_client.Client,
    strategy: str | None,
    data: bytes,
    questions: Sequence[str],
    truths: Sequence[str] | None,
    *,
    quiet: bool,
    warm_up: bool = False,
) -> Held:
    """Hold the conversation, printing it as it streams unless ``quiet``."""
    with client.session(strategy) as session:
        # A file with one more byte is another picture: the warm-up must not fill the cache of the measured one.
        held = Held(session.add_image(data + b"\0" if warm_up else data))
        for index, question in enumerate(questions):
            answer = session.ask(question)
            if not quiet:
                print(f"\n  {question}\n    ", end="", flush=True)
            for piece in answer:
                if not quiet:
                    print(piece, end="", flush=True)
            held.answers.append(answer.text)
            held.turns.append(answer.receipt)
            if not quiet and truths:
                print("" if answer.text == truths[index] else f"   (true: {truths[index]})", end="")
        if not quiet:
            print()
    return held


def _print_table(compressed: Held, full: Held) -> None:
    """What both conversations cost, side by side."""
    first, second = compressed.image, full.image
    lines: list[tuple[str, str, str]] = [
        ("visual tokens before", f"{first.visual_tokens:,}", f"{second.visual_tokens:,}"),
        ("kept per stage", _stages(first.kept_tokens), _stages(second.kept_tokens)),
        ("of these recycled", f"{first.recycled_tokens}", f"{second.recycled_tokens}"),
        ("KV bytes of the picture", f"{first.kv_bytes:,}", f"{second.kv_bytes:,}"),
        ("  unpruned it would be", f"{first.kv_bytes_full:,}", f"{second.kv_bytes_full:,}"),
        ("  share", f"{first.kv_bytes / first.kv_bytes_full:.1%}", f"{second.kv_bytes / second.kv_bytes_full:.1%}"),
        ("encode, ms", f"{first.encode_ms:.1f}", f"{second.encode_ms:.1f}"),
        ("score, ms", f"{first.score_ms:.1f}", f"{second.score_ms:.1f}"),
        ("prune and recycle, ms", f"{first.prune_ms:.1f}", f"{second.prune_ms:.1f}"),
        ("prefill of the picture, ms", f"{first.prefill_ms:.1f}", f"{second.prefill_ms:.1f}"),
    ]
    for index, (one, other) in enumerate(zip(compressed.turns, full.turns, strict=True), 1):
        lines.append(
            (
                f"turn {index}: prefill / first token / all, ms",
                f"{one.prefill_ms:.1f} / {one.first_token_ms:.1f} / {one.total_ms:.1f}",
                f"{other.prefill_ms:.1f} / {other.first_token_ms:.1f} / {other.total_ms:.1f}",
            )
        )
    one, other = compressed.turns[-1], full.turns[-1]
    lines.append(("KV bytes of the conversation at the end", f"{one.kv_bytes:,}", f"{other.kv_bytes:,}"))
    head = ("what it cost", _name(first), "all tokens")
    rows: list[Row] = [dict(zip(head, line, strict=True)) for line in lines]
    print(f"\n{render(rows)}")


def _name(receipt: vflow_client.ImageReceipt) -> str:
    return receipt.strategy.removeprefix("strategies/")


def _summary(receipt: vflow_client.ImageReceipt) -> str:
    share = receipt.kv_bytes / receipt.kv_bytes_full
    return f"{receipt.visual_tokens:,} visual tokens, {share:.0%} of their KV cache kept ({_name(receipt)})"


def _stage_names(response: vflow_client.CompressImageResponse) -> list[str]:
    """The names of the stages in the figure: the decoder layers that they span, counted from 1."""
    starts = [stage.first_layer + 1 for stage in response.stages]
    names = [
        f"layer {start}" if end == start + 1 else f"layers {start} to {end - 1}"
        for start, end in zip(starts, starts[1:], strict=False)
    ]
    return [*names, f"from layer {starts[-1]}" if names else "all layers"]


def _stages(kept: Sequence[int]) -> str:
    return " / ".join(f"{count:,}" for count in kept)


def _token_maps(response: vflow_client.CompressImageResponse) -> list[TokenMap]:
    """The figure's data, one map per grid, from the service's answer."""
    tokens = response.tokens
    last = [0] * len(tokens.grid)
    for stage in response.stages:
        for index in stage.kept:
            last[index] += 1
    recycled = set(response.recycled)
    maps = []
    for grid, shape in enumerate(response.grids):
        inside = [
            index
            for index, (of_grid, structural) in enumerate(zip(tokens.grid, tokens.structural, strict=True))
            if of_grid == grid and not structural
        ]
        maps.append(
            TokenMap(
                name=f"{'overview' if grid == 0 else 'mosaic'} {shape.rows} x {shape.columns}",
                boxes=[
                    (tokens.box[4 * i], tokens.box[4 * i + 1], tokens.box[4 * i + 2], tokens.box[4 * i + 3])
                    for i in inside
                ],
                importance=[tokens.importance[index] for index in inside],
                last_stage=[last[index] for index in inside],
                recycled=[index in recycled for index in inside],
            )
        )
    return maps


if __name__ == "__main__":
    sys.exit(main())
