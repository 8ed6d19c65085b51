"""Receipts: the tokens, bytes and milliseconds of a picture or a video, and what compression saved."""

from __future__ import annotations

from vflow_client.v1 import images_pb2
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.video import Visual
from vflowopt.runtime.model_runner import Runtime


def image_receipt(
    visual: Visual,
    image: CompressedImage,
    runtime: Runtime,
    strategy: Strategy,
    strategy_name: str,
    *,
    cache_hit: bool,
    name: str = "",
    prefill_ms: float = 0.0,
) -> images_pb2.ImageReceipt:
    """The receipt of one picture or video.

    Args:
        visual: the picture or video that was sent.
        image: the compressed form that the decoder reads.
        runtime: the model.
        strategy: the strategy that compressed it.
        strategy_name: resource name of the strategy.
        cache_hit: whether the compressed form was cached.
        name: resource name of the picture, if it belongs to a session.
        prefill_ms: milliseconds of its prefill, if it was prefilled by itself.
    """
    kept = [len(indices) for indices in image.kept]
    token_layers = sum(count * span for count, span in zip(kept, strategy.spans(runtime.layers), strict=True))
    receipt = images_pb2.ImageReceipt(
        image=name,
        digest=image.digest,
        width=visual.width,
        height=visual.height,
        strategy=strategy_name,
        visual_tokens=image.tokens,
        kept_tokens=kept,
        recycled_tokens=len(image.recycled),
        kv_bytes=token_layers * runtime.bytes_per_token(),
        kv_bytes_full=image.tokens * runtime.layers * runtime.bytes_per_token(),
        cache_hit=cache_hit,
        prefill_ms=prefill_ms,
        detail=images_pb2.Image.LOW if image.detail == "low" else images_pb2.Image.HIGH,
        frames=image.frames,
        kept_by_frame=_kept_by_frame(image) if image.frames else (),
    )
    if not cache_hit:
        receipt.encode_ms = image.timings.encode_ms
        receipt.score_ms = image.timings.score_ms
        receipt.prune_ms = image.timings.prune_ms
    return receipt


def _kept_by_frame(image: CompressedImage) -> list[int]:
    """Tokens kept in the first stage, by token grid: one grid for each frame, or for frames that the model merges."""
    grid = image.layout.grid
    kept: list[int] = grid[image.kept[0]].bincount(minlength=int(grid.max()) + 1).tolist()
    return kept
