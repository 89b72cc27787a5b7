"""The tables, as the newest migration leaves them. A test compares both; only migrations create anything.

Bodies are JSON in Text columns, not the databases' JSON types: they are read back byte for byte, and NaN,
which a diverged loss may be, stays readable.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(64), primary_key=True),
    Column("descriptor", Text, nullable=False),  # as signed, byte for byte
    Column("signature", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("phase", String(32), nullable=False),  # for listings; the truth is in the log
    Column("outbox_from", BigInteger, nullable=False),  # effects of events before this one were dropped
    Column("lease_epoch", BigInteger, nullable=False),  # 0: never owned
    Column("lease_owner", Text),  # address; null: nobody
    Column("lease_renewed_ms", BigInteger),
)

events = Table(
    "events",
    metadata,
    Column("run_id", String(64), ForeignKey("runs.run_id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("now_ms", BigInteger, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("body", Text, nullable=False),
)

effects = Table(
    "effects",
    metadata,
    Column("run_id", String(64), ForeignKey("runs.run_id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("recipient", String(64), nullable=False),
    Column("body", Text, nullable=False),
    Index("effects_by_recipient", "run_id", "recipient", "sequence", "n"),
)

state_snapshots = Table(
    "state_snapshots",
    metadata,
    Column("run_id", String(64), ForeignKey("runs.run_id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
)

blobs = Table(
    "blobs",
    metadata,
    Column("blob", String(64), primary_key=True),
    Column("run_id", String(64), ForeignKey("runs.run_id"), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("round", BigInteger),  # the latest round that uses it; null: not of a round
    Index("blobs_by_round", "run_id", "kind", "round"),
)
