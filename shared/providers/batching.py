"""Embeddings in batches: texts asked one by one, at about the same moment, go to the provider in one call.

Only requests whose `input` is a single text, and which are otherwise alike, are put together; each gets its own vector
(float32, little-endian) and its share of the tokens. A list goes out, and its answer comes back, as it is.

Rate limits count calls of the provider: texts that are admitted together count as one request. Tokens are counted text
by text, and those for which there are tokens go out without waiting for the others. A batch that is refused for one of
its texts is the exception: what is then sent text by text was counted once.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from shared.errors import ProviderError
from shared.providers.base import Call, Completion, Provider
from shared.providers.limits import Place

#: Seconds for which a first text waits for others; the most texts of a call.
WINDOW = 0.003
MOST = 256


@dataclass(slots=True)
class _Waiting:
    call: Call
    future: asyncio.Future[Completion]


class EmbeddingBatches:
    """A provider, with its embeddings of single texts put together; everything else passes through."""

    def __init__(self, provider: Provider, *, most: int = MOST) -> None:
        self.name = provider.name
        self._provider = provider
        self._most = most
        self._open: dict[bytes, list[_Waiting]] = {}
        self._admitting: dict[bytes, list[Place]] = {}
        self._sending: set[asyncio.Task[None]] = set()

    async def complete(self, call: Call) -> Completion:
        """Answer one call; cancelling it leaves the others of its batch alone.

        Raises:
            ProviderError: the batch's own error, the same object for all of it.
        """
        if (alike := _alike(call)) is None:
            return await self._provider.complete(call)
        waiting = self._open.get(alike)
        if waiting is None:
            waiting = self._open[alike] = []
            task = asyncio.create_task(self._gather(alike, waiting))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        mine = _Waiting(call, asyncio.get_running_loop().create_future())
        waiting.append(mine)
        if len(waiting) >= self._most:
            del self._open[alike]
        return await mine.future

    async def admit(self, call: Call, tokens: int, acquire: Callable[[Sequence[Place]], Awaitable[None]]) -> None:
        """Return once `call`, of about `tokens` tokens, may be made; cancelling it leaves the others alone.

        `acquire` is awaited once for the texts of one moment, which may go out together (at most `most`). It admits
        each of their places, not necessarily all at once, and has nothing left to do when all are given up.

        Raises:
            Exception: what `acquire` raised, to all that it had not admitted.
        """
        if (alike := _alike(call)) is None:
            return await acquire([Place(tokens)])
        places = self._admitting.get(alike)
        if places is None:
            places = self._admitting[alike] = []
            task = asyncio.create_task(self._acquire(alike, places, acquire))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        mine = Place(tokens)
        places.append(mine)
        if len(places) >= self._most:
            del self._admitting[alike]
        await mine.admitted

    async def _acquire(
        self, alike: bytes, places: list[Place], acquire: Callable[[Sequence[Place]], Awaitable[None]]
    ) -> None:
        try:
            await asyncio.sleep(WINDOW)
            self._close(alike, places)
            await acquire(places)
        except Exception as error:
            for place in places:
                if not place.admitted.done():
                    place.admitted.set_exception(error)
        finally:
            self._close(alike, places)
            for place in places:
                place.admitted.cancel()

    def _close(self, alike: bytes, places: list[Place]) -> None:
        if self._admitting.get(alike) is places:
            del self._admitting[alike]

    async def close(self) -> None:
        """Give up what is under way, and the provider."""
        while sending := [task for task in self._sending if not task.done()]:
            for task in sending:
                task.cancel()
            await asyncio.wait(sending, timeout=1.0)  # again: Python 3.11's wait_for may lose a cancellation
        await self._provider.close()

    async def _gather(self, alike: bytes, waiting: list[_Waiting]) -> None:
        tasks: list[asyncio.Task[None]] = []
        try:
            await asyncio.sleep(WINDOW)
            if self._open.get(alike) is waiting:
                del self._open[alike]
            batch = [one for one in waiting if not one.future.done()]
            if batch:
                # Once nobody waits any more (time-outs, lost leases) the call ends too.
                everyone = _all_done([one.future for one in batch])
                tasks = [asyncio.create_task(work) for work in (self._send(batch), everyone)]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in waiting:
                one.future.cancel()

    async def _send(self, batch: list[_Waiting]) -> None:
        if len(batch) == 1:
            await self._singly(batch[0])
            return
        body = batch[0].call.body | {"input": [one.call.body["input"] for one in batch]}
        try:
            completion = await self._provider.complete(Call("embeddings", body, max(one.call.timeout for one in batch)))
            settled: list[Completion] | ProviderError = self._split(batch, completion)
        except ProviderError as error:
            if error.status is not None and 400 <= error.status < 500 and not error.retryable:
                # One text may be what was refused: the others must not fail for it.
                await asyncio.gather(*map(self._singly, batch))
                return
            settled = error
        except Exception as error:
            settled = ProviderError(f"unexpected {type(error).__name__}: {error}", provider=self.name)
        for at, one in enumerate(batch):
            if one.future.done():
                continue
            if isinstance(settled, ProviderError):
                one.future.set_exception(settled)
            else:
                one.future.set_result(settled[at])

    async def _singly(self, one: _Waiting) -> None:
        try:
            (completion,) = self._split([one], await self._provider.complete(one.call))
        except Exception as error:
            if not one.future.done():
                one.future.set_exception(error)
            return
        if not one.future.done():
            one.future.set_result(completion)

    def _split(self, batch: list[_Waiting], completion: Completion) -> list[Completion]:
        vectors = self._vectors(completion.body, len(batch))
        tokens = shares(completion.prompt_tokens, [len(one.call.body["input"]) for one in batch])
        return [
            Completion(vector, count, 0, {"kind": "array", "dtype": "<f4", "shape": [len(vector) // 4]}, judged=True)
            for vector, count in zip(vectors, tokens, strict=True)
        ]

    def _vectors(self, body: bytes, expected: int) -> list[bytes]:
        try:
            found = sorted(orjson.loads(body)["data"], key=lambda item: int(item.get("index", 0)))
            vectors = [_float32(item["embedding"]) for item in found]
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ProviderError(f"{self.name} gave no embeddings ({error!r})", provider=self.name) from error
        if len(vectors) != expected or not all(vectors):
            raise ProviderError(
                f"{self.name} gave {len(vectors)} embeddings for {expected} texts, or empty ones", provider=self.name
            )
        return vectors


def _alike(call: Call) -> bytes | None:
    """Return what texts that go out together have in common; None for a call that goes out as it is."""
    if call.endpoint != "embeddings" or not isinstance(call.body.get("input"), str):
        return None
    return orjson.dumps({k: v for k, v in call.body.items() if k != "input"}, option=orjson.OPT_SORT_KEYS)


async def _all_done(futures: list[asyncio.Future[Completion]]) -> None:
    await asyncio.wait(futures)


def _float32(embedding: Any) -> bytes:
    if isinstance(embedding, str):  # base64, when the request asked for it
        return base64.b64decode(embedding, validate=True)
    return struct.pack(f"<{len(embedding)}f", *embedding)


def shares(total: int, weights: list[int]) -> list[int]:
    """Split `total` in proportion to `weights`; the parts add up to it."""
    whole, given, out = sum(weights) or 1, 0, []
    reached = 0
    for weight in weights:
        reached += weight
        out.append(total * reached // whole - given)
        given += out[-1]
    return out
