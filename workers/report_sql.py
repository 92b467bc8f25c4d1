"""The report's queries: one row comes back per line of the report, whatever the history's size.

Parameters: $1 since, $2 before, then as each function says.
"""

from __future__ import annotations

from typing import Literal, get_args

from shared.settings import SIMULATED
from shared.touches import BOUNDS, TIERS

By = Literal["day", "hour", "tier", "profile", "tenant", "model", "experiment"]
BYS: tuple[By, ...] = get_args(By)

#: A request that joined a computation, and one that began it.
COMPUTED = ("collapsed", "llm")
#: Dimensions whose lines are in the order of their names.
NAMED = ("day", "hour", "experiment")

#: What tells a group in `hits` and in `calls`. An experiment and its variant are joined by a line feed.
_NAMES = {
    "total": ("'total'", "'total'"),
    "day": ("date_trunc('day', hour, 'UTC')", "date_trunc('day', at, 'UTC')"),
    "hour": ("hour", "date_trunc('hour', at, 'UTC')"),
    "tier": ("tier", "'llm'"),
    "profile": ("profile", "profile"),
    "tenant": ("tenant", "tenant"),
    "model": ("model", "model"),
    "experiment": ("experiment || E'\\n' || variant", "experiment || E'\\n' || coalesce(variant, '')"),
}
#: How a group that is no text is written; once for each line, not for each row.
_WRITTEN = {
    "day": "to_char(name AT TIME ZONE 'UTC', 'YYYY-MM-DD') AS name",
    "hour": "to_char(name AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:00') AS name",
}
_HISTOGRAM = (
    "ARRAY[" + ", ".join(f"coalesce(sum(histogram[{n}]), 0)" for n in range(1, len(BOUNDS) + 2)) + "]::bigint[]"
)
#: What no model was called for, whatever the provider's name.
_SIMULATED = f"coalesce(provider, '') ~ '^{SIMULATED.pattern}'"
_PER_TIER = "ARRAY[" + ", ".join(f"sum(hits) FILTER (WHERE tier = '{tier}')" for tier in TIERS) + "]::bigint[]"


def account(by: By | Literal["total"]) -> str:
    """Return the query of the account by one dimension; $3 the codes of failed calls, $4 most lines (NULL: all).

    What was served and what was paid are summed apart and joined by name: neither is counted once per row of the other.
    """
    served, paid = _NAMES[by]
    group = "" if by == "total" else "GROUP BY 1"
    tried, assigned = ("AND experiment <> ''", "AND experiment IS NOT NULL") if by == "experiment" else ("", "")
    order = "1" if by in NAMED else "spent + saved DESC, requests DESC, 1"
    return f"""
WITH served AS (
  SELECT {served} AS name, sum(hits) AS requests, {_PER_TIER} AS tiers, {_HISTOGRAM} AS histogram,
    sum(prompt_tokens) FILTER (WHERE tier <> 'llm') AS saved_prompt_tokens,
    sum(completion_tokens) FILTER (WHERE tier <> 'llm') AS saved_completion_tokens,
    sum(cost) FILTER (WHERE tier <> 'llm') AS saved,
    sum(cost) FILTER (WHERE tier = 'collapsed') AS saved_coalesced,
    sum(saved_ms) FILTER (WHERE tier <> 'llm') AS saved_ms
  FROM hits WHERE hour >= $1 AND hour < $2 {tried} {group}
), paid AS (
  SELECT {paid} AS name, count(*) AS calls,
    count(*) FILTER (WHERE outcome = ANY($3::text[])) AS failed_calls,
    count(*) FILTER (WHERE kind <> 'fill') AS background_calls,
    count(*) FILTER (WHERE {_SIMULATED}) AS simulated_calls,
    count(*) FILTER (WHERE cost IS NULL AND prompt_tokens + completion_tokens > 0) AS unpriced_calls,
    sum(prompt_tokens) AS spent_prompt_tokens, sum(completion_tokens) AS spent_completion_tokens,
    sum(cost) AS spent, sum(cost) FILTER (WHERE kind <> 'fill') AS overhead, sum(cost * cost) AS squares
  FROM calls WHERE at >= $1 AND at < $2 {assigned} {group}
), joined AS (
  SELECT {_WRITTEN.get(by, "name")},
    coalesce(requests, 0)::bigint AS requests, coalesce(tiers, '{{}}') AS tiers, histogram,
    coalesce(calls, 0) AS calls, coalesce(failed_calls, 0) AS failed_calls,
    coalesce(background_calls, 0) AS background_calls, coalesce(unpriced_calls, 0) AS unpriced_calls,
    coalesce(simulated_calls, 0) AS simulated_calls,
    coalesce(spent_prompt_tokens, 0)::bigint AS spent_prompt_tokens,
    coalesce(spent_completion_tokens, 0)::bigint AS spent_completion_tokens,
    coalesce(spent, 0) AS spent, coalesce(overhead, 0) AS overhead, coalesce(squares, 0) AS squares,
    coalesce(saved_prompt_tokens, 0)::bigint AS saved_prompt_tokens,
    coalesce(saved_completion_tokens, 0)::bigint AS saved_completion_tokens,
    coalesce(saved, 0) AS saved, coalesce(saved_coalesced, 0) AS saved_coalesced,
    coalesce(saved_ms, 0)::float8 / 1000 AS saved_seconds
  FROM served FULL JOIN paid USING (name)
)
SELECT * FROM joined ORDER BY {order} LIMIT $4::bigint"""  # noqa: S608 only names from the table above


TIERS_QUERY = f"""
SELECT tier, sum(hits)::bigint AS requests, {_HISTOGRAM} AS histogram,
  coalesce(sum(prompt_tokens) FILTER (WHERE tier <> 'llm'), 0)::bigint AS saved_prompt_tokens,
  coalesce(sum(completion_tokens) FILTER (WHERE tier <> 'llm'), 0)::bigint AS saved_completion_tokens,
  coalesce(sum(cost) FILTER (WHERE tier <> 'llm'), 0) AS saved
FROM hits WHERE hour >= $1 AND hour < $2 GROUP BY tier"""  # noqa: S608

#: Per variant, sums over the hours in which it was asked for, for intervals.
HOURS_QUERY = """
WITH served AS (
  SELECT experiment, variant, hour, sum(hits)::float8 AS n,
    coalesce(sum(hits) FILTER (WHERE tier NOT IN ('collapsed', 'llm')), 0)::float8 AS h
  FROM hits WHERE hour >= $1 AND hour < $2 AND experiment <> '' GROUP BY 1, 2, 3
), paid AS (
  SELECT experiment, coalesce(variant, '') AS variant, date_trunc('hour', at, 'UTC') AS hour,
    coalesce(sum(cost), 0) AS c
  FROM calls WHERE at >= $1 AND at < $2 AND experiment IS NOT NULL GROUP BY 1, 2, 3
), hours AS (
  SELECT experiment || E'\\n' || variant AS name, coalesce(n, 0) AS n, coalesce(h, 0) AS h, coalesce(c, 0) AS c
  FROM served FULL JOIN paid USING (experiment, variant, hour)
)
SELECT name, count(*) AS hours, sum(h) AS h, sum(c) AS c, sum(n) AS n, sum(h * h) AS hh, sum(h * n) AS hn,
  sum(c * c) AS cc, sum(c * n) AS cn, sum(n * n) AS nn
FROM hours GROUP BY name"""

#: $3 how many.
TOP_QUERY = f"""
SELECT encode(often.key, 'hex') AS key, often.hits, profile, tenant, model, often.hits * cost AS saved,
  prompt::text AS prompt, {_SIMULATED} AS simulated
FROM (
  SELECT key, sum(hits)::bigint AS hits FROM top_keys WHERE hour >= $1 AND hour < $2
  GROUP BY key ORDER BY 2 DESC, 1 LIMIT $3
) AS often LEFT JOIN answers USING (key) ORDER BY often.hits DESC, 1"""  # noqa: S608

PROVIDERS_QUERY = """
SELECT coalesce(provider, '') AS provider, count(*) AS calls FROM calls
WHERE at >= $1 AND at < $2 GROUP BY 1 ORDER BY 2 DESC, 1"""
