"""How a client takes part. Nothing here is agreed with anybody else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from manyhands.engine.settings import Logging
from manyhands.identity.keys import Identity
from manyhands.node.view import ClientEvent
from manyhands.node.worker_group import RANK_TIMEOUT_S
from manyhands.node.worker_process import SILENCE_S

OnEvent = Callable[[ClientEvent], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """`data_parallelism` replicas of the model, each divided among `tensor_parallelism` devices, share the work, with
    a process for each device; `threads` are those of one process. `worker_silence_s`: after so long without a sign of
    life a worker process is killed and started again. `rank_timeout_s`: so long its processes wait for each other in
    the middle of a piece of work. `logging`: where figures of its training go beside its events."""

    server_addr: str
    run_id: str
    identity: Identity
    directory: Path | None = None  # default: MANYHANDS_HOME/runs/<run id>/<first 8 digits of the key>
    device: str = "auto"
    threads: int | None = None
    label: str = ""
    server_key: str | None = None
    micro_batch_size: int | None = None
    data_parallelism: int = 1
    tensor_parallelism: int = 1
    logging: Logging = field(default_factory=Logging)
    write_gradients_dir: Path | None = None
    allowed_tasks: tuple[str, ...] = ()
    patient: bool = False
    worker_silence_s: float = SILENCE_S
    rank_timeout_s: float = RANK_TIMEOUT_S
    on_event: OnEvent = field(default=lambda _: None)
    dummy_delay_s: float | None = None
