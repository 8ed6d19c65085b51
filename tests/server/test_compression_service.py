"""CompressImage: its response is consistent, and agrees with what a session caches."""

import numpy as np
import pytest
from safetensors.numpy import load

from vflow_client import Client


@pytest.mark.parametrize("strategy", ["full", "preset-25", None])
def test_what_is_kept(client: Client, picture: bytes, strategy: str | None) -> None:
    response = client.compress(picture, strategy=strategy, embeddings=True)
    count = response.receipt.visual_tokens
    tokens = response.tokens
    assert [len(column) for column in (tokens.importance, tokens.grid, tokens.row, tokens.column)] == [count] * 4
    assert len(tokens.structural) == count and len(tokens.box) == 4 * count
    stages = [list(stage.kept) for stage in response.stages]
    assert [len(kept) for kept in stages] == list(response.receipt.kept_tokens)
    assert all(set(later) <= set(earlier) for earlier, later in zip(stages, stages[1:], strict=False))
    structural = {index for index, is_structural in enumerate(tokens.structural) if is_structural}
    assert structural <= set(stages[-1])
    assert set(response.recycled) <= set(stages[0]) and len(response.recycled) == response.receipt.recycled_tokens

    tensors = load(response.embeddings)
    assert tensors["kept"].tolist() == stages[0]
    assert tensors["positions"].tolist() == list(response.positions) == stages[0]  # as they were before pruning
    assert response.position_span == count
    assert tensors["embeddings"].shape[0] == len(stages[0]) and np.isfinite(tensors["embeddings"]).all()
    cells = sum(grid.rows * grid.columns for grid in response.grids)
    assert cells == count - len(structural)
    if strategy == "full":
        assert stages == [list(range(count))]


def test_it_costs_what_a_session_pays(client: Client, picture: bytes) -> None:
    alone = client.compress(picture, strategy="preset-25").receipt
    with client.session("preset-25") as session:
        added = session.add_image(picture)
    assert alone.image == "" and added.image
    for field in ("digest", "width", "height", "visual_tokens", "kept_tokens", "kv_bytes", "kv_bytes_full"):
        assert getattr(alone, field) == getattr(added, field)


def test_embeddings_only_on_request(client: Client, picture: bytes) -> None:
    assert client.compress(picture).embeddings == b""
