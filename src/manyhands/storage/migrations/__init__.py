"""Alembic's environment and revisions, run by `storage.database.open_database`; there is no alembic.ini."""
