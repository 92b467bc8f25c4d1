"""What a deployment was born with: recorded in Redis at first start, checked at every later one."""

from __future__ import annotations

from shared import keys
from shared.errors import ConfigError
from shared.link import Link
from shared.messages import SCHEMA


async def recorded(link: Link, configured: int | None) -> int | None:
    """Return the number of partitions of a deployment that was born; None if none was, for only workers give birth.

    Raises:
        ConfigError: as `settle`.
    """
    born = await link.call(("HMGET", keys.DEPLOYMENT, "partitions", "schema"))
    return None if None in born else _checked(born, configured)


async def settle(link: Link, configured: int | None) -> int:
    """Record the number of partitions if this is the first start; return the number in force.

    Raises:
        ConfigError: this process is configured for another number, or another wire schema.
    """
    _, _, born = await link.send(
        [
            ("HSETNX", keys.DEPLOYMENT, "partitions", configured or 1),
            ("HSETNX", keys.DEPLOYMENT, "schema", SCHEMA),
            ("HMGET", keys.DEPLOYMENT, "partitions", "schema"),
        ]
    )
    return _checked(born, configured)


def _checked(born: list[bytes], configured: int | None) -> int:
    partitions, schema = (int(value) for value in born)
    if schema != SCHEMA:
        raise ConfigError(
            f"this deployment speaks wire schema {schema}, this version speaks {SCHEMA}: "
            "run the version it was born with, or start a new deployment on another server or database",
            field="schema",
        )
    if configured is not None and configured != partitions:
        raise ConfigError(
            f"this deployment was born with {partitions} partitions and this process is configured for {configured}: "
            f"set MILLPOND_PARTITIONS={partitions} (or leave it unset), or start a new deployment",
            field="partitions",
        )
    return partitions
