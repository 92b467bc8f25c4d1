"""Embeddings: float32 in NumPy's form, each text cached by itself, only what was never seen computed."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
import pytest

from millpond import InvalidRequest, NotCached, ProviderError
from producers.embeddings import matrix, vector
from producers.reply import Reply
from shared.providers.simulated import calls
from tests import faults_support
from tests.faults_support import Pond

pond = faults_support.pond

FAST: dict[str, Any] = {"simulated_first_token": 0.0}
MODEL = "text-embedding-3-small"


async def test_texts_become_rows_and_one_text_a_row(pond: Pond, partitions: int) -> None:
    texts = ["mill pond", "head race", "tail race", "mill pond"]
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        vectors = await client.embed(texts, model=MODEL)
        assert vectors.dtype == np.float32
        assert (vectors.ndim, len(vectors)) == (2, 4)
        assert np.array_equal(vectors[0], vectors[3])
        assert not np.array_equal(vectors[0], vectors[1])
        one = await client.embed("head race", model=MODEL)
        assert one.shape == vectors.shape[1:]
        assert np.array_equal(one, vectors[1])
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
        assert (await client.embed([], model=MODEL)).shape == (0, 0)


async def test_only_what_was_never_seen_is_computed(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        first = await client.embed(["mill pond", "head race"], model=MODEL)
        before = len(calls(pond.journal))
        again = await client.embed(["Mill  POND.", "tail race", "head race"], model=MODEL)
        (made,) = calls(pond.journal)[before:]
        assert made["prompt"] == "tail race", "normalised, two of the three are known"
        assert np.array_equal(again[0], first[0])
        assert np.array_equal(again[2], first[1])
        await client.embed(["mill pond"], model="text-embedding-3-large")
        assert len(calls(pond.journal)) == before + 2, "another model's vector is another vector"
        with pytest.raises(NotCached):
            await client.embed("a text never seen", model=MODEL, mode="only-if-cached")


async def test_hundreds_of_texts_go_out_together(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        texts = [f"text {n}" for n in range(300)]
        vectors = await client.embed(texts, model=MODEL)
        assert len({row.tobytes() for row in vectors}) == 300
        assert np.array_equal(await client.embed(texts[::-1], model=MODEL), vectors[::-1])


@pytest.mark.parametrize("texts", ["", " ", ["a", ""], ["a", 7]], ids=repr)
async def test_what_is_no_text_is_refused_by_its_place(pond: Pond, texts: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await pond.client().embed(texts)
    assert str(refused.value.field).startswith("texts[")


async def test_a_provider_that_fails_is_an_error_and_not_a_hole(pond: Pond) -> None:
    pond.options |= {"attempts": 1}
    async with pond.working("lookup", "llm", simulated_failure_rate=1.0, **FAST), pond.client() as client:
        with pytest.raises(ProviderError):
            await client.embed(["mill pond", "head race"], model=MODEL)


# whatever form it comes in

NUMBERS = np.array([0.25, -1.5, 3.0], np.float32)


@pytest.mark.parametrize(
    "value",
    [
        NUMBERS,
        NUMBERS.astype(">f8"),
        NUMBERS.reshape(1, 3),
        {"data": [{"embedding": NUMBERS.tolist()}]},
        {"data": [{"embedding": base64.b64encode(NUMBERS.tobytes()).decode()}]},
    ],
    ids=["float32", "float64", "one row", "numbers", "base64"],
)
def test_a_vector_is_float32_whatever_it_was(value: Any) -> None:
    found = vector(value, "openai")
    assert found.dtype == np.float32
    assert np.array_equal(found, NUMBERS)


@pytest.mark.parametrize(
    "value", [{}, {"data": []}, {"data": [{"embedding": "?"}]}, {"data": [{"embedding": ["x"]}]}, None, 3]
)
def test_what_holds_no_vector_is_a_providers_error(value: Any) -> None:
    with pytest.raises(ProviderError):
        vector(value, "openai")


def test_vectors_of_different_length_are_no_matrix() -> None:
    def reply(row: list[float]) -> Reply:
        return Reply(orjson.dumps({"provider": "x", "body": {"data": [{"embedding": row}]}}), "1")

    with pytest.raises(ProviderError, match="length"):
        matrix([reply([1, 2]), reply([1])])
