"""Experiments: who gets which variant, by a stable hash, the same in every process and language.

docs/protocol.md has the definition; nothing is stored and nobody is asked. Adding a variant or changing a weight moves
some units to another variant; a new name draws all of them afresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b


def assign(experiment: str, unit: str, variants: Mapping[str, float]) -> str:
    """Return the variant of `unit` (a user, say), drawn in proportion to the weights of `variants`.

    The first eight bytes of BLAKE2b-512 of `EXPERIMENT LF UNIT`, shifted right by 11 and divided by 2**53, are a point
    in [0, 1). The variants, sorted by their UTF-8 names, divide that interval by weight.

    Raises:
        ValueError: no variant has a weight.
    """
    total = sum(variants.values())
    if not total > 0:
        raise ValueError("an experiment needs a variant with a weight above 0")
    digest = blake2b(f"{experiment}\n{unit}".encode()).digest()
    point = (int.from_bytes(digest[:8], "big") >> 11) / 2**53 * total
    ordered = sorted(((name, weight) for name, weight in variants.items() if weight > 0), key=lambda v: v[0].encode())
    for name, weight in ordered:
        point -= weight
        if point < 0:
            return name
    return ordered[-1][0]  # rounding
