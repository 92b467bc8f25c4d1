"""What a call costs: list prices in dollars, from the price table that `genai-prices` carries (no network)."""

from __future__ import annotations

import contextlib
from functools import lru_cache

from genai_prices import Usage, calc_price

#: Whose model a name is: found by the name alone, else one of OpenAI's, as embedding models are.
_PROVIDERS = (None, "openai")


@lru_cache(maxsize=65_536)
def cost(model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
    """Return the list price in dollars of one call, or None for a model without a known price."""
    usage = Usage(input_tokens=prompt_tokens, output_tokens=completion_tokens)
    for provider in _PROVIDERS:
        with contextlib.suppress(LookupError, ValueError):
            return float(calc_price(usage, model_ref=model, provider_id=provider).total_price)
    return None
