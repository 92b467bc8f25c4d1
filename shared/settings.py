"""Settings: `MILLPOND_*` environment variables, `.env`, then `millpond.toml`; the first that names a value wins.

A wrong value is refused at start with the setting's name. Secrets are never printed. Times are in seconds.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)
from redis.connection import ConnectionPool

from shared.errors import ConfigError
from shared.profiles import BUILT_IN, Profile

#: What calls of simulated providers are recorded under.
SIMULATED = re.compile("simulated(?:[/:]|$)")
#: The names of providers that need no `[providers.NAME]`.
DEFAULT_PROVIDERS = ("openai", "simulated")


def default_data_dir() -> Path:
    """Return where the embedded servers keep their data: `$XDG_DATA_HOME/millpond`."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "millpond"


def check_url(url: str) -> None:
    """Refuse what is no Redis URL, without repeating it: it may hold a password.

    Raises:
        ValueError: it is none, and why.
    """
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must start with redis://, rediss:// or unix://")
    try:
        database = urlsplit(url).path.strip("/") if not url.startswith("unix://") else ""
        ConnectionPool.from_url(url).make_connection()  # connects to nothing yet
    except (ValueError, TypeError):
        raise ValueError(
            "cannot be read: percent-encode special characters of the password (# is %23, / is %2F), "
            "give the port as a number and only options that redis-py knows"
        ) from None
    if database and not database.isdigit():
        raise ValueError("must end in the database's number, as in redis://host:6379/0")


class Endpoint(BaseModel):
    """A named OpenAI-compatible endpoint, for the chains of profiles: `[providers.NAME]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["openai", "simulated"] = "openai"
    base_url: str | None = None
    api_key: SecretStr | None = None


class Price(BaseModel):
    """What a model costs, in dollars per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: float = Field(ge=0)
    output: float = Field(default=0.0, ge=0)


class Experiment(BaseModel):
    """Variants with their weights, and the body field whose value decides who gets which: `[experiments.NAME]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variants: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(min_length=1)
    unit: str = Field(default="user", min_length=1)

    @model_validator(mode="after")
    def _some_weight(self) -> Experiment:
        if not any(self.variants.values()):
            raise ValueError("give at least one variant a weight above 0")
        if any(re.fullmatch(r"\S{1,200}", name) is None for name in self.variants):
            raise ValueError("the names of variants are 1 to 200 characters without white space")
        return self


class _SharedDotEnv(DotEnvSettingsSource):
    """A `.env` that other programs read too: their variables are theirs, a misspelt `MILLPOND_*` is refused."""

    def __call__(self) -> dict[str, Any]:
        prefix = str(self.config.get("env_prefix", "")).lower()
        fields = self.settings_cls.model_fields
        found = super().__call__()
        own = {name: value for name, value in found.items() if name in fields or name.startswith(prefix)}
        sdk_key = self.env_vars.get("openai_api_key")  # the openai SDK's own variable, written here
        if sdk_key and not os.environ.get("OPENAI_API_KEY"):
            own.setdefault("openai_api_key", sdk_key)
        return own


class Settings(BaseSettings):
    """Everything configurable. `Settings()` raises pydantic errors; use `load()` for readable ones."""

    model_config = SettingsConfigDict(
        env_prefix="MILLPOND_",
        env_file=".env",
        env_nested_delimiter="__",
        env_ignore_empty=True,
        toml_file="millpond.toml",
        extra="forbid",
        frozen=True,
    )

    # servers
    redis_url: SecretStr | None = Field(None, description="redis://, rediss:// or unix://; unset: embedded")
    database_url: SecretStr | None = Field(None, description="postgresql://; unset: embedded, where `up` runs one")
    l3: bool = Field(True, description="false: no durable tier, nothing is asked of or written to PostgreSQL")
    data_dir: Path = Field(default_factory=default_data_dir, description="data of the embedded servers")
    partitions: int | None = Field(None, ge=1, le=1024, description="fixed at first start; unset: as recorded, or 1")

    # what is cached
    cache_enabled: bool = Field(True, description="false turns every request into a bypass")
    profiles: dict[str, Profile] = Field(default_factory=dict, description="own profiles, or overrides")
    model: str = Field("gpt-4o-mini", min_length=1, description="for requests that name none")
    model_versions: dict[str, str] = Field(default_factory=dict, description="declared version per model")
    max_input_bytes: int = Field(1 << 20, ge=256, description="longest accepted request body")
    compress_above: int = Field(256, ge=0, description="answers longer than this many bytes are compressed")
    l1_entries: int = Field(1000, ge=0)
    l1_bytes: int = Field(64 << 20, ge=0)

    # the durable tier
    l3_timeout: float = Field(0.25, gt=0, description="longest wait of a lookup for PostgreSQL")
    store_prompts: bool = Field(False, description="keep what was asked beside each answer")
    marker_age: float = Field(3600.0, ge=0.1, description="markers of older invalidations are pruned")
    retention_days: int = Field(30, ge=1, description="history and expired answers are kept for so long")

    experiments: dict[str, Experiment] = Field(default_factory=dict, description="variants to assign, by weight")

    # queues
    request_limit: int = Field(100_000, ge=1, description="requests waiting per partition before Overloaded")
    fill_limit: int = Field(100_000, ge=1, description="fills waiting per partition before Overloaded")
    reply_limit: int = Field(10_000, ge=1, description="unread replies kept per client")
    invalidation_limit: int = Field(10_000, ge=100, description="length of the invalidation log")
    landed_limit: int = Field(100_000, ge=1, description="answers per partition waiting for PostgreSQL")
    touches_limit: int = Field(10_000, ge=1, description="hit reports kept per partition")
    dead_limit: int = Field(10_000, ge=1, description="dead letters kept per partition")

    # leases and deadlines
    timeout: float = Field(60.0, gt=0, le=3600, description="deadline of a request that names none")
    lookup_lease: float = Field(5.0, ge=0.2, description="a lookup worker silent for longer loses its messages")
    llm_lease: float = Field(10.0, ge=0.2, description="an LLM worker silent for longer loses its fills")
    background_lease: float = Field(15.0, ge=0.2, description="as above, for persistence, promotion, invalidation")
    compute_lease: float = Field(10.0, ge=0.2, description="an application silent for longer loses its computation")
    drain_timeout: float = Field(10.0, ge=0, description="a stopped LLM worker finishes calls for this long")
    max_deliveries: int = Field(5, ge=1, description="deliveries of one message before it is dead-lettered")
    channel_ttl: float = Field(60.0, ge=1, description="a reply channel outlives its silent client by this")

    # the LLM pool
    provider: Literal["auto", "openai", "simulated"] = "auto"
    providers: dict[str, Endpoint] = Field(default_factory=dict, description="endpoints that chains name")
    openai_api_key: SecretStr | None = Field(None, description="MILLPOND_OPENAI_API_KEY, else OPENAI_API_KEY")
    openai_base_url: str | None = None
    concurrency: int = Field(64, ge=1, le=4096, description="provider calls at once per LLM worker")
    attempts: int = Field(4, ge=1, le=20, description="provider attempts per flight, retryable errors only")
    attempt_timeout: float = Field(60.0, gt=0)
    total_timeout: float = Field(120.0, gt=0)
    backoff_initial: float = Field(0.25, ge=0)
    backoff_max: float = Field(20.0, gt=0)
    requests_per_minute: int | None = Field(None, ge=1, description="shared by the whole pool")
    tokens_per_minute: int | None = Field(None, ge=1, description="shared by the whole pool")

    breaker_failures: int = Field(5, ge=1, description="failures in a row that open a provider's circuit")
    breaker_reset: float = Field(10.0, gt=0, description="seconds after which an open circuit is probed")
    prices: dict[str, Price] = Field(default_factory=dict, description="dollars per million tokens, by model")
    memory_mark: float = Field(0.8, gt=0, le=1, description="share of maxmemory above which Redis is relieved")
    memory_limit: int | None = Field(
        None, ge=1, description="bytes of Redis that count as full if it sets no maxmemory"
    )
    warm_top: int = Field(0, ge=0, description="so many of the most asked keys are kept warm; 0: none")
    heartbeat_file: Path | None = Field(
        None, description="touched while a worker is alive, for a container's health check"
    )

    # the simulated provider
    simulated_first_token: float = Field(0.6, ge=0, description="seconds before the first token")
    simulated_tokens_per_second: float = Field(80.0, gt=0)
    simulated_failure_rate: float = Field(0.0, ge=0, le=1)
    simulated_seed: int = Field(0, description="which calls fail: the same ones for the same seed, in each process")
    simulated_tokens: int = Field(120, ge=1, description="length of an answer when max_tokens does not cut it")
    simulated_journal: Path | None = Field(None, description="file to which every simulated call appends a line")
    simulated_outage: Path | None = Field(None, description="while this file exists, simulated providers are down")

    @field_validator("redis_url")
    @classmethod
    def _known_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_url(value.get_secret_value())
        return value

    @field_validator("database_url")
    @classmethod
    def _postgresql(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("must start with postgresql://")
        return value

    @field_validator("providers")
    @classmethod
    def _simulated_is(cls, value: dict[str, Endpoint]) -> dict[str, Endpoint]:
        if any(endpoint.kind != "simulated" and SIMULATED.match(name) for name, endpoint in value.items()):
            raise ValueError(
                'a name that says simulated needs kind = "simulated": reports count its answers as made up'
            )
        return value

    @model_validator(mode="after")
    def _timeouts_in_order(self) -> Settings:
        if self.attempt_timeout > self.total_timeout:
            raise ValueError("attempt_timeout must not exceed total_timeout")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Rank the sources: arguments, environment, `.env`, `millpond.toml`."""
        sources = [init_settings, env_settings]
        if isinstance(dotenv_settings, DotEnvSettingsSource) and dotenv_settings.env_file is not None:
            sources.append(_SharedDotEnv(settings_cls, env_file=dotenv_settings.env_file))
        return (*sources, TomlConfigSettingsSource(settings_cls))

    @property
    def all_profiles(self) -> dict[str, Profile]:
        """The built-in profiles, overridden and extended by the deployment's own."""
        return BUILT_IN | self.profiles

    @property
    def api_key(self) -> str | None:
        """The OpenAI key: `MILLPOND_OPENAI_API_KEY`, else the SDK's own `OPENAI_API_KEY`."""
        if self.openai_api_key is not None:
            return self.openai_api_key.get_secret_value()
        return os.environ.get("OPENAI_API_KEY") or None

    @property
    def provider_recorded(self) -> str:
        """What calls of the provider in force are recorded under: its name, which for a simulated one says so."""
        return recorded(self.provider_name, simulated=self.kind_of(self.provider_name) == "simulated")

    @property
    def provider_name(self) -> str:
        """The provider in force: `auto` is `openai` with a key or a base URL, else `simulated`."""
        if self.provider != "auto":
            return self.provider
        return "openai" if self.api_key or self.openai_base_url else "simulated"

    def kind_of(self, provider: str) -> str | None:
        """What the provider of a name is, `openai` or `simulated`; None where there is none of that name."""
        endpoint = self.providers.get(provider)
        return endpoint.kind if endpoint is not None else provider if provider in DEFAULT_PROVIDERS else None


def recorded(provider: str, *, simulated: bool) -> str:
    """Return what calls of a provider are recorded under: `simulated/NAME` where its name does not say it."""
    return f"simulated/{provider}" if simulated and not SIMULATED.match(provider) else provider


def load(**overrides: Any) -> Settings:
    """Return the settings in force.

    Raises:
        ConfigError: a value is wrong; the message names each setting, where to set it and what is wrong.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_input=False, include_url=False):
            name = ".".join(str(part) for part in problem["loc"]).removeprefix("millpond_")
            variable = f"MILLPOND_{name.upper().replace('.', '__')}"
            unknown = problem["type"] == "extra_forbidden"
            what = "no such setting; remove it or correct its name" if unknown else problem["msg"]
            what = what.removeprefix("Value error, ")
            lines.append(f"{name} ({variable}): {what}" if name else what)
        field = ".".join(str(part) for part in error.errors()[0]["loc"]) or None
        raise ConfigError("wrong settings: " + "; ".join(lines), field=field) from None
    except SettingsError as error:  # a list or table that is not JSON; the message names it, never its value
        field = next((name for name in Settings.model_fields if f'"{name}"' in str(error)), None)
        variable = f"MILLPOND_{(field or '').upper()}"
        raise ConfigError(f"wrong settings: {field} ({variable}): must be JSON", field=field) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f".env or millpond.toml is not UTF-8: {error}", field="millpond.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"millpond.toml is not valid TOML: {error}", field="millpond.toml") from None
