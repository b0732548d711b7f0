"""`POST /v1/embeddings`: checked like any request, and refused by models that generate text.

No model family here has an embedding head, and the engine's contract brings tokens and not hidden states: an average
of some hidden row would be numbers without a meaning.
"""

from __future__ import annotations

from common.errors import UnsupportedError
from services.router.api.schemas import EmbeddingsBody
from services.router.exchange import Exchange
from services.router.gateway import Gateway


class Embeddings:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def create(self, exchange: Exchange) -> None:
        with self._gateway.admitted():
            body = await self._gateway.body(exchange, EmbeddingsBody)
            name, _ = self._gateway.resolve(body.model)
            raise UnsupportedError(f"The model `{name}` generates text and has no embeddings.", param="model")
