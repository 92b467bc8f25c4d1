"""The simulated provider: its answers, its failures, and the journal of its calls."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from shared.answers import text_of
from shared.errors import ProviderError
from shared.providers import Call, Provider, make_provider
from shared.providers.prose import tokens
from shared.providers.simulated import calls, embed
from shared.settings import Settings
from tests.openai_server import CHAT
from tests.processes import our_code_environment


def simulated(**fields: Any) -> Provider:
    quick = {"simulated_first_token": 0.0, "simulated_tokens_per_second": 1e9, "provider": "simulated"}
    return make_provider(Settings(**{**quick, **fields}))


async def ask(provider: Provider, endpoint: str = "chat/completions", **fields: Any) -> dict[str, Any]:
    body = fields or {"messages": CHAT["messages"], "model": "m"}
    answer: dict[str, Any] = json.loads((await provider.complete(Call(endpoint, body))).body)
    return answer


async def test_without_a_key_the_provider_is_simulated_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    provider = simulated(provider="auto")
    answer = await ask(provider)
    assert provider.name == "simulated"
    assert all("simulated" in answer[name] for name in ("id", "model", "system_fingerprint"))


async def test_the_same_request_has_the_same_text_and_another_one_another() -> None:
    one, other = simulated(), simulated()
    body: dict[str, Any] = {"model": "m", "messages": CHAT["messages"], "temperature": 0.5}
    texts = [text_of(await ask(one, **body)), text_of(await ask(other, **dict(reversed(body.items()))))]
    assert texts[0] == texts[1]
    assert "parcel" in texts[0]
    assert text_of(await ask(one, **body | {"temperature": 0.6})) != texts[0]


async def test_max_tokens_cuts_the_answer_and_usage_counts_it() -> None:
    whole = await ask(simulated())
    cut = await ask(simulated(), model="m", messages=CHAT["messages"], max_tokens=9)
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == len(tokens(text_of(whole)))
    assert abs(whole["usage"]["completion_tokens"] - 120) < 40
    assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 9)
    assert cut["usage"]["total_tokens"] == cut["usage"]["prompt_tokens"] + 9


async def test_the_official_sdk_s_types_accept_all_three_shapes() -> None:
    provider = simulated()
    chat = ChatCompletion.model_validate(await ask(provider, model="m", messages=CHAT["messages"], n=2))
    response = Response.model_validate(
        await ask(provider, "responses", model="m", input="Where is it?", max_output_tokens=5)
        | {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}
    )
    vectors = CreateEmbeddingResponse.model_validate(
        await ask(provider, "embeddings", model="m", input=["a b", "c"], dimensions=16)
    )
    assert chat.choices[0].message.content != chat.choices[1].message.content
    assert (response.status, len(tokens(response.output_text))) == ("incomplete", 5)
    assert [len(item.embedding) for item in vectors.data] == [16, 16]


def test_texts_that_share_words_lie_close_together() -> None:
    def close(one: str, other: str) -> float:
        return sum(x * y for x, y in zip(embed(one, 1536), embed(other, 1536), strict=True))

    assert close("how do I reset my password", "How can I reset my password?") > 0.6
    assert close("how do I reset my password", "notary fees in Hamburg") < 0.2
    assert abs(close("", "") - 1) < 1e-6


async def test_a_call_is_in_the_journal_before_it_is_answered(tmp_path: Path) -> None:
    journal = tmp_path / "new" / "calls.jsonl"
    provider = simulated(simulated_first_token=60.0, simulated_journal=journal)
    assert calls(journal) == []
    task = asyncio.create_task(ask(provider))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    (call,) = calls(journal)
    assert (call["prompt"], call["endpoint"]) == ("Where is my parcel?", "chat/completions")


def test_journal_lines_of_several_processes_never_mix(tmp_path: Path) -> None:
    journal = tmp_path / "calls.jsonl"
    program = f"""
import asyncio
from shared.providers import Call, make_provider
from shared.settings import Settings
provider = make_provider(Settings(provider="simulated", simulated_first_token=0, simulated_journal={str(journal)!r},
                                  simulated_tokens_per_second=1e9, simulated_tokens=1))
async def main():
    for n in range(200):
        await provider.complete(Call("responses", {{"input": f"question {{n}} " + "x" * 200}}))
asyncio.run(main())
"""
    workers = [subprocess.Popen([sys.executable, "-c", program], env=our_code_environment()) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    seen = calls(journal)
    assert len(seen) == 600
    assert len({call["pid"] for call in seen}) == 3
    assert len({call["sha"] for call in seen}) == 200


async def test_failures_are_the_same_ones_for_the_same_seed() -> None:
    async def failures(seed: int) -> list[int]:
        provider, failed = simulated(simulated_failure_rate=0.3, simulated_seed=seed), []
        for at in range(40):
            try:
                await ask(provider)
            except ProviderError as error:
                assert (error.status, error.retryable) == (503, True)
                failed.append(at)
        return failed

    assert await failures(1) == await failures(1) != await failures(2)
    assert 4 <= len(await failures(1)) <= 20


async def test_an_answer_takes_the_time_its_tokens_take() -> None:
    provider = simulated(simulated_first_token=0.1, simulated_tokens_per_second=100.0, simulated_tokens=10)
    began = time.monotonic()
    answer = await ask(provider, model="m", messages=CHAT["messages"], max_tokens=10)
    assert answer["usage"]["completion_tokens"] == 10
    assert 0.2 <= time.monotonic() - began < 2
