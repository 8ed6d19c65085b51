"""The demo's figure draws what there is, and nothing else."""

from pathlib import Path

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.figure import KEPT, RECYCLED, TokenMap, draw
from benchmarks.line_chart import save

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8))


def figure(recycled: list[bool]) -> Figure:
    boxes = [(20.0 * place, 0.0, 20.0 * (place + 1), 40.0) for place in range(4)]
    tokens = TokenMap("overview", boxes, [0.1, 0.4, 0.2, 0.3], [2, 1, 0, 2], recycled)
    answers = [("What colour is it?", "red", "blue")]
    return draw(PICTURE, [tokens], ["layers 1 to 2", "from layer 3"], title="a title", answers=answers)


def edges(drawn: Figure, panel: int) -> list[str]:
    (boxes,) = drawn.subfigs[0].axes[panel].collections
    return [to_hex(colour) for colour in boxes.get_edgecolor()]  # type: ignore[union-attr]


def test_each_stage_shows_what_it_keeps(tmp_path: Path) -> None:
    drawn = figure([False] * 4)
    panels, chat = drawn.subfigs
    assert [axes.get_title() for axes in panels.axes] == [
        "the picture",
        "importance (yellow: high)",
        "layers 1 to 2: 3 of 4 tokens",
        "from layer 3: 2 of 4 tokens",
    ]
    assert edges(drawn, 2) == [KEPT] * 3 and edges(drawn, 3) == [KEPT] * 2
    opacity = panels.axes[3].images[0].get_alpha()
    assert isinstance(opacity, np.ndarray)
    assert (opacity[:, :20] == 1.0).all() and (opacity[:, 20:60] < 0.5).all() and (opacity[:, 60:] == 1.0).all()
    assert {text.get_text() for text in chat.axes[0].texts} >= {"What colour is it?", "red", "blue"}
    save(drawn, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as written:
        assert written.width > 1000


def test_recycled_tokens_have_a_colour_where_there_are_any() -> None:
    (legend,) = figure([False, True, False, False]).subfigs[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["kept as it is", "average of dropped tokens"]
    assert edges(figure([False, True, False, False]), 2) == [KEPT, RECYCLED, KEPT]
    assert not figure([False] * 4).subfigs[0].legends
