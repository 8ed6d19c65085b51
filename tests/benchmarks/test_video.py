"""The comparison on clips at its smallest size, and what pruning each frame by itself means."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import video
from benchmarks.rivals import Sight
from benchmarks.rivals.vflowopt import own
from vflowopt.demo import model_path
from vflowopt.media.video import Video
from vflowopt.runtime.model_runner import Runtime


def test_rows_at_the_smallest_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--clips", "2", "--turns", "1", "--frames", "3", "--retention", "0.1", "--new-tokens", "3"]
    assert video.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    for kind in video.KINDS:
        of_kind = {row["method"]: row for row in rows if row["clips"] == kind and row["turn"] == "all"}
        whole = of_kind.pop("full")
        assert "vflowopt-diverse-frame-by-frame" in of_kind and "random" in of_kind
        assert all(0.08 < row["kv_bytes"] / whole["kv_bytes"] <= 0.1 for row in of_kind.values())
    assert "once: 2 clips of 3 frames" in capsys.readouterr().out


def test_frame_by_frame_every_frame_keeps_as_much() -> None:
    runtime = Runtime.load(model_path(), kv_budget=1 << 20)
    (asked,) = video.clips("once", seed=1, count=1, questions=2, frames=4)
    assert isinstance(asked.picture, Video)
    assert len({frame.digest for frame in asked.picture.frames}) == 2
    encoded = runtime.model.encode_video(asked.picture)
    base = own(runtime.model.strategies, runtime.layers)[0]
    sight = Sight(asked.picture, encoded, "")
    kept = {}
    for method in (base, video.FrameByFrame(base)):
        (compressed,) = method.compress(runtime, sight, [0.1])
        first = compressed.image.kept[0]
        content = first[~encoded.layout.structural[first]]
        kept[method.name] = torch.bincount(encoded.layout.grid[content], minlength=4)
    together, alone = kept.values()
    assert alone.max() - alone.min() <= 1
    assert together.max() - together.min() > 1 and together.sum() == alone.sum()
    (still,) = video.clips("still", seed=1, count=1, questions=2, frames=4)
    assert isinstance(still.picture, Video) and len({frame.digest for frame in still.picture.frames}) == 1
