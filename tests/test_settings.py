"""Settings: where they come from, what is refused, what is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.console import masked
from shared.errors import ConfigError
from shared.settings import Settings, load

SECRET = "s3cr3t-w0rd"


def test_the_environment_wins_over_dotenv_and_dotenv_over_toml(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("millpond.toml").write_text("model = 'from-toml'\nconcurrency = 3\nattempts = 2\n")
    Path(".env").write_text("MILLPOND_MODEL=from-dotenv\nMILLPOND_CONCURRENCY=5\n")
    monkeypatch.setenv("MILLPOND_MODEL", "from-environment")
    found = load()
    assert (found.model, found.concurrency, found.attempts) == ("from-environment", 5, 2)


def test_a_dotenv_may_hold_what_belongs_to_others() -> None:
    Path(".env").write_text(f"DATABASE_URL=postgresql://x\nMODEL=theirs\nTIMEOUT=3\nOPENAI_API_KEY={SECRET}\n")
    found = load()
    assert (found.model, found.timeout) == ("gpt-4o-mini", 60.0)


def test_the_sdk_key_counts_wherever_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().provider_name == "simulated"
    Path(".env").write_text("OPENAI_API_KEY=from-dotenv\n")
    assert (load().api_key, load().provider_name) == ("from-dotenv", "openai")
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    assert load().api_key == "from-environment"
    monkeypatch.setenv("MILLPOND_OPENAI_API_KEY", "our-own")
    assert load().api_key == "our-own"


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_REDIS_URL", "")
    monkeypatch.setenv("MILLPOND_CONCURRENCY", "")
    assert (load().redis_url, load().concurrency) == (None, 64)


@pytest.mark.parametrize(
    ("variable", "value", "field"),
    [
        ("MILLPOND_CONCURRENCY", "0", "concurrency"),
        ("MILLPOND_CONCURRENCY", "many", "concurrency"),
        ("MILLPOND_PARTITIONS", "0", "partitions"),
        ("MILLPOND_TIMEOUT", "-1", "timeout"),
        ("MILLPOND_PROVIDER", "nobody", "provider"),
        ("MILLPOND_REDIS_URL", "http://localhost", "redis_url"),
        ("MILLPOND_PROFILES", "{not json", "profiles"),
        ("MILLPOND_PROFILES__MINE__TTL", "0", "profiles.mine.ttl"),
        ("MILLPOND_CACHE_ENABLED", "perhaps", "cache_enabled"),
    ],
)
def test_a_wrong_value_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, field: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load()
    assert caught.value.field == field
    assert variable in caught.value.message


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (".env", "MILLPOND_MODLE=x\n"),
        ("millpond.toml", "modle = 'x'\n"),
        ("millpond.toml", "[profiles.faq]\nmodle = 'x'\n"),
    ],
)
def test_a_misspelt_setting_in_a_file_is_refused(file: str, text: str) -> None:
    Path(file).write_text(text)
    with pytest.raises(ConfigError, match=r"modle.*no such setting; remove it or correct its name"):
        load()


def test_a_broken_toml_is_refused_with_its_line() -> None:
    Path("millpond.toml").write_text("model = \n")
    with pytest.raises(ConfigError, match=r"millpond\.toml is not valid TOML.*line 1"):
        load()


def test_secrets_appear_in_no_repr_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_REDIS_URL", f"redis://user:{SECRET}@localhost:6379/0")
    monkeypatch.setenv("MILLPOND_OPENAI_API_KEY", SECRET)
    found = load()
    assert SECRET not in repr(found) + str(found) + found.model_dump_json()
    monkeypatch.setenv("MILLPOND_REDIS_URL", f"postgres://user:{SECRET}@localhost")
    with pytest.raises(ConfigError) as caught:
        load()
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}@localhost:6379/0",
        f"rediss://:{SECRET}@[::1]:6379",
        f"unix://user:{SECRET}@/run/redis.sock?db=1",
        f"redis://localhost/0?username=u&password={SECRET}",
    ],
)
def test_a_masked_url_says_where_and_hides_the_password(url: str) -> None:
    assert SECRET not in masked(url)
    assert "***" in masked(url)
    assert masked(url).startswith(url.split("://")[0] + "://")


def test_every_setting_is_on_its_page_with_its_default() -> None:
    page = (Path(__file__).parent.parent / "docs" / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if name == "data_dir" or default is None or default == {}:
            assert f"| `{name}` |" in page
            continue
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        assert f"| `{name}` | `{shown}` |" in page


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2#x@127.0.0.1:1", "redis://:hunter2/x@127.0.0.1:1", "redis://:hunter2?x@127.0.0.1:1",
        "redis://:hunter2@127.0.0.1:notaport/0", "redis://:hunter2@host/0?foo=bar", "redis://:hunter2@[x",
        "redis://:hunter2@host/abc", "redis://:hunter2@host/0?socket_timeout=hunter2", "hunter2://host",
    ],
)  # fmt: skip
def test_what_is_no_redis_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError, match="MILLPOND_REDIS_URL") as refusal:
        load(redis_url=url)
    assert refusal.value.field == "redis_url"
    assert "hunter2" not in str(refusal.value)


def test_an_endpoint_that_is_real_cannot_be_named_simulated(tmp_path: Path) -> None:
    (tmp_path / "millpond.toml").write_text('[providers.simulated]\nbase_url = "http://localhost:1/v1"\n')
    with pytest.raises(ConfigError, match=r"MILLPOND_PROVIDERS.*kind = "):
        load()
    (tmp_path / "millpond.toml").write_text('[providers.cheap]\nkind = "simulated"\n')
    assert [load().kind_of(name) for name in ("cheap", "openai", "none")] == ["simulated", "openai", None]


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "millpond.toml").write_bytes(b"model = '\xff'\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load()
