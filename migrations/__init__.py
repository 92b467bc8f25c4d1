"""The schema of PostgreSQL: forward-only, numbered steps in `versions/`, applied by Alembic.

    applied = migrate("postgresql://…")    # ["0001"], or [] when the schema was up to date

Which step a database stands at is recorded in its table `millpond_schema`. Any number of processes may migrate at once:
an advisory lock lets one through, the others find nothing left to do.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from shared.errors import ConfigError, MillpondError, Unavailable

if TYPE_CHECKING:
    from sqlalchemy import Connection

HERE = Path(__file__).parent
VERSION_TABLE = "millpond_schema"
#: The steps this version of the code knows, in order.
KNOWN = sorted(path.name.partition("_")[0] for path in (HERE / "versions").glob("[0-9]*.py"))
#: What a migration holds by pg_advisory_lock: "millpond" in ASCII.
ADVISORY_LOCK = 0x6D696C6C706F6E64
_CONNECT_TIMEOUT = 10.0
#: What says that the connection or the server ended under us; the transaction is undone, another try is safe.
_GONE = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InterfaceError,
    OSError,
    TimeoutError,
)


def migrate(url: str) -> list[str]:
    """Bring the schema up to date, wholly or not at all; return the steps applied, oldest first.

    Raises:
        ConfigError: the database is newer than this code (`field` is `database_url`), or its role may not change it.
        Unavailable: it does not answer, or went away meanwhile.
        MillpondError: it refused a step: what is there already is not of our making.
    """
    return asyncio.run(migrate_async(url))


def current(url: str) -> str | None:
    """Return the step the database stands at, None before the first. Errors as `migrate`, but for a newer database."""
    return asyncio.run(current_async(url))


async def current_async(url: str) -> str | None:
    """As `current`, in a running loop."""
    connection = await _connect(url)
    try:
        return await version(connection)
    except _GONE as error:
        raise _unavailable(error) from None
    finally:
        await connection.close()


async def migrate_async(url: str) -> list[str]:
    """As `migrate`, in a running loop."""
    before = await current_async(url)
    if not _steps_after(before):
        return []
    # Alembic and SQLAlchemy take their time to load; a database that is up to date needs neither.
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    # asyncpg reads the URL itself: SQLAlchemy would not know `sslmode`, nor a socket's directory.
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: _connect(url), poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": ADVISORY_LOCK})
            await connection.commit()  # the lock is the session's: it goes when the connection does
            applied = _steps_after(await connection.run_sync(_recorded))
            if applied:
                await connection.run_sync(_upgrade)
                await connection.commit()
            return applied
    except DBAPIError as error:
        cause = error.orig and error.orig.__cause__
        if isinstance(cause, _GONE):
            raise _unavailable(cause) from None
        if not isinstance(cause, asyncpg.InsufficientPrivilegeError):
            raise MillpondError(
                f"PostgreSQL refused to bring its schema up to date, and nothing was changed: {cause or error.orig}; "
                "is there something else in this database?"
            ) from None
        raise ConfigError(
            f"the database's role may not create its tables ({cause}): grant it CREATE on schema public, or run "
            "`millpond migrate` as the owner",
            field="database_url",
        ) from None
    finally:
        await engine.dispose()


def _steps_after(version: str | None) -> list[str]:
    if version is None:
        return KNOWN
    if version not in KNOWN:
        raise ConfigError(
            f"the database's schema is at {version}, this version of Millpond knows {KNOWN[-1]}: upgrade Millpond, or "
            "set MILLPOND_DATABASE_URL to another database",
            field="database_url",
        )
    return KNOWN[KNOWN.index(version) + 1 :]


def _recorded(connection: Connection) -> str | None:
    from alembic.runtime.migration import MigrationContext

    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    version = context.get_current_revision()
    connection.commit()
    return version


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(HERE).replace("%", "%%"))
    command.upgrade(config, "head")


async def _connect(url: str) -> asyncpg.Connection:
    try:
        return await asyncpg.connect(url, timeout=_CONNECT_TIMEOUT, server_settings={"application_name": "migrate"})
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
        raise ConfigError(f"PostgreSQL refuses: {error}; correct MILLPOND_DATABASE_URL", field="database_url") from None
    except (asyncpg.PostgresError, OSError, TimeoutError) as error:
        raise _unavailable(error) from None
    except (ValueError, asyncpg.InterfaceError):  # not repeated: the URL may hold a password
        raise ConfigError(
            "the database's URL cannot be read: as in postgresql://user:password@host:5432/database",
            field="database_url",
        ) from None


def _unavailable(error: BaseException) -> Unavailable:
    return Unavailable(f"cannot reach PostgreSQL: {error or type(error).__name__}; `millpond doctor` says what to do")


async def version(connection: asyncpg.Connection) -> str | None:
    """Return the step that an open connection's database stands at, None before the first."""
    if await connection.fetchval("SELECT to_regclass($1)", VERSION_TABLE) is None:
        return None
    found: str | None = await connection.fetchval(f"SELECT version_num FROM {VERSION_TABLE}")  # noqa: S608 - ours
    return found
