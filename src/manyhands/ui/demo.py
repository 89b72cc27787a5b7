"""`manyhands demo`: the main job in small, on this machine, with nothing faked.

Starts the same programs that anybody starts by hand (`manyhands server run`, `manyhands client train`), each in a
process and a MANYHANDS_HOME of its own, watches the run over the server's HTTP API, kills one client with SIGKILL on
the way, starts it again with the same key, and ends with what came of it. All of it is in one directory:

    plan.yaml  summary.json  loss.png  checkpoints (of server/)  logs/  keys/  server/ (its MANYHANDS_HOME)
    clients/hand-1/ ...
"""

from __future__ import annotations

import json
import math
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manyhands.config import HOME_VARIABLE, runs_directory
from manyhands.errors import Interrupted, ManyhandsError, ServerUnreachable, WorkerError
from manyhands.identity import keys
from manyhands.identity.keys import Identity
from manyhands.node import operator
from manyhands.node.view import RunView
from manyhands.plan.resolve import dump_plan
from manyhands.plan.schema import Plan
from manyhands.storage.durable import write_whole
from manyhands.ui.live import RunScreen
from manyhands.ui.plans import plan_from
from manyhands.ui.processes import MemoryWatch, Programs, free_port

POLL_S = 0.4
START_TIMEOUT_S = 240.0
"""For the server's first answer: it tokenizes the text and trains the tokenizer first."""
STALL_S = 180.0
"""So long without a closed round, a new phase or a new incident, and the demo gives up."""
MAX_TEXT_BYTES = 6_000_000
LOST_AFTER_S = 8.0
WARMUP_STEPS = 30
"""Or an eighth of all steps, where that is less."""
KEPT_ROUNDS = 3
"""A killed client is waited for when so many rounds are left: one is open, one may open meanwhile, one is for it."""
HOLD_REASON = "so short a run waits for the client that was killed"
SAMPLE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    clients: int = 3
    rounds: int = 16
    text: Path | None = None
    topology: Literal["star", "mesh"] = "star"
    port: int = 0
    directory: Path | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """The client that was killed and came back. `at_round`: closings when it was killed."""

    name: str
    key: str
    pid: int
    new_pid: int
    at_round: int
    rejoined_round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What came of it. `account`: the ledger's rounds, in their JSON form."""

    view: RunView
    killed: Killed
    account: list[dict[str, Any]]
    checkpoint: Path
    plot: Path
    sample: str
    address: str
    directory: Path
    seconds: float


def demo_plan(options: DemoOptions) -> Plan:
    """The config `demo` for this many clients; one of them may be away without the run waiting for it."""
    settings = [
        f"rounds.total={options.rounds}",
        f"rounds.lost_after_s={LOST_AFTER_S}",
        "schedule.warmup_steps=0",
        f"membership.min_clients={max(1, options.clients - 1)}",
        f"task.text.max_bytes={MAX_TEXT_BYTES}",
        f"topology={options.topology}",
    ]
    if options.text is not None:
        settings.append(f"task.text.path={json.dumps(str(options.text.resolve()))}")
    steps = plan_from("demo", [*settings, *options.overrides]).local.steps
    settings.append(f"schedule.warmup_steps={min(WARMUP_STEPS, options.rounds * steps // 8)}")
    return plan_from("demo", [*settings, *options.overrides])


class Demo:
    """One demo: `run` is its course, from the first process to the result. Use as a context manager."""

    def __init__(self, options: DemoOptions, screen: RunScreen) -> None:
        self.options, self.screen = options, screen
        self.plan = demo_plan(options)
        self.run_id = f"demo-{secrets.token_hex(3)}"
        self.directory = (options.directory or runs_directory() / self.run_id).resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.plan_file = self.directory / "plan.yaml"
        self.programs = Programs(self.directory / "logs")
        self.memory = MemoryWatch()
        self.address = ""
        self.keys: dict[str, str] = {}  # name -> public key
        self._held = False
        self._progress: tuple[object, ...] = ()
        self._progress_at = time.monotonic()

    def __enter__(self) -> Demo:
        self.memory.__enter__()
        self.programs.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is KeyboardInterrupt:
            self.screen.line("interrupted: ending server and clients; once more to leave at once")
        self.programs.__exit__(kind, *error)
        self.memory.__exit__(kind, *error)
        if kind is KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; plan, keys and logs of this demo are in {self.directory}"
            ) from None

    # ------------------------------------------------------------------ the course of things
    def run(self) -> DemoResult:
        started = time.monotonic()
        self.start()
        victim = f"hand-{min(2, self.options.clients)}"
        killed = self.kill_and_bring_back(victim)
        view = self.watch(lambda view: view.phase == "finished")
        account = operator.ledger(self.address, self.run_id)
        if view.checkpoint is None:
            raise WorkerError("the run is finished but names no checkpoint")
        plot = self.draw(view)
        return DemoResult(
            view=view,
            killed=killed,
            account=account,
            checkpoint=Path(view.checkpoint),
            plot=plot,
            sample=sample(Path(view.checkpoint), self.directory),
            address=self.address,
            directory=self.directory,
            seconds=time.monotonic() - started,
        )

    def start(self) -> None:
        """Server and clients."""
        self.plan_file.write_text(dump_plan(self.plan), encoding="utf-8")
        checkpoints = self.directory / "checkpoints"  # where any run has them
        checkpoints.unlink(missing_ok=True)
        checkpoints.symlink_to(Path("server", "runs", self.run_id, "checkpoints"), target_is_directory=True)
        self.start_server()
        for number in range(1, self.options.clients + 1):
            self.start_client(f"hand-{number}")

    def start_server(self) -> None:
        """Start it and wait for its first answer."""
        port = self.options.port or free_port()
        self.address = f"127.0.0.1:{port}"
        arguments = [
            "server",
            "run",
            "--plan",
            str(self.plan_file),
            "--port",
            str(port),
            "--run-id",
            self.run_id,
        ]
        self.programs.start("server", arguments, {HOME_VARIABLE: str(self.directory / "server")})
        self.screen.line(f"server starting at {self.address}; it reads and tokenizes the text first")
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            self.programs.check()
            try:
                operator.status(self.address, self.run_id)
            except ServerUnreachable:
                time.sleep(POLL_S)
            else:
                self.screen.line(f"dashboard at http://{self.address}/runs/{self.run_id}")
                return
        raise ServerUnreachable(
            f"the server did not answer at {self.address} within {START_TIMEOUT_S:.0f} s: "
            f"see {self.programs.log('server')}"
        )

    def start_client(self, name: str) -> int:
        """Start a client, with its key file if it has one; returns the pid."""
        key_file = self.directory / "keys" / f"{name}.key"
        identity = keys.load(key_file) if key_file.exists() else keys.create(key_file)
        self.keys[name] = identity.public
        home_of_client = self.directory / "clients" / name
        arguments = ["client", "train", "--run-id", self.run_id, "--server-addr", self.address]
        arguments += ["--identity-secret-key-path", str(key_file), "--label", name]
        arguments += ["--threads", str(max(1, (os.cpu_count() or 1) // self.options.clients))]
        arguments += ["--logs", "console", "--write-log", str(home_of_client / "events.jsonl")]
        return self.programs.start(name, arguments, {HOME_VARIABLE: str(home_of_client)})

    def kill_and_bring_back(self, name: str) -> Killed:
        """SIGKILL after a third of the rounds; start again once it is lost; wait until it has been merged again."""
        key = self.keys[name]
        third = max(1, self.options.rounds // 3)
        view = self.watch(
            lambda view: view.closed_rounds >= third and _counted(view, key) > 0, keep_rounds=True
        )
        at_round, known = view.closed_rounds, len(view.incidents)
        time.sleep(view.rounds[-1].duration_ms / 2000)  # so that it dies in the middle of its work
        pid = self.programs.kill(name)
        self.screen.line(f"killed {name} (process {pid}) with SIGKILL in round {at_round}")
        self.watch(lambda view: _happened(view, key, "lost", known), keep_rounds=True)
        new_pid = self.start_client(name)
        self.screen.line(f"started {name} again with the same key (process {new_pid})")
        self.watch(
            lambda view: _happened(view, key, "rejoined", known) and _status(view, key) == "ready",
            keep_rounds=True,
        )
        self.release()
        view = self.watch(lambda view: rejoined_round(view, key, at_round) is not None)
        back = rejoined_round(view, key, at_round)
        assert back is not None
        self.screen.line(f"{name} is back: merged again in round {back}")
        return Killed(name=name, key=key, pid=pid, new_pid=new_pid, at_round=at_round, rejoined_round=back)

    def hold(self, view: RunView) -> None:
        """Pause the run, as its operator may, when so few rounds are left that a client that is away would miss
        them all."""
        if (
            self._held
            or view.phase != "training"
            or view.closed_rounds < view.total_rounds - _kept_rounds(view)
        ):
            return
        self._held = True
        operator.pause(self.address, self.run_id, self._operator(), HOLD_REASON)

    def release(self) -> None:
        if self._held:
            self._held = False
            operator.resume(self.address, self.run_id, self._operator())

    def _operator(self) -> Identity:
        return operator.load_key(self.directory / "server" / "keys" / "operator.key")

    def watch(self, until: Callable[[RunView], bool], *, keep_rounds: bool = False) -> RunView:
        """Poll and show the run until `until(view)`.

        Raises when a program dies, the run fails or is over, or nothing moves.

        `keep_rounds`: pause the run before its last rounds (`hold`).
        """
        self._progress_at = time.monotonic()
        while True:
            self.programs.check()
            try:
                view = operator.status(self.address, self.run_id)
            except ServerUnreachable:  # busy; if it is gone, check() says so, and if it hangs, the stall does
                self._refuse_stall(self._progress)
                continue
            assert isinstance(view, RunView)
            self.screen.show(view)
            if until(view):
                return view
            if view.phase == "failed" or (view.phase == "paused" and not self._paused_by_us(view)):
                raise WorkerError(f"the run is {view.phase}: {view.reason}")
            if view.phase == "finished":
                raise ManyhandsError(
                    f"the run's {view.total_rounds} rounds were over before a client had been killed and merged "
                    "again: give it more of them (--rounds N), or longer ones (local.steps=N)"
                )
            if keep_rounds:
                self.hold(view)
            self._refuse_stall((view.phase, view.closed_rounds, len(view.incidents), len(view.evaluations)))
            time.sleep(POLL_S)

    def _paused_by_us(self, view: RunView) -> bool:
        return HOLD_REASON in view.reason

    def _refuse_stall(self, progress: tuple[object, ...]) -> None:
        if progress != self._progress:
            self._progress, self._progress_at = progress, time.monotonic()
        if time.monotonic() - self._progress_at > STALL_S:
            raise WorkerError(
                f"nothing has happened for {STALL_S:.0f} s, the last being phase and rounds {progress[:2]}: "
                f"see the logs in {self.directory / 'logs'}"
            )

    # ------------------------------------------------------------------ what is left at the end
    def draw(self, view: RunView) -> Path:
        from manyhands.ui.plot import loss_curve, points_of

        path = self.directory / "loss.png"
        loss_curve(points_of(view), path)
        return path

    def write_summary(self, result: DemoResult) -> Path:
        view, killed = result.view, result.killed
        summary = {
            "run_id": self.run_id,
            "topology": view.topology,
            "validation_loss_before": view.evaluations[0].loss if view.evaluations else None,
            "validation_loss_after": view.evaluations[-1].loss if view.evaluations else None,
            "rounds": view.closed_rounds,
            "clients": self.options.clients,
            "killed_client": killed.key,
            "killed_pid": killed.pid,
            "rejoined_pid": killed.new_pid,
            "rejoined_round": killed.rejoined_round,
            "checkpoint": str(result.checkpoint),
            "plot": str(result.plot),
            "sample": result.sample,
            "server_addr": self.address,
            "seconds": round(result.seconds, 2),
            "peak_rss_bytes": self.memory.peak_bytes,
        }
        path = self.directory / "summary.json"
        write_whole(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
        return path


def rejoined_round(view: RunView, key: str, killed_at: int) -> int | None:
    """The first round, opened after the kill, in which the client was merged after it had come back."""
    back_ms = [i.ms for i in view.incidents if i.client == key and i.what == "rejoined"]
    if not back_ms:
        return None
    for closed in view.rounds:
        merged = any(c.client == key for c in closed.counted)
        if merged and closed.round > killed_at and closed.closed_ms > back_ms[-1]:
            return closed.round
    return None


def _kept_rounds(view: RunView) -> int:
    """KEPT_ROUNDS, and those that short rounds let pass between two looks; at most what follows the kill."""
    unseen = math.ceil(2000 * POLL_S / max(1, view.rounds[-1].duration_ms)) if view.rounds else 0
    after_the_kill = view.total_rounds - max(1, view.total_rounds // 3) - 1
    return min(KEPT_ROUNDS + unseen, max(KEPT_ROUNDS, after_the_kill))


def _happened(view: RunView, key: str, what: str, known: int) -> bool:
    """Whether it happened to this client after the first `known` incidents."""
    return any(i.client == key and i.what == what for i in view.incidents[known:])


def _status(view: RunView, key: str) -> str:
    return next((client.status for client in view.clients if client.key == key), "")


def _counted(view: RunView, key: str) -> int:
    return sum(client.counted for client in view.clients if client.key == key)


def sample(checkpoint: Path, directory: Path) -> str:
    """Text from the checkpoint, loaded by transformers in a process of its own. Raises WorkerError."""
    code = (
        "import sys, json; from pathlib import Path; from manyhands.tasks.sample import sample_text; "
        "print(json.dumps(sample_text(Path(sys.argv[1]), prompt='def ', tokens=160)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=SAMPLE_TIMEOUT_S,
        cwd=directory,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if done.returncode != 0:
        raise WorkerError(f"transformers cannot load the checkpoint {checkpoint}:\n{done.stderr[-2000:]}")
    return str(json.loads(done.stdout.splitlines()[-1]))
