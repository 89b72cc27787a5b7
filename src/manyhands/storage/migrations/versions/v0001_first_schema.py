"""The first schema: runs, events, effects, state snapshots, blobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _run_key() -> sa.Column[str]:
    return sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.run_id"), primary_key=True)


def _counter_key(name: str, kind: sa.Integer | sa.BigInteger) -> sa.Column[int]:
    return sa.Column(name, kind, primary_key=True, autoincrement=False)


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String(64), primary_key=True),
        sa.Column("descriptor", sa.Text, nullable=False),
        sa.Column("signature", sa.Text, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("phase", sa.String(32), nullable=False),
        sa.Column("outbox_from", sa.BigInteger, nullable=False),
        sa.Column("lease_epoch", sa.BigInteger, nullable=False),
        sa.Column("lease_owner", sa.Text),
        sa.Column("lease_renewed_ms", sa.BigInteger),
    )
    op.create_table(
        "events",
        _run_key(),
        _counter_key("sequence", sa.BigInteger()),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("now_ms", sa.BigInteger, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "effects",
        _run_key(),
        _counter_key("sequence", sa.BigInteger()),
        _counter_key("n", sa.Integer()),
        sa.Column("recipient", sa.String(64), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("effects_by_recipient", "effects", ["run_id", "recipient", "sequence", "n"])
    op.create_table(
        "state_snapshots",
        _run_key(),
        _counter_key("sequence", sa.BigInteger()),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "blobs",
        sa.Column("blob", sa.String(64), primary_key=True),
        _run_key(),
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("round", sa.BigInteger),
    )
    op.create_index("blobs_by_round", "blobs", ["run_id", "kind", "round"])


def downgrade() -> None:
    for name in ("blobs", "state_snapshots", "effects", "events", "runs"):
        op.drop_table(name)
