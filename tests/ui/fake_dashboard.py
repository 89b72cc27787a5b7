"""A server with the real dashboard over invented runs, started by tests as a program: fake_dashboard.py PORT [MODE].

MODE: `still` (nothing changes), `live` (a round closes every 0.4 s), `empty` (no client, no round).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import sys
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from manyhands.node.view import RunSummary, RunView
from manyhands.ui.dashboard.router import dashboard_router

START_MS = 1_760_000_000_000
HOSTILE = "<img src=x onerror=document.title='owned'>"
LABELS = ["gpu-box", "lab-laptop", HOSTILE, ""]
TOTAL = 24


def key(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def loss_at(r: float) -> float:
    return 2.6 + 4.2 * math.exp(-r / 5)


def closed_round(r: int) -> dict[str, object]:
    here = [i for i in range(len(LABELS)) if not (i == 1 and 8 <= r < 12) and not (i == 3 and r < 5)]
    counted = [
        {"client": key(i), "loss": loss_at(r) + 0.12 * math.sin(3 * i + 1.7 * r), "weight": 360}
        for i in here
        if not (i == 2 and r == 15)
    ]
    uncounted = []
    if r == 8:
        uncounted.append({"client": key(1), "reason": "lost: no heartbeat for 30 s"})
    if r == 15:
        uncounted.append({"client": key(2), "reason": "refused: 3 values are not finite"})
    return {
        "round": r,
        "closed_ms": START_MS + 9_000 + 7_400 * (r + 1),
        "duration_ms": 7_400 + 300 * (r % 3),
        "mean_loss": sum(c["loss"] for c in counted) / len(counted),
        "tokens": 23_040 * len(counted),
        "counted": counted,
        "uncounted": uncounted,
        "fingerprint": key(100 + r)[:16],
    }


INCIDENTS = [
    {"ms": START_MS + 2_000, "client": key(0), "what": "joined", "round": 0},
    {"ms": START_MS + 2_400, "client": key(1), "what": "joined", "round": 0},
    {"ms": START_MS + 3_100, "client": key(2), "what": "joined", "round": 0},
    {"ms": START_MS + 46_000, "client": key(3), "what": "joined", "round": 5},
    {"ms": START_MS + 71_000, "client": key(1), "what": "suspected: no heartbeat for 2 s", "round": 8},
    {"ms": START_MS + 75_000, "client": key(1), "what": "lost: no heartbeat for 30 s", "round": 8},
    {"ms": START_MS + 96_000, "client": key(1), "what": "rejoined", "round": 12},
    {"ms": START_MS + 126_000, "client": key(2), "what": "refused: 3 values are not finite", "round": 15},
]


def view(closed: int, *, phase: str = "training", reason: str = "") -> RunView:
    rounds = [closed_round(r) for r in range(closed)]
    now = START_MS + 9_000 + 7_400 * closed + 3_200
    clients = []
    for i, label in enumerate(LABELS):
        mine = [c["loss"] for r in rounds for c in r["counted"] if c["client"] == key(i)]
        clients.append(
            {
                "key": key(i),
                "label": label,
                "status": "lost" if i == 1 and 8 <= closed < 12 else "ready",
                "suspected": i == 2 and closed == 18,
                "round": closed,
                "counted": len(mine),
                "uncounted": int(i in (1, 2) and closed > 15),
                "rejoined": int(i == 1 and closed > 12),
                "loss": mine[-1] if mine else None,
                "tokens_per_s": 5_230.0 - 1_100 * i,
                "bytes_up": 3_700_000 * len(mine),
                "bytes_down": 3_900_000 * closed + 4_000_000,
                "last_heard_ms": now - 400 - 130 * i,
            }
        )
    incidents = [i for i in INCIDENTS if i["round"] < max(closed, 1)]
    evaluations = [{"round": r, "loss": loss_at(r) + 0.14} for r in range(0, closed + 1, 4)]
    return RunView(
        run_id="stdlib-gpt-3fa9c1",
        name="stdlib-gpt",
        phase=phase,
        reason=reason,
        closed_rounds=closed,
        total_rounds=TOTAL,
        topology="star",
        preset="diloco",
        clients=clients,
        rounds=rounds,
        incidents=incidents,
        evaluations=evaluations,
        checkpoint="/home/ada/.local/share/manyhands/runs/stdlib-gpt-3fa9c1/checkpoints/round-16",
        started_ms=START_MS,
        now_ms=now,
    )


def empty_view() -> RunView:
    return view(0).model_copy(
        update={"clients": (), "rounds": (), "incidents": (), "evaluations": (), "phase": "waiting"}
    )


def other(name: str, run_id: str, **changes: object) -> RunView:
    return view(9).model_copy(update={"name": name, "run_id": run_id, **changes})


class FakeSource:
    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.closed = 2 if mode == "live" else 20

    def _all(self) -> dict[str, RunView]:
        main = empty_view() if self.mode == "empty" else view(self.closed)
        paused = other(
            "mesh-night",
            "mesh-night-77b2e0",
            topology="mesh",
            preset="fedsgd",
            phase="paused",
            reason="Three rounds in a row had no counted contribution. Resume with: manyhands server resume",
        )
        return {run.run_id: run for run in (main, paused)}

    def run(self, run_id: str) -> RunView:
        found = self._all().get(run_id)
        if found is None:
            raise HTTPException(404, f"no run '{run_id}' here")
        return found

    async def changes(self, run_id: str) -> AsyncIterator[str]:
        yield f"data: {self.run(run_id).model_dump_json()}\n\n"
        while self.mode == "live" and self.closed < TOTAL:
            await asyncio.sleep(0.4)
            known = self.run(run_id)
            self.closed += 1
            newer = self.run(run_id).since(known.closed_rounds, len(known.incidents))
            yield f"data: {newer.model_dump_json()}\n\n"
        while True:
            yield "event: beat\ndata:\n\n"
            await asyncio.sleep(1)


def application(source: FakeSource) -> FastAPI:
    app = FastAPI()

    @app.get("/api/runs")
    async def runs() -> list[RunSummary]:
        return [run.summary() for run in source._all().values()]

    @app.get("/api/runs/{run_id}")
    async def run(run_id: str) -> RunView:
        return source.run(run_id)

    @app.get("/api/runs/{run_id}/changes")
    async def changes(run_id: str) -> StreamingResponse:
        source.run(run_id)
        return StreamingResponse(source.changes(run_id), media_type="text/event-stream")

    app.include_router(dashboard_router())
    return app


def main() -> None:
    app = application(FakeSource(sys.argv[2] if len(sys.argv) > 2 else "still"))
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main()
