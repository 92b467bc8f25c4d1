"""What a call costs: list prices in dollars, from the price table that `genai-prices` carries (no network)."""

from __future__ import annotations

from functools import lru_cache

from genai_prices import Usage, calc_price


@lru_cache(maxsize=65_536)
def cost(model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
    """Return the list price in dollars of one call, or None for a model without a known price."""
    try:
        price = calc_price(Usage(input_tokens=prompt_tokens, output_tokens=completion_tokens), model_ref=model)
    except (LookupError, ValueError):
        return None
    return float(price.total_price)
