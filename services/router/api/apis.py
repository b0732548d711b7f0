"""The APIs beside chat and completions, put together: what they share, their routes, their start and end."""

from __future__ import annotations

import random
from collections.abc import Mapping

from common.config.schema import RouterConfig
from common.rpc.objects import ObjectClient
from common.types import Clock
from services.router.api.batch_runner import BatchRunner, Handle
from services.router.api.batches import Batches
from services.router.api.embeddings import Embeddings
from services.router.api.files import Files
from services.router.api.messages import Messages, speak
from services.router.api.responses import Responses
from services.router.api.schemas import BatchBody, CountBody, EmbeddingsBody, MessagesBody, ResponsesBody
from services.router.endpoint import Api
from services.router.gateway import Gateway


class Apis:
    """start(handles) -> ... -> close. Owns the connections to the controllers' objects."""

    def __init__(self, config: RouterConfig, gateway: Gateway, *, clock: Clock, rng: random.Random) -> None:
        self.objects = ObjectClient(config.controllers, config.admin_token)
        self._gateway = gateway
        self._rng = rng
        self._concurrency = config.batch_concurrency
        self._runner: BatchRunner | None = None
        self.responses = Responses(gateway, self.objects, ttl_s=config.response_ttl_s, clock=clock)
        self.messages = Messages(gateway, clock)
        self.embeddings = Embeddings(gateway, clock, config.max_prompts)
        self.files = Files(self.objects, ttl_s=config.file_ttl_s, max_bytes=config.max_file_bytes)
        self.batches = Batches(gateway, self.files, self.objects, self._wake)

    def routes(self) -> list[Api]:
        responses, messages, files, batches = self.responses, self.messages, self.files, self.batches
        one = "/v1/responses/{response_id}"
        file, batch = "/v1/files/{file_id}", "/v1/batches/{batch_id}"
        return [
            Api("POST", "/v1/responses", "Answer items", responses.create, ResponsesBody),
            Api("GET", one, "A stored response", responses.get),
            Api("DELETE", one, "Delete a stored response", responses.delete),
            Api("POST", f"{one}/cancel", "Cancel a response in the background", responses.cancel),
            Api("GET", f"{one}/input_items", "What a stored response answered", responses.input_items),
            Api("POST", "/v1/messages", "Answer a conversation (Anthropic)", messages.create, MessagesBody, speak),
            Api("POST", "/v1/messages/count_tokens", "Tokens of a prompt", messages.count_tokens, CountBody, speak),
            Api("POST", "/v1/embeddings", "Embeddings, where a model has them", self.embeddings.create, EmbeddingsBody),
            Api("POST", "/v1/files", "Upload a file", files.create),
            Api("GET", "/v1/files", "Files", files.page),
            Api("GET", file, "One file", files.get),
            Api("DELETE", file, "Delete a file", files.delete),
            Api("GET", f"{file}/content", "A file's content", files.content),
            Api("POST", "/v1/batches", "Run the lines of a file", batches.create, BatchBody),
            Api("GET", "/v1/batches", "Batches", batches.page),
            Api("GET", batch, "One batch", batches.get),
            Api("POST", f"{batch}/cancel", "Cancel a batch", batches.cancel),
        ]

    def start(self, handles: Mapping[str, Handle]) -> None:
        """Run batches; `handles` answer the requests in them."""
        self._runner = BatchRunner(
            self.objects, self.files, handles, self._gateway.callers, concurrency=self._concurrency, rng=self._rng
        )
        self._runner.start()

    def _wake(self) -> None:
        if self._runner is not None:
            self._runner.wake()

    async def drain(self) -> None:
        """Batches stop where they are, for other routers to go on."""
        if self._runner is not None:
            await self._runner.close()

    async def close(self) -> None:
        """Background responses that have not ended are cancelled."""
        await self.responses.close()
        await self.objects.close()
