"""The contract's ``Compression`` service: compressed pictures for backends that feed another engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from safetensors.torch import save

from vflow_client.v1 import compression_pb2, compression_pb2_grpc
from vflow_server.access.caller import current_caller
from vflow_server.engine.engine import Engine, Steps
from vflow_server.engine.ops import Encode
from vflow_server.images.store import PictureStore
from vflow_server.rpc.errors import CapacityExhausted
from vflow_server.rpc.intake import let_go_of_request
from vflow_server.rpc.names import check_name
from vflow_server.sessions.receipts import image_receipt
from vflow_server.strategies.strategies import StrategyRevision, StrategyStore
from vflow_server.telemetry.receipt_log import ReceiptLog
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime

Context = grpc.aio.ServicerContext[Any, Any]
Response = compression_pb2.CompressImageResponse


class Compression(compression_pb2_grpc.CompressionServicer):
    """Compresses pictures without a session.

    Args:
        engine: runs the work.
        runtime: the model.
        strategies: the strategies that a request may name.
        pictures: decodes the pictures of requests.
        receipt_log: logs the receipts.
        most_bytes: bytes of a response at most.
    """

    def __init__(
        self,
        engine: Engine,
        runtime: Runtime,
        strategies: StrategyStore,
        pictures: PictureStore,
        receipt_log: ReceiptLog,
        *,
        most_bytes: int,
    ) -> None:
        self._engine = engine
        self._runtime = runtime
        self._strategies = strategies
        self._pictures = pictures
        self._receipt_log = receipt_log
        self._most_bytes = most_bytes

    async def CompressImage(self, request: compression_pb2.CompressImageRequest, context: Context) -> Response:
        """Compress one picture."""
        if request.strategy:
            check_name(request.strategy, "strategies", "strategy")
        revision = self._strategies.get(request.strategy)
        tenant = current_caller().tenant
        picture = await self._pictures.acquire(request.image, "image", tenant)
        embeddings = request.include_embeddings
        del request
        let_go_of_request()
        return await self._compress(picture, revision, tenant, embeddings=embeddings)

    async def _compress(
        self, picture: Picture, revision: StrategyRevision, tenant: str, *, embeddings: bool
    ) -> Response:
        def work(emit: Callable[[None], None]) -> Steps[Response]:
            op = Encode(picture, revision.strategy, tenant)
            yield op
            return self._response(picture, op.image, revision, cache_hit=op.cache_hit, embeddings=embeddings)

        ticket = self._engine.submit(work, tenant)
        try:
            response = await ticket.result()
        finally:
            ticket.cancel()
        self._receipt_log.picture(tenant, response.receipt)
        return response

    def _response(
        self,
        picture: Picture,
        image: CompressedImage,
        revision: StrategyRevision,
        *,
        cache_hit: bool,
        embeddings: bool,
    ) -> Response:
        layout = image.layout
        runtime = self._runtime
        response = Response(
            grids=[compression_pb2.TokenGrid(rows=rows, columns=columns) for rows, columns in layout.shapes()],
            tokens=compression_pb2.VisualTokens(
                importance=image.importance.tolist(),
                grid=layout.grid.tolist(),
                row=layout.row.tolist(),
                column=layout.column.tolist(),
                structural=layout.structural.tolist(),
                box=layout.boxes.flatten().tolist(),
            ),
            stages=[
                compression_pb2.Stage(first_layer=start, kept=kept.tolist())
                for start, kept in zip(revision.strategy.starts, image.kept, strict=True)
            ],
            recycled=image.recycled.tolist(),
            positions=image.positions.flatten().tolist(),
            position_span=image.span,
            receipt=image_receipt(picture, image, runtime, revision.strategy, revision.name, cache_hit=cache_hit),
        )
        if embeddings:
            response.embeddings = save(
                {
                    "embeddings": image.embeddings.cpu().contiguous(),
                    "positions": image.positions.clone(),  # safetensors refuses tensors that share memory
                    "kept": image.kept[0].contiguous(),
                }
            )
        if (size := response.ByteSize()) > self._most_bytes:
            raise CapacityExhausted(
                "message",
                f"the response would take {size} bytes and the server sends at most {self._most_bytes}; leave out the "
                "embeddings, choose a strategy that keeps less, or start the server with a larger --max-message-bytes",
                metadata={"bytes": size, "max_bytes": self._most_bytes},
                retry_after=None,
            )
        return response
