"""The asyncio client: the same names and arguments as the synchronous one, awaited.

    async with vflow_client.aio.connect("localhost:50051") as client, await client.session() as session:
        await session.add_image("picture.png")
        async for piece in await session.ask("What colour is the arrow?"):
            print(piece, end="", flush=True)

Receipts, messages and errors are those of `vflow_client`.
"""

from vflow_client.aio.answer import AsyncAnswer
from vflow_client.aio.client import AsyncClient, connect
from vflow_client.aio.retune import AsyncRetune
from vflow_client.aio.session import AsyncSession
from vflow_client.aio.strategy_admin import AsyncStrategyAdmin

__all__ = ["AsyncAnswer", "AsyncClient", "AsyncRetune", "AsyncSession", "AsyncStrategyAdmin", "connect"]
