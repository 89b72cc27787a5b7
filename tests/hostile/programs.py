"""The programs of these tests: a server with its honest clients, and a client that does as it pleases."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from manyhands.coordination.effects import CatchUp, Closed, Reveal, TakeSnapshot, Work
from manyhands.coordination.events import Committed, Contributed, Left, Ready, Verdict, WorkFailed
from manyhands.coordination.types import BlobRef, Claims, Contribution
from manyhands.identity.contributions import commit, new_nonce, sign_contribution
from manyhands.identity.keys import Identity, ephemeral
from manyhands.network.blobs.manifest import manifest_of
from manyhands.network.blobs.transfer import upload
from manyhands.network.connection import Connection, Terms
from manyhands.network.messages import Opening
from manyhands.plan.descriptor import RunDescriptor
from manyhands.tasks.dummy import DummyWork

COMMAND = str(Path(sys.executable).with_name("manyhands"))
LONG_S = 60.0
SOON_MS = 15_000
"""Half of the shortest deadline; a round takes a fifth of a second when nobody is waited for."""

PLAN: dict[str, Any] = {
    "name": "besieged",
    "run_id": "run",
    "task": {"name": "dummy", "parameters": 3_000, "tensors": 2, "samples": 1_000_000, "delay_s": 0.1},
    "local": {"steps": 2, "batch_size": 4},
    "membership": {"min_clients": 1},
    "evaluation": {"every_snapshots": 0},
    "rounds": {
        "total": 1_000_000,
        "snapshot_every": 1000,
        "keep_updates": 20,
        "min_work_share": 1.0,
        "first_deadline_s": 60.0,
        "deadline_floor_s": 30.0,
    },
}


class Besieged:
    """The server and its honest clients. `changes`: to the plan, by section."""

    def __init__(self, place: Path, honest: int = 1, **changes: Any) -> None:
        sections = {name: {**PLAN[name], **changes[name]} for name in changes if name in PLAN}
        self.place, self.plan = place, {**PLAN, **changes, **sections}
        self.names = [f"honest{number}" for number in range(honest)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.programs: list[subprocess.Popen[bytes]] = []
        self.honest: list[str] = []

    def begin(self) -> None:
        place = self.place
        (place / "plan.yaml").write_text(yaml.safe_dump(self.plan))
        self.start("server", "server", "run", "--plan", str(place / "plan.yaml"), "--port", str(self.port))
        self.until(lambda: self.view() or self.programs[0].poll() is not None, "the server to answer")
        assert self.programs[0].poll() is None, self.log("server")
        for name in self.names:
            self.begin_client(name)
        if self.names:
            self.until(lambda: self.closed() >= 2, "the first rounds")

    def begin_client(self, name: str) -> None:
        key = self.place / f"{name}.key"
        made = subprocess.run(
            [COMMAND, "client", "new-identity", "--identity-secret-key-path", str(key)],
            capture_output=True,
            text=True,
            check=True,
            env=self.environment("server"),
        )
        self.honest.append(made.stdout.strip())
        self.start(
            name, "client", "train", "--run-id", "run", "--server-addr", self.address,
            "--identity-secret-key-path", str(key), "--logs", "json",
        )  # fmt: skip

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def environment(self, home: str) -> dict[str, str]:
        return {**os.environ, "MANYHANDS_HOME": str(self.place / home)}

    def start(self, name: str, *arguments: str) -> None:
        with (self.place / f"{name}.log").open("ab") as output:
            self.programs.append(
                subprocess.Popen(
                    [COMMAND, *arguments],
                    stdout=output,
                    stderr=output,
                    stdin=subprocess.DEVNULL,
                    env=self.environment(name),
                    start_new_session=True,
                )
            )

    def log(self, name: str) -> str:
        return (self.place / f"{name}.log").read_text(errors="replace")

    def end(self) -> None:
        for program in self.programs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()

    @staticmethod
    def until(ready: Callable[[], Any], what: str, within_s: float = LONG_S) -> Any:
        end = time.monotonic() + within_s
        while not (answer := ready()):
            assert time.monotonic() < end, f"waited {within_s:.0f} s for {what}"
            time.sleep(0.05)
        return answer

    # ------------------------------------------------------------------ what the server says
    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=10) as answer:
            return json.load(answer)

    def view(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            answer: dict[str, Any] = self.get("/api/runs/run")
            return answer
        return {}

    def closed(self) -> int:
        return int(self.view().get("closed_rounds", -1))

    def round(self, number: int) -> dict[str, Any]:
        """The ledger's account of a round, waited for."""
        self.until(lambda: self.closed() > number, f"round {number} to close", SOON_MS / 1000)

        def row() -> dict[str, Any] | None:
            return next((row for row in self.get("/api/runs/run/ledger") if row["number"] == number), None)

        found: dict[str, Any] = self.until(row, f"round {number} in the ledger")
        return found

    def work_of(self, number: int, client: str) -> dict[str, Any]:
        """What the ledger says of a client's assignment in a round; the round must have closed soon."""
        row = self.round(number)
        assert row["published_ms"] - row["opened_ms"] < SOON_MS, "the round has waited for its deadline"
        (work,) = [work for work in row["works"] if work["assignment"]["client"] == client]
        counted = [c["client"] for c in row["closing"]["counted"]]
        assert set(self.honest) <= set(counted), f"an honest client was not counted in round {number}"
        assert (client in counted) == work["counted"]
        return dict(work)

    def check_it_goes_on(self) -> None:
        """All programs are there, and two more rounds close with the honest clients' work."""
        for program, name in zip(self.programs, ("server", *self.names), strict=True):
            assert program.poll() is None, self.log(name)[-3000:]
        number = self.closed() + 1
        row = self.round(number)
        assert set(self.honest) <= {c["client"] for c in row["closing"]["counted"]}


class Hostile:
    """A client that signs in and says it is ready; what it does with its work is up to the test.

    `verdict`: what it says of every update that is revealed in a mesh, whatever it is; None: nothing.
    """

    def __init__(self, besieged: Besieged, place: Path) -> None:
        self.besieged, self.place = besieged, place
        self.identity: Identity = ephemeral()
        self.works: asyncio.Queue[Work] = asyncio.Queue()
        self.verdict: bool | None = None
        self.snapshots_asked: asyncio.Queue[int] = asyncio.Queue()
        self.last_sequence = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        terms = Terms(
            address=besieged.address,
            run_id="run",
            identity=self.identity,
            label="x",
            check_server=lambda _: None,
        )
        self.connection = Connection(terms=terms, on_state=lambda *_: None)
        self._reading = asyncio.create_task(self._read())

    @property
    def key(self) -> str:
        return self.identity.public

    async def _read(self) -> None:
        try:
            async for delivery in self.connection.deliveries():
                self.last_sequence = delivery.id[0]
                match delivery.body:
                    case CatchUp():
                        asyncio.create_task(self._ready(delivery.body.round))  # noqa: RUF006
                    case Closed():
                        asyncio.create_task(self._ready(delivery.body.closing.round + 1))  # noqa: RUF006
                    case Reveal() if self.verdict is not None:
                        for shown in delivery.body.contributions:
                            asyncio.create_task(self.judge(shown.round, shown.assignment, self.verdict))  # noqa: RUF006
                    case TakeSnapshot():
                        self.snapshots_asked.put_nowait(delivery.body.round)
                    case Work():
                        self.works.put_nowait(delivery.body)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    async def _ready(self, at: int) -> None:
        with contextlib.suppress(Exception):
            await self.connection.ask(Ready(client=self.key, round=at))

    async def judge(self, number: int, assignment: str, accepted: bool) -> None:
        reason = "" if accepted else "I do not like it"
        await self.connection.ask(
            Verdict(by=self.key, round=number, assignment=assignment, accepted=accepted, reason=reason)
        )

    async def leave(self) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.connection.ask(Left(client=self.key, how="left", reason="bye")), 2)
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        if self.ended.done():
            self.ended.exception()
        await self.connection.close()

    # ------------------------------------------------------------------ as an honest one does it
    @property
    def descriptor(self) -> RunDescriptor:
        assert self.connection.welcome is not None
        return RunDescriptor.model_validate_json(self.connection.welcome.descriptor)

    async def work(self) -> Work:
        """The next piece of work, as new as can be."""
        work = await self.works.get()
        while not self.works.empty():
            work = self.works.get_nowait()
        return work

    async def give_back(self, work: Work) -> None:
        failed = WorkFailed(client=self.key, assignment=work.assignment.id, reason="no")
        await self.connection.ask(failed)

    def honest_update(self, work: Work) -> tuple[Path, Claims]:
        path = self.place / f"{work.assignment.id}.safetensors"
        descriptor = self.descriptor
        claims = DummyWork(descriptor.plan, descriptor.parameters).write_update(work.assignment, path)
        assert claims is not None
        return path, claims

    async def commit(self, work: Work, update: BlobRef) -> tuple[str, str]:
        """Commit to an update; commit and nonce."""
        assignment, nonce = work.assignment, new_nonce()
        made = commit("run", assignment.round, self.key, assignment.id, update.blob, nonce)
        committed = Committed(client=self.key, round=assignment.round, assignment=assignment.id, commit=made)
        await self.connection.ask(committed)
        return made, nonce

    async def open(self, work: Work, update: BlobRef, nonce: str) -> None:
        assignment = work.assignment
        await self.connection.ask(
            Opening(assignment=assignment.id, round=assignment.round, update=update, nonce=nonce)
        )

    async def send(self, path: Path) -> None:
        await upload(self.connection.http, self.connection.holder, path)

    def signed(
        self, work: Work, update: BlobRef, made: str, nonce: str, claims: Claims, by: Identity | None = None
    ) -> Contribution:
        contribution = Contribution(
            assignment=work.assignment.id,
            round=work.assignment.round,
            client=(by or self.identity).public,
            commit=made,
            update=update,
            nonce=nonce,
            claims=claims,
        )
        return replace(contribution, signature=sign_contribution(by or self.identity, "run", contribution))

    async def contribute(self, work: Work, path: Path, claims: Claims) -> Contribution:
        """All the steps in their order, with whatever file that is."""
        update = (await asyncio.to_thread(manifest_of, path)).ref
        made, nonce = await self.commit(work, update)
        await self.open(work, update, nonce)
        await self.send(path)
        contribution = self.signed(work, update, made, nonce, claims)
        await self.connection.ask(Contributed(contribution=contribution))
        return contribution

    # ------------------------------------------------------------------ by hand
    async def say(self, text: str | bytes) -> None:
        """Anything at all, on the socket."""
        socket = self.connection._socket
        assert socket is not None
        await (socket.send_bytes(text) if isinstance(text, bytes) else socket.send_str(text))

    async def request(
        self, method: str, path: str, body: bytes | None = None, token: str | None = None
    ) -> tuple[int, str]:
        """Status and text of one HTTP request, with this session's token or another one."""
        headers = dict(self.connection.holder.headers)
        if token is not None:
            headers["Authorization"] = token
        url = f"http://{self.besieged.address}{path}"
        data = None if body is None else io.BytesIO(body)
        async with self.connection.http.request(method, url, data=data, headers=headers) as answer:
            return answer.status, await answer.text()

    async def declare(
        self, path: str, length: int, part: bytes = b""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Begin a PUT whose body is said to have that length, and send a part of it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.besieged.port)
        token = self.connection.holder.headers["Authorization"]
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nContent-Length: {length}\r\n\r\n"
        writer.write(head.encode() + part)
        await writer.drain()
        return reader, writer
