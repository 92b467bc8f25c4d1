"""LLM providers, and what stands between them and the pool: chains, circuits, retries, rate limits, the quality gate.

To add a provider: a module here with a class that satisfies `base.Provider`, its name in `Settings.provider` and
`Endpoint.kind`, and a line in `make_provider`. Nothing here imports a provider's library before it is chosen.
"""

from __future__ import annotations

from shared.errors import ConfigError
from shared.providers.base import Call, Completion, Endpoint, Provider
from shared.settings import DEFAULT_PROVIDERS, Settings

__all__ = ["Call", "Completion", "Endpoint", "Provider", "make_provider"]


def make_provider(settings: Settings, name: str | None = None) -> Provider:
    """Return a provider by its name (default: `settings.provider_name`); it connects at its first call.

    A name is one of `settings.providers`, else one of `DEFAULT_PROVIDERS`.

    Raises:
        ConfigError: there is none of that name, or the provider's library or its key is missing.
    """
    name = name or settings.provider_name
    kind = settings.kind_of(name)
    if kind is None:
        raise ConfigError(
            f"no provider {name!r}; known: {', '.join(sorted({*settings.providers, *DEFAULT_PROVIDERS}))}",
            field=f"providers.{name}",
        )
    if kind == "openai":
        from shared.providers.openai import OpenAIProvider

        return OpenAIProvider(settings, name, settings.providers.get(name))
    from shared.providers.simulated import SimulatedProvider

    return SimulatedProvider(settings, name)
