"""LLM providers, and what stands between them and the pool: retries, rate limits, the quality gate.

To add a provider: a module here with a class that satisfies `base.Provider`, its name in `Settings.provider`, and a
line in `make_provider`. Nothing here imports a provider's library before that provider is chosen.
"""

from __future__ import annotations

from shared.providers.base import Call, Completion, Endpoint, Provider
from shared.settings import Settings

__all__ = ["Call", "Completion", "Endpoint", "Provider", "make_provider"]


def make_provider(settings: Settings) -> Provider:
    """Return the provider in force (`settings.provider_name`); it connects at its first call.

    Raises:
        ConfigError: the provider's library or its key is missing.
    """
    if settings.provider_name == "openai":
        from shared.providers.openai import OpenAIProvider

        return OpenAIProvider(settings)
    from shared.providers.simulated import SimulatedProvider

    return SimulatedProvider(settings)
