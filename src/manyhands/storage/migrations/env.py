"""Run by Alembic in the transaction that `open_database` holds: a failed migration leaves nothing behind."""

from __future__ import annotations

from alembic import context

from manyhands.storage.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,  # SQLite's DDL is transactional once BEGIN is ours, which it is
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
