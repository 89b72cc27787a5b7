"""What a training reports every so many steps: losses, norms, speed, memory, and how long it will still take."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from manyhands.engine.step import Step
from manyhands.engine.world import World
from manyhands.errors import NotFinite

_SKIPPED_AT_MOST = 100  # steps in a row, after which leaving out is no cure
_PEAKS = (  # dense bf16 FLOP/s of tensor cores, from NVIDIA's data sheets
    ("B200", 2250e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 150e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("V100", 125e12),
    ("4090", 165e12),
    ("3090", 71e12),
)


@dataclass(slots=True, kw_only=True)
class Report:
    """Collects steps; `write` emits their mean. Reading a loss waits for the device, so it is done seldom."""

    emit: Callable[..., None]
    world: World
    total_steps: int
    samples_per_step: int
    tokens_per_step: int
    unit: str  # the task's name of what is counted as tokens
    flops_per_step: int | None  # of the whole training step on all devices; None where it is not counted
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    skipped: int = 0
    _in_a_row: int = 0
    _unread: list[tuple[int, Step, float]] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """The clock runs from now, unless it times steps that are not yet reported: what was before, such as an
        evaluation, is not training.
        """
        if not self._unread:
            self._since = time.perf_counter()

    def saw(self, number: int, step: Step, rate: float) -> None:
        """Step `number`, counted from 1, is done."""
        self._unread.append((number, step, rate))

    def pending(self) -> int:
        return len(self._unread)

    def step_s(self) -> float | None:
        """Seconds of a step so far; None before the first report."""
        return self.seconds * self.tokens_per_step / self.tokens if self.tokens else None

    def write(self) -> None:
        """Emit what has come since the last time. Raises NotFinite if a loss or a norm is not finite."""
        if not self._unread:
            return
        number, last, rate = self._unread[-1]
        losses = torch.stack([step.loss for _, step, _ in self._unread]).tolist()
        norms = [None if s.gradient_norm is None else float(s.gradient_norm) for _, s, _ in self._unread]
        done = [i for i, (_, step, _) in enumerate(self._unread) if not step.skipped]
        for i in done:
            self._check("loss", losses[i], self._unread[i][0])
            self._check("gradient's norm", norms[i], self._unread[i][0])
        now = time.perf_counter()
        elapsed, steps = now - self._since, len(losses)
        self.seconds += elapsed
        self.tokens += steps * self.tokens_per_step
        if done:
            self.loss = math.fsum(losses[i] for i in done) / len(done)
        self.skipped += steps - len(done)
        self._tell_skipped([number for number, step, _ in self._unread if step.skipped])
        self._in_a_row = 0 if done else self._in_a_row + steps
        if self._in_a_row >= _SKIPPED_AT_MOST:
            raise NotFinite(
                f"{self._in_a_row} steps in a row were left out, up to step {number}: no loss or gradient is finite "
                f"any more; lower local.optimizer.lr"
            )
        self.emit(
            "step",
            step=number,
            steps=self.total_steps,
            loss=self.loss,
            losses=self._parts([self._unread[i][1] for i in done]),
            learning_rate=rate,
            gradient_norm=norms[-1] if not last.skipped else None,
            tokens_per_s=round(steps * self.tokens_per_step / elapsed, 1),
            unit=self.unit,
            mfu=self._mfu(steps, elapsed),
            memory_bytes=memory_bytes(self.world.device),
            left_s=round((self.total_steps - number) * elapsed / steps, 1),
            skipped=self.skipped,
        )
        self._unread.clear()
        self._since = now

    def _parts(self, steps: list[Step]) -> dict[str, float]:
        """The means of the loss's parts over these steps."""
        names = steps[0].parts if steps else ()
        return {name: float(torch.stack([step.parts[name] for step in steps]).mean()) for name in names}

    def _mfu(self, steps: int, elapsed: float) -> float | None:
        """Model FLOPs utilization (Chowdhery et al. 2022, 2204.02311): of the peak of all devices."""
        peak = peak_flops(self.world.device)
        if self.flops_per_step is None or peak is None:
            return None
        return round(steps * self.flops_per_step / elapsed / (peak * self.world.size), 4)

    def _check(self, what: str, value: float | None, number: int) -> None:
        if value is None or math.isfinite(value):
            return
        raise NotFinite(
            f"the {what} is {value} at {self._batch(number)}: lower local.optimizer.lr, look at that data, or leave "
            f"such steps out with exec.on_nonfinite=skip"
        )

    def _tell_skipped(self, numbers: list[int]) -> None:
        if numbers:
            batches = ", ".join(map(self._batch, numbers))
            self.emit("warning", text=f"left out, since the loss or gradient is not finite: {batches}")

    def _batch(self, number: int) -> str:
        first = (number - 1) * self.samples_per_step
        return (
            f"step {number - 1} (samples {first} to {first + self.samples_per_step - 1} in the plan's order)"
        )


def optimizer_stats(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, float]]:
    """The 2-norm of each parameter, its gradient and its optimizer state, by parameter; all ranks take part."""
    stats = {}
    for name, parameter in model.named_parameters():
        figures = {"weight": _norm(parameter.detach())}
        if parameter.grad is not None:
            figures["gradient"] = _norm(parameter.grad)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and value.ndim:
                figures[key] = _norm(value)
        stats[name] = figures
    return stats


def _norm(tensor: torch.Tensor) -> float:
    norm: Any = torch.linalg.vector_norm(tensor.float())
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def memory_bytes(device: torch.device) -> int:
    """The most this process has had on the device so far; on a CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s in bf16 that the maker names for this device; None where we do not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS if re.search(rf"\b{part}\b", name)), None)
