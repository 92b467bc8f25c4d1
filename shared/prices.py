"""What a call costs, in dollars: a deployment's own prices, else list prices.

List prices come from the table that `genai-prices` carries (no network). A deployment's own (`prices` in its settings)
are by the exact name of a model and come first. Only a call costs: a hit repeats the tokens of the call that made it
and spends none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from genai_prices import Usage, calc_price

from shared.settings import Price

#: Whose model a name is: found by the name alone, else one of OpenAI's, as embedding models are.
_PROVIDERS = (None, "openai")
_NONE: Mapping[str, Price] = MappingProxyType({})


def cost(
    model: str, prompt_tokens: int, completion_tokens: int, overrides: Mapping[str, Price] = _NONE
) -> float | None:
    """Return the price in dollars of one call, or None for a model without a known price.

    `overrides` are prices per million tokens by model name, as `Settings.prices` has them.
    """
    own = overrides.get(model)
    if own is not None:
        return (prompt_tokens * own.input + completion_tokens * own.output) / 1e6
    return _list_price(model, prompt_tokens, completion_tokens)


@lru_cache(maxsize=65_536)
def _list_price(model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
    usage = Usage(input_tokens=prompt_tokens, output_tokens=completion_tokens)
    for provider in _PROVIDERS:
        with contextlib.suppress(LookupError, ValueError):
            return float(calc_price(usage, model_ref=model, provider_id=provider).total_price)
    return None
