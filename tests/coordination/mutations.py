"""Ten ways to break `tick`, each of which some test must find (test_mutations.py puts it to the test).

`file` is in src/manyhands/coordination/, `source` occurs in it exactly once, `found_by` in tests/coordination/.
When the code changes so that a snippet is gone, say the same mistake in the new words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    name: str
    breaks: str  # which invariant of the state machine
    file: str
    source: str
    replacement: str
    found_by: str


MUTATIONS = (
    Mutation(
        name="effects-numbered-across-events",
        breaks="1: an effect's id is (sequence, n), the same however events are put into ticks",
        file="machine.py",
        source="for n, effect in enumerate(step.effects)",
        replacement="for n, effect in enumerate(step.effects, start=len(effects))",
        found_by="test_properties.py",
    ),
    Mutation(
        name="deadlines-stay-after-a-restart",
        breaks="2: a restart of the server extends deadlines by the downtime",
        file="phases.py",
        source="deadline_ms=round_.deadline_ms + downtime",
        replacement="deadline_ms=round_.deadline_ms",
        found_by="test_phases.py",
    ),
    Mutation(
        name="refused-samples-vanish",
        breaks="3: free + assigned + pending + counted = total",
        file="data_ranges.py",
        source="*pending.pop(assignment, ()))",
        replacement="*pending.pop(assignment, ())[1:])",
        found_by="test_properties.py",
    ),
    Mutation(
        name="work-twice-in-a-round",
        breaks="3: nothing is done twice: one piece of work per client and round",
        file="rounds.py",
        source='all(entry.status == "given_back" and entry.lost for entry in own)',
        replacement='all(entry.status != "committed" for entry in own)',
        found_by="test_properties.py",
    ),
    Mutation(
        name="closing-stamped-again",
        breaks="4: a closing is immutable",
        file="closing.py",
        source="closing=round_.closing,",
        replacement="closing=__import__('dataclasses').replace(round_.closing, closed_ms=step.now_ms),",
        found_by="test_properties.py",
    ),
    Mutation(
        name="the-dead-are-waited-for",
        breaks="4: one dead client never costs the others a full timeout",
        file="closing.py",
        source="if any(is_present(clients.get(e.assignment.client)) for e in under_way):",
        replacement="if any(is_live(clients.get(e.assignment.client)) for e in under_way):",
        found_by="test_properties.py",
    ),
    Mutation(
        name="weight-as-claimed",
        breaks="5: weight comes from the assignment, never from the client's claim",
        file="closing.py",
        source="weight=entry.assignment.weight,",
        replacement="weight=entry.contribution.claims.samples if entry.contribution.claims else 1,",
        found_by="test_properties.py",
    ),
    Mutation(
        name="newcomers-miss-a-closing",
        breaks="6: joining works at any boundary: snapshot, then the rounds since",
        file="newcomers.py",
        source="if closed.closing.round >= latest.round)",
        replacement="if closed.closing.round > latest.round)",
        found_by="test_snapshots.py",
    ),
    Mutation(
        name="a-new-process-does-not-free-the-old-ones-range",
        breaks="6: a new boot supersedes a suspected session and frees its range at once",
        file="membership.py",
        source='release_work(step, key, "its client started again")',
        replacement="release_work(step, event.boot, event.label)",
        found_by="test_rounds.py",
    ),
    Mutation(
        name="half-of-the-witnesses",
        breaks="7: a contribution counts when a quorum (1, 2, 2, then floor(2n/3)) has it",
        file="agreement.py",
        source="max(2, 2 * n // 3)",
        replacement="max(2, n // 2)",
        found_by="test_agreement.py",
    ),
)
