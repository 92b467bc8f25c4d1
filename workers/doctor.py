"""`millpond doctor`: what is configured, what answers, and what to do about the rest. It changes nothing.

Workers take their settings where they were started: while any are alive, what they say is judged, and this shell's
settings only where they differ.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import orjson
import redis

import migrations
from shared import console, embedded, keys
from shared.database import resolve_database_url
from shared.errors import ConfigError, Unavailable
from shared.providers import make_provider
from shared.settings import SIMULATED, Settings
from workers import durable, overview
from workers.kinds import BACKGROUND
from workers.supervisor import for_real_answers, provider_in_force

Level = Literal["ok", "warn", "fail"]

REDIS_AT_LEAST = (7, 0)
VALKEY_AT_LEAST = (8, 0)
POSTGRESQL_AT_LEAST = 15
#: Seconds that an answer may wait for PostgreSQL before it is worth a word.
_BEHIND = 60.0
#: Variables that are ours but no settings.
_NOT_SETTINGS = ("MILLPOND_FAULT", "MILLPOND_TEST_")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `advice` says what to do unless all is well."""

    level: Level
    subject: str
    detail: str
    advice: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield findings, the configuration first, then as far into the deployment as can be reached."""
    yield from _configuration(settings)
    yield from _database(settings)
    try:
        url = embedded.resolve_url(settings)
    except (ConfigError, Unavailable) as error:
        yield from _of_this_shell(settings)
        yield Finding("fail", "redis", f"none configured and none answers on {settings.data_dir}", error.message)
        return
    connection = overview.connect(url)
    try:
        server = dict(connection.execute_command("INFO"))
    except (redis.RedisError, OSError) as error:
        yield from _of_this_shell(settings)
        yield Finding("fail", "redis", f"{console.masked(url)}: {error}", _unreachable_advice(error))
        return
    with connection:
        yield Finding("ok", "redis", f"{console.masked(url)} answers")
        yield _version(server)
        yield _eviction(server)
        yield _persistence(server)
        yield from _memory(connection, server, settings)
        yield from _circuits(connection, int(server["server_time_usec"]) // 1000)
        yield from _deployment(connection, settings)


def _configuration(settings: Settings) -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    files = [name for name in (".env", "millpond.toml") if Path(name).is_file()]
    environment = sorted(name for name in os.environ if name.startswith("MILLPOND_"))
    changed = {name for name in settings.model_fields_set if name != "openai_api_key"}
    sources = ", ".join([*files, f"{len(environment)} variables"] if environment else files) or "defaults only"
    yield Finding("ok", "settings", f"from {sources}; set: {', '.join(sorted(changed)) or 'nothing'}")
    for name in environment:
        field = name.removeprefix("MILLPOND_").lower().partition("__")[0]
        if field not in type(settings).model_fields and not name.startswith(_NOT_SETTINGS):
            yield Finding("warn", "settings", f"{name} is no setting", "correct its name or unset it")


def _database(settings: Settings) -> Iterator[Finding]:
    if not settings.l3:
        yield Finding("ok", "postgresql", "switched off (l3 is false): answers live as long as Redis keeps them")
        return
    seen = durable.look(settings)
    if seen is None:
        yield Finding(
            "warn",
            "postgresql",
            f"none configured and none answers on {settings.data_dir}: answers live as long as Redis keeps them",
            "millpond up starts one; or set MILLPOND_DATABASE_URL, or MILLPOND_L3=false to do without",
        )
        return
    if seen.error is not None:
        advice = "start that server, or correct MILLPOND_DATABASE_URL; meanwhile answers wait for it in Redis"
        if settings.database_url is None:
            advice = "if `millpond up` still runs there, try again in a moment; if not, run it; answers wait in Redis"
        yield Finding("fail", "postgresql", f"{seen.url}: {seen.error}", advice)
        return
    where = "embedded, " if settings.database_url is None else ""
    if seen.major >= POSTGRESQL_AT_LEAST:
        yield Finding("ok", "postgresql", f"{seen.version}, {where}{seen.url} answers")
    else:
        yield Finding("fail", "postgresql", seen.version, f"upgrade it to PostgreSQL {POSTGRESQL_AT_LEAST} or newer")
    yield _schema(seen)
    vector = f"pgvector {seen.vector}" if seen.vector else "pgvector not present: exact matches only"
    yield Finding("ok", "similarity", vector)


def _schema(seen: durable.Durable) -> Finding:
    newest = migrations.KNOWN[-1]
    if seen.schema == newest:
        stored = f"{'about ' if seen.estimated else ''}{seen.answers} answers"
        return Finding("ok", "schema", f"{newest}, {stored}")
    if seen.schema in (None, *migrations.KNOWN):
        return Finding(
            "fail", "schema", f"{seen.schema or 'none yet'}, this version wants {newest}", "millpond migrate"
        )
    return Finding("fail", "schema", f"{seen.schema} is newer than this version's {newest}", "upgrade Millpond here")


def _of_this_shell(settings: Settings) -> Iterator[Finding]:
    """What workers started here would do; to be told while none are alive."""
    yield _provider(settings)
    yield from _chains(settings, "fail", "correct it there: no LLM worker starts with it")
    if not settings.cache_enabled:
        yield Finding(
            "warn", "cache", "switched off: every request goes to the provider", "MILLPOND_CACHE_ENABLED=true"
        )


def _provider(settings: Settings) -> Finding:
    detail = provider_in_force(settings)
    if settings.kind_of(settings.provider_name) == "simulated":
        return Finding("warn", "provider", detail, "fine to try things out; not for real answers")
    if find_spec("openai") is None:
        return Finding("fail", "provider", detail, "its SDK is missing: pip install 'millpond[workers]'")
    if settings.api_key is None and settings.openai_base_url is None:
        return Finding("fail", "provider", f"{detail}, no key", "set OPENAI_API_KEY or MILLPOND_OPENAI_API_KEY")
    return Finding("ok", "provider", f"{detail}, {'key present' if settings.api_key else 'no key'}")


def _chains(settings: Settings, level: Level, advice: str) -> Iterator[Finding]:
    """Chains that no LLM worker would start with."""
    for profile, about in settings.all_profiles.items():
        setting = f"profiles.{profile}.providers"
        if about.providers and about.resolver is not None:
            yield Finding(level, "chain", f"{setting}: there is a resolver too", "keep one of them")
        for name in dict.fromkeys(item.partition(":")[0] for item in about.providers):
            try:
                if settings.kind_of(name) != "simulated":
                    make_provider(settings, name)  # connects to nothing yet
            except ConfigError as error:
                yield Finding(level, "chain", f"{setting}: {error.message}", advice)
            except ImportError as error:
                yield Finding(
                    level, "chain", f"{setting}: {name} needs {error.name}", "pip install 'millpond[workers]'"
                )


def _unreachable_advice(error: Exception) -> str:
    text = str(error).lower()
    if "auth" in text or "password" in text or "wrongpass" in text:
        return "check user and password in MILLPOND_REDIS_URL"
    if "certificate" in text or "ssl" in text:
        return "check the server's certificate, or name the authority: rediss://…?ssl_ca_certs=FILE"
    return "start that server, or correct MILLPOND_REDIS_URL; without it `millpond up` starts its own"


def _version(server: dict[str, Any]) -> Finding:
    name, least = "Redis", REDIS_AT_LEAST
    version = str(server.get("redis_version", "0"))
    if "valkey_version" in server:
        name, least, version = "Valkey", VALKEY_AT_LEAST, str(server["valkey_version"])
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if found >= least:
        return Finding("ok", "version", f"{name} {version}")
    wanted = ".".join(map(str, least))
    return Finding("fail", "version", f"{name} {version}", f"upgrade it to {name} {wanted} or newer")


def _eviction(server: dict[str, Any]) -> Finding:
    policy = str(server.get("maxmemory_policy", "unknown"))
    bounded = int(server.get("maxmemory", 0)) > 0
    detail = f"maxmemory-policy {policy}, " + ("maxmemory set" if bounded else "no maxmemory")
    if policy.startswith("allkeys"):
        advice = "it deletes queues under pressure: CONFIG SET maxmemory-policy volatile-ttl (or noeviction)"
        return Finding("fail", "eviction", detail, advice)
    if policy.startswith("volatile"):
        # Flights and their waiters have a TTL too; without them a request ends at its own deadline.
        return Finding("warn", "eviction", detail, "under pressure flights may be evicted too; noeviction is safest")
    return Finding("ok", "eviction", detail)


def _persistence(server: dict[str, Any]) -> Finding:
    if int(server.get("aof_enabled", 0)):
        if server.get("aof_last_write_status", "ok") != "ok":
            return Finding("fail", "persistence", "appendonly yes, last write failed", "free space on its disk")
        return Finding("ok", "persistence", "appendonly yes")
    return Finding(
        "warn",
        "persistence",
        "appendonly no: a restart of Redis loses accepted requests and the cache",
        "CONFIG SET appendonly yes, and the same in its configuration file",
    )


def _memory(connection: redis.Redis, server: dict[str, Any], settings: Settings) -> Iterator[Finding]:
    used, limit = int(server["used_memory"]), int(server.get("maxmemory", 0)) or settings.memory_limit
    if not limit:
        yield Finding("ok", "memory", f"{used / 1e6:,.0f} MB used, no limit to compare with")
        return
    detail = f"{used / 1e6:,.0f} of {limit / 1e6:,.0f} MB used, mark at {settings.memory_mark:.0%}"
    if connection.execute_command("EXISTS", keys.PRESSURE):
        advice = "give Redis more memory, or shorten the TTLs; meanwhile refreshes rest and answers leave Redis earlier"
        yield Finding("warn", "memory", f"{detail}: above it", advice)
    else:
        yield Finding("ok", "memory", detail)


def _circuits(connection: redis.Redis, server_ms: int) -> Iterator[Finding]:
    """Providers that the pool leaves alone just now."""
    prefix = f"{keys.BREAKER_PREFIX}:"
    for name in sorted({key.decode() for key in connection.scan_iter(f"{prefix}*", count=1000)}):
        failures, until = connection.execute_command("HMGET", name, "failures", "until")
        if until is not None:
            left = max(0.0, (int(until) - server_ms) / 1000)
            yield Finding(
                "warn",
                "circuit",
                f"{name.removeprefix(prefix)} failed {int(failures or 0)} times in a row; it is tried again "
                + (f"in {left:.0f} s" if left else "with the next call"),
                "see that the provider answers; meanwhile the next of its chain does, or what is stored",
            )


def _schedule(connection: redis.Redis) -> Iterator[Finding]:
    """What the scheduled jobs last came to, where one failed."""
    from workers.jobs import JOBS

    records = [orjson.loads(text) for text in connection.execute_command("MGET", *map(keys.schedule, JOBS)) if text]
    failed = [record for record in records if not record["ok"]]
    for record in failed:
        advice = f"millpond schedule run {record['name']} tries again at once"
        yield Finding("warn", "schedule", f"{record['name']} failed: {record['error']}", advice)
    if records and not failed:
        yield Finding("ok", "schedule", f"{len(records)} jobs have run, none failed")


def _deployment(connection: redis.Redis, settings: Settings) -> Iterator[Finding]:
    seen = overview.look(connection)
    if seen.workers:
        yield from _in_force(seen, settings)
    else:
        yield from _of_this_shell(settings)
    if not seen.partitions:
        yield Finding("warn", "partitions", "none recorded: no worker has started here yet", "millpond up")
        return
    if settings.partitions in (None, seen.partitions):
        yield Finding("ok", "partitions", str(seen.partitions))
    else:
        yield Finding(
            "fail",
            "partitions",
            f"recorded {seen.partitions}, configured {settings.partitions}",
            f"set MILLPOND_PARTITIONS={seen.partitions} or leave it unset; to change it, start a new deployment",
        )
    yield from _workers(seen, settings)
    yield from _queues(seen, settings)
    yield from _schedule(connection)
    if (behind := max(seen.backlog)) > _BEHIND:
        detail = f"answers have waited for PostgreSQL for {behind:.0f} s; none is lost"
        yield Finding("warn", "persistence lag", detail, "see that PostgreSQL answers and a persistence worker runs")
    if seen.dead:
        advice = "millpond dead list says why; then millpond dead retry, or millpond dead discard"
        yield Finding("warn", "dead letters", str(seen.dead), advice)
    else:
        yield Finding("ok", "dead letters", "none")


def _in_force(seen: overview.Overview, settings: Settings) -> Iterator[Finding]:
    """What the live workers say of their own settings, and where this shell's differ."""
    providers = [str(w["provider"]) for w in seen.workers if w.get("kind") == "llm" and w.get("provider")]
    switches = [bool(w["cache_enabled"]) for w in seen.workers if w.get("kind") == "lookup" and "cache_enabled" in w]
    yield _live_provider(providers) if providers else _provider(settings)
    if providers:
        yield from _chains(
            settings, "warn", "the workers were started otherwise; correct it before you start any from here"
        )
    else:
        yield from _chains(settings, "fail", "correct it there: no LLM worker starts with it")
    if switches:
        yield _live_cache(switches)
    differing = []
    if providers and set(providers) != {settings.provider_recorded}:
        differing.append(f"provider {settings.provider_recorded} (workers: {', '.join(sorted(set(providers)))})")
    if switches and set(switches) != {settings.cache_enabled}:
        here, there = ("on", "off") if settings.cache_enabled else ("off", "on")
        differing.append(f"cache {here} (workers: {there if len(set(switches)) == 1 else 'some on, some off'})")
    if differing:
        detail = f"set otherwise than the workers: {'; '.join(differing)}"
        yield Finding(
            "warn", "this shell", detail, "the workers' settings count; start them anew from here to change them"
        )


def _live_provider(providers: list[str]) -> Finding:
    named = ", ".join(f"{name} ({providers.count(name)} of {len(providers)})" for name in sorted(set(providers)))
    if len(set(providers)) > 1:
        return Finding("warn", "provider", f"LLM workers disagree: {named}", "start all with the same settings")
    if SIMULATED.match(providers[0]):
        advice = f"for real ones {for_real_answers(providers[0])}, and start the LLM workers anew"
        return Finding("warn", "provider", f"{providers[0]}, say the live LLM workers: answers are made up", advice)
    return Finding("ok", "provider", f"{providers[0]}, say the live LLM workers")


def _live_cache(switches: list[bool]) -> Finding:
    if all(switches):
        return Finding("ok", "cache", "switched on, say the live lookup workers")
    off = f"switched off in {switches.count(False)} of {len(switches)} lookup workers: what they read is not cached"
    return Finding("warn", "cache", off, "start them with MILLPOND_CACHE_ENABLED=true")


def _workers(seen: overview.Overview, settings: Settings) -> Iterator[Finding]:
    for kind in ("lookup", "llm"):
        names = [str(worker.get("name")) for worker in seen.workers if worker.get("kind") == kind]
        if names:
            yield Finding("ok", f"{kind} workers", f"{len(names)} alive: {', '.join(names)}")
        else:
            yield Finding("fail", f"{kind} workers", "none alive", f"millpond up, or millpond worker {kind}")
    durable_tier = resolve_database_url(settings) is not None
    wanted = [kind.value for kind in BACKGROUND if durable_tier or not kind.needs_database]
    alive = {str(worker.get("kind")) for worker in seen.workers}
    if missing := [kind for kind in wanted if kind not in alive]:
        advice = f"millpond up, or millpond worker {missing[0]}"
        yield Finding("warn", "background", f"no {', '.join(missing)} worker alive", advice)
    elif wanted:
        yield Finding("ok", "background", f"{', '.join(wanted)}: alive")


def _queues(seen: overview.Overview, settings: Settings) -> Iterator[Finding]:
    groups = {(queue.partition, queue.group) for queue in seen.queues}
    missing = seen.partitions * 2 - len(groups & {(p, g) for p in range(seen.partitions) for g in ("lookup", "llm")})
    if missing:
        yield Finding("warn", "groups", f"{missing} missing", "starting a worker of each kind creates them")
    limits = {
        "requests": settings.request_limit, "fills": settings.fill_limit, "refreshes": settings.fill_limit,
        "landed": settings.landed_limit,
    }  # fmt: skip
    for queue in seen.queues:
        about = f"partition {queue.partition}, for {queue.group}: {queue.length} entries, {queue.pending} in hand"
        subject = f"{queue.stream} queue"
        if queue.orphaned:
            yield Finding("warn", subject, f"{about}, {queue.orphaned} of them held by dead workers",
                          "a live worker takes them over after the lease")  # fmt: skip
        elif queue.length > limits.get(queue.stream, queue.length * 2) // 2:
            yield Finding("warn", subject, f"{about}: more than half full", "start more workers of its kind")
        else:
            yield Finding("ok", subject, about)
