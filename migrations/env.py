"""Run by Alembic: apply the steps on the connection that `migrations.migrate` hands over, all in one transaction."""

from alembic import context

from migrations import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
