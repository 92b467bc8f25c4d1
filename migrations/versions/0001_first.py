"""Answers, provider calls, hit statistics, the audit of invalidations; tables that grow are partitioned by day."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None

TABLES = (
    # What was answered. `entry` is the whole envelope, compressed already: not once more.
    """
    CREATE TABLE answers (
        key bytea PRIMARY KEY,
        partition int NOT NULL,
        epoch_ms bigint NOT NULL,
        epoch_seq bigint NOT NULL,
        created timestamptz NOT NULL,
        fresh timestamptz NOT NULL,
        expires timestamptz NOT NULL,
        gone timestamptz NOT NULL,
        tags text[] NOT NULL,
        profile text NOT NULL,
        tenant text NOT NULL,
        model text NOT NULL,
        provider text,
        endpoint text,
        prompt_tokens int NOT NULL DEFAULT 0,
        completion_tokens int NOT NULL DEFAULT 0,
        cost double precision,
        compute_ms int NOT NULL DEFAULT 0,
        bytes int NOT NULL,
        entry bytea NOT NULL,
        prompt jsonb
    ) WITH (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.05,
            autovacuum_analyze_scale_factor = 0.05)
    """,
    "ALTER TABLE answers ALTER COLUMN entry SET STORAGE EXTERNAL",
    "CREATE INDEX answers_tags ON answers USING gin (tags)",
    "CREATE INDEX answers_gone ON answers (gone)",
    "CREATE INDEX answers_epoch ON answers (partition, epoch_ms, epoch_seq)",
    # Every call of a provider, one row per attempt; `at` and `id` are those of the message that told of it.
    """
    CREATE TABLE calls (
        at timestamptz NOT NULL,
        partition int NOT NULL,
        id text NOT NULL,
        attempt int NOT NULL DEFAULT 0,
        key bytea,
        profile text NOT NULL,
        tenant text NOT NULL,
        model text NOT NULL,
        provider text,
        endpoint text,
        kind text,
        outcome text NOT NULL,
        prompt_tokens int NOT NULL DEFAULT 0,
        completion_tokens int NOT NULL DEFAULT 0,
        cost double precision,
        duration_ms int NOT NULL DEFAULT 0,
        experiment text,
        variant text,
        PRIMARY KEY (at, partition, id, attempt)
    ) PARTITION BY RANGE (at)
    """,
    # What was answered from where, and what that saved. `histogram` counts by latency, bounds in shared/touches.py.
    """
    CREATE TABLE hits (
        hour timestamptz NOT NULL,
        tier text NOT NULL,
        profile text NOT NULL,
        tenant text NOT NULL,
        model text NOT NULL,
        experiment text NOT NULL DEFAULT '',
        variant text NOT NULL DEFAULT '',
        hits bigint NOT NULL DEFAULT 0,
        prompt_tokens bigint NOT NULL DEFAULT 0,
        completion_tokens bigint NOT NULL DEFAULT 0,
        cost double precision NOT NULL DEFAULT 0,
        saved_ms bigint NOT NULL DEFAULT 0,
        histogram bigint[] NOT NULL,
        PRIMARY KEY (hour, tier, profile, tenant, model, experiment, variant),
        CHECK (cardinality(histogram) = 15)
    ) PARTITION BY RANGE (hour)
    """,
    """
    CREATE TABLE top_keys (
        hour timestamptz NOT NULL,
        key bytea NOT NULL,
        hits bigint NOT NULL,
        PRIMARY KEY (hour, key)
    ) PARTITION BY RANGE (hour)
    """,
    # Reports of hits already counted: a message delivered twice is counted once.
    """
    CREATE TABLE applied (
        at timestamptz NOT NULL,
        stream text NOT NULL,
        id text NOT NULL,
        PRIMARY KEY (at, stream, id)
    ) PARTITION BY RANGE (at)
    """,
    # The invalidation below which a partition's answers are refused: its tag markers were pruned.
    """
    CREATE TABLE floors (
        partition int PRIMARY KEY,
        epoch_ms bigint NOT NULL,
        epoch_seq bigint NOT NULL
    )
    """,
    """
    CREATE TABLE invalidations (
        partition int NOT NULL,
        id text NOT NULL,
        at timestamptz NOT NULL,
        by text,
        reason text,
        labels text[] NOT NULL,
        dry_run boolean NOT NULL DEFAULT false,
        l2 bigint,
        l3 bigint,
        PRIMARY KEY (partition, id)
    )
    """,
    "CREATE INDEX invalidations_at ON invalidations (at)",
    """
    CREATE TABLE experiments (
        name text NOT NULL,
        variant text NOT NULL,
        first_seen timestamptz NOT NULL,
        last_seen timestamptz NOT NULL,
        PRIMARY KEY (name, variant)
    )
    """,
)

DAYS = (
    """
    CREATE FUNCTION daily_tables() RETURNS TABLE (parent text, by_column text, longest_keep int)
    LANGUAGE sql IMMUTABLE AS $$
        VALUES ('calls', 'at', NULL::int), ('hits', 'hour', NULL), ('top_keys', 'hour', NULL), ('applied', 'at', 2)
    $$
    """,
    # Rows that came before their day had a partition lie in the default one; they are moved. ATTACH holds up only who
    # writes to the default partition, CREATE … PARTITION OF everyone.
    """
    CREATE FUNCTION ensure_partitions(days_ahead int) RETURNS text[] LANGUAGE plpgsql SET timezone = 'UTC' AS $$
    DECLARE
        created text[] := '{}';
        item record;
        one date;
        name text;
    BEGIN
        PERFORM pg_advisory_xact_lock(hashtext('millpond.partitions'));
        FOR item IN SELECT * FROM daily_tables() LOOP
            FOR one IN EXECUTE format(
                'SELECT day::date FROM generate_series(current_date - 1, current_date + $1, interval ''1 day'') day
                 UNION SELECT %I::date FROM %I ORDER BY 1', item.by_column, item.parent || '_default') USING days_ahead
            LOOP
                name := item.parent || '_' || to_char(one, 'YYYYMMDD');
                CONTINUE WHEN to_regclass(name) IS NOT NULL;
                EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING ALL)', name, item.parent);
                EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', item.parent || '_default');
                EXECUTE format(
                    'WITH moved AS (DELETE FROM %I WHERE %I >= $1 AND %2$I < $1 + 1 RETURNING *)
                     INSERT INTO %3$I SELECT * FROM moved', item.parent || '_default', item.by_column, name) USING one;
                EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                    item.parent, name, one::timestamptz, (one + 1)::timestamptz);
                created := created || name;
            END LOOP;
        END LOOP;
        RETURN created;
    END $$
    """,
    # A partition that is in use is left for the next time, well before the deadlock detector would choose a victim.
    """
    CREATE FUNCTION drop_partitions(keep_days int) RETURNS text[] LANGUAGE plpgsql SET timezone = 'UTC'
    SET lock_timeout = '500ms' AS $$
    DECLARE
        dropped text[] := '{}';
        item record;
        oldest date;
        name text;
    BEGIN
        PERFORM pg_advisory_xact_lock(hashtext('millpond.partitions'));
        FOR item IN SELECT * FROM daily_tables() LOOP
            oldest := current_date - least(keep_days, item.longest_keep);
            FOR name IN
                SELECT child.relname FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
                WHERE inhparent = to_regclass(item.parent) AND child.relname ~ '_[0-9]{8}$'
                  AND to_date(right(child.relname, 8), 'YYYYMMDD') < oldest ORDER BY 1
            LOOP
                BEGIN
                    EXECUTE format('DROP TABLE %I', name);
                    dropped := dropped || name;
                EXCEPTION WHEN lock_not_available THEN
                    RAISE NOTICE 'partition % is in use, dropped next time', name;
                END;
            END LOOP;
        END LOOP;
        RETURN dropped;
    END $$
    """,
)


def upgrade() -> None:
    """Create everything, with the partitions of the next days."""
    for statement in TABLES:
        op.execute(statement)
    for table in ("calls", "hits", "top_keys", "applied"):
        op.execute(f"CREATE TABLE {table}_default PARTITION OF {table} DEFAULT")
    for statement in DAYS:
        op.execute(statement)
    op.execute("SELECT ensure_partitions(3)")


def downgrade() -> None:
    """Forward only."""
    raise NotImplementedError("the schema only moves forward: restore a backup to go back")
