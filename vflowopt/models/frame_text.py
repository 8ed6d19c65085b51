"""Text between the frames of a video, where a family has some there: when a frame was seen, or which one it is.

Its tokens are structural: they stay whatever is pruned around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from vflowopt.compression.layout import TokenLayout
from vflowopt.compression.pipeline import EncodedImage


def with_text(encoded: EncodedImage, texts: Sequence[Sequence[int]], embed: Callable[[Tensor], Tensor]) -> EncodedImage:
    """Put text before each frame of an encoded video, and behind the last one.

    Args:
        encoded: a video of T frames (or steps of several frames) with equally many tokens each, none of them
            structural.
        texts: token ids of T + 1 texts; the last one stands behind the last frame.
        embed: from token ids to what the decoder takes in of them.
    """
    frames = len(texts) - 1
    per_frame = len(encoded.layout) // frames
    # Where each token of the result comes from: a place among the video's tokens, or -1 for text.
    source = torch.cat(
        [
            part
            for frame, text in enumerate(texts)
            for part in (
                torch.full((len(text),), -1),
                torch.arange(per_frame) + frame * per_frame if frame < frames else torch.empty(0, dtype=torch.long),
            )
        ]
    )
    words = embed(torch.tensor([token for text in texts for token in text], device=encoded.embeddings.device))
    embeddings = encoded.embeddings.new_zeros(len(source), encoded.embeddings.shape[1])
    text, rest = (source < 0).to(embeddings.device), (source >= 0).to(embeddings.device)
    embeddings[rest] = encoded.embeddings
    embeddings[text, : words.shape[1]] = words.to(embeddings)  # nothing of text enters behind later layers
    return replace(
        encoded,
        embeddings=embeddings,
        layout=_layout(encoded.layout, source, texts),
        arrange=partial(_arrange, encoded.arrange, source),
        positions=None if encoded.positions is None else _positions(encoded.positions, texts, per_frame),
    )


def _layout(layout: TokenLayout, source: Tensor, texts: Sequence[Sequence[int]]) -> TokenLayout:
    """Text stands past the end of the first row of the frame behind it; the last text, of the last frame's last row."""
    structural = source < 0
    columns, rows = int(layout.column.max()) + 1, int(layout.row.max()) + 1
    last = len(texts) - 2
    owners = torch.tensor([min(frame, last) for frame, text in enumerate(texts) for _ in text])
    grid, row, column = (values[source.clamp_min(0)] for values in (layout.grid, layout.row, layout.column))
    grid[structural], row[structural], column[structural] = owners.to(grid), 0, columns
    if texts[-1]:
        row[-len(texts[-1]) :] = rows - 1
    boxes = layout.boxes[source.clamp_min(0)].masked_fill(structural[:, None], 0.0)
    return TokenLayout(grid=grid, row=row, column=column, structural=structural, boxes=boxes)


def _arrange(arrange: Callable[[Tensor], Tensor], source: Tensor, values: Tensor) -> Tensor:
    """One value per patch through the model's own arranging, and a zero for every token of text."""
    padded: Tensor = nn.functional.pad(arrange(values), (0, 1))
    return padded[source.to(padded.device)]  # -1 is the zero at the end


def _positions(positions: Tensor, texts: Sequence[Sequence[int]], per_frame: int) -> Tensor:
    """[axes, N]: each frame begins behind the text before it, and text behind the farthest token of a frame."""
    parts, at = [], 0
    frames = positions.split(per_frame, dim=-1)
    for frame, text in enumerate(texts):
        parts.append((torch.arange(len(text)) + at).expand(len(positions), -1))
        at += len(text)
        if frame < len(frames):
            own = frames[frame] - frames[frame].amin(-1, keepdim=True)
            parts.append(own + at)
            at += int(own.max()) + 1
    return torch.cat(parts, dim=-1)
