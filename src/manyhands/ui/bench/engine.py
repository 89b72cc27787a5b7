"""Measurements of training on devices of one's own, beside bare PyTorch loops of the same model in the same run.

Two things are compared by alternating them, several times, and taking the median of the ratios: the machine's mood
changes slower than that.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from manyhands.errors import WorkerError
from manyhands.plan.compose import compose
from manyhands.plan.schema import Plan
from manyhands.ui.bench.harness import Measured

CHARACTER_GPT = (
    "task.tokenizer.kind=character", "task.text.max_bytes=1000000", "task.block_size=64", "local.batch_size=12",
    "task.model={n_layer: 4, n_head: 4, n_embd: 128}", "evaluation.max_batches=1", "evaluation.every_snapshots=0",
)  # fmt: skip
GPT2_124M = (
    "task.tokenizer.kind=bpe", "task.tokenizer.vocabulary_size=50304", "task.text.max_bytes=6000000",
    "task.block_size=512", "local.batch_size=2", "task.model={n_layer: 12, n_head: 12, n_embd: 768}",
    "evaluation.max_batches=1", "evaluation.every_snapshots=0",
)  # fmt: skip


def engine_ratio() -> Measured:
    """Ours over a bare loop: the character GPT, one thread, 150 steps each, seven times."""
    plan = compose([*CHARACTER_GPT, "local.steps=150", "rounds.total=1"])
    return _ratio(plan, pairs=7, precision="fp32", threads=1)


def engine_ratio_124m() -> Measured:
    """The same with 124M parameters at 2 x 512 tokens in bf16, 4 steps each, five times."""
    plan = compose([*GPT2_124M, "local.steps=4", "rounds.total=1"])
    return _ratio(plan, pairs=5, precision="bf16", threads=os.cpu_count() or 1)


def _ratio(plan: Plan, *, pairs: int, precision: Any, threads: int) -> Measured:
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        ours = _Ours(plan, Path(name), precision)
        ours.rate()  # prepares, and warms up
        task = ours.task()
        rates = [(ours.rate(), _bare_rate(task, plan, precision)) for _ in range(pairs)]
    our, bare = (statistics.median(side) for side in zip(*rates, strict=True))
    ratios = ", ".join(f"{a / b:.3f}" for a, b in rates)
    return Measured(
        value=statistics.median(a / b for a, b in rates),
        floor=1.0,
        note=f"{our:,.0f} against {bare:,.0f} tokens/s with {threads} threads; pairs: {ratios}; load {_load()}",
    )


class _Ours:
    """`manyhands.train` of a plan, again and again, on materials that are made once."""

    def __init__(self, plan: Plan, directory: Path, precision: Any) -> None:
        self._plan, self._directory, self._precision = plan, directory, precision
        self._count = 0

    def rate(self) -> float:
        """Tokens/s between the first report and the last: what comes before the first warms up."""
        from manyhands.engine.run import train
        from manyhands.engine.settings import Checkpoints, EngineSettings, Execution, Logging

        place = self._directory / f"run-{self._count}"
        if self._count:
            place.mkdir()
            (place / "materials").symlink_to(self._directory / "run-0" / "materials")
        self._count += 1
        every = min(10, self._plan.local.steps // 4)
        times: list[float] = []
        train(
            self._plan,
            place,
            settings=EngineSettings(
                exec=Execution(precision=self._precision),
                logging=Logging(every_steps=every),
                checkpoints=Checkpoints(asynchronous=False),
            ),
            on_event=lambda event: times.append(time.perf_counter()) if event["kind"] == "step" else None,
        )
        samples = (len(times) - 1) * every * self._plan.local.batch_size
        return float(samples * self.task().tokens_per_sample() / (times[-1] - times[0]))

    def task(self) -> Any:
        return _opened(self._plan, self._directory / "run-0" / "materials")


class _Bare:
    """The loop that one would write by hand for the same model: nothing but torch and the tokens."""

    def __init__(self, task: Any, plan: Plan, precision: str) -> None:
        import torch

        torch.manual_seed(plan.seed)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._task, self._batch, self._precision = task, plan.local.batch_size, precision
        self._model = task.build_model().to(self._device)
        optimizer = plan.local.optimizer
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self._model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
                {"params": [p for p in self._model.parameters() if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            fused=True,
        )

    def step(self) -> Any:
        """One step on random windows; the loss, on the device."""
        import torch

        loss = self._loss(self._task.training)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return loss

    def _loss(self, tokens: Any) -> Any:
        """Of a batch of random windows."""
        import numpy as np
        import torch
        import torch.nn.functional as F

        block = self._task.block_size
        starts = torch.randint(len(tokens) - block - 1, (self._batch,)).tolist()
        windows = [torch.from_numpy(tokens[i : i + block + 1].astype(np.int64)) for i in starts]
        rows = torch.stack(windows).to(self._device)
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._precision == "bf16"):
            logits = self._model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), rows[:, 1:].reshape(-1))


def _bare_rate(task: Any, plan: Plan, precision: str) -> float:
    """Tokens/s of the bare loop, which reads its loss every ten steps."""
    bare = _Bare(task, plan, precision)
    bare.step()  # warms up
    started = time.perf_counter()
    for number in range(1, plan.local.steps + 1):
        loss = bare.step()
        if number % 10 == 0:
            loss.item()
    loss.item()
    tokens = plan.local.steps * plan.local.batch_size * task.tokens_per_sample()
    return float(tokens / (time.perf_counter() - started))


SHAKESPEARE = "MANYHANDS_SHAKESPEARE"
"""The environment's name of the file: all of Shakespeare's plays that nanoGPT's recipe is for."""


def shakespeare_char() -> Measured:
    """Validation loss of nanoGPT's recipe."""
    from manyhands.engine.run import train

    plan = _shakespeare_plan()
    if plan is None:
        return _NO_SHAKESPEARE
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        result = train(plan, Path(name))
    return Measured(
        value=result.validation_loss_after, note=f"{result.steps} steps; nanoGPT's own loop: 1.886"
    )


def shakespeare_char_time() -> Measured:
    """Time of the recipe from its first step to its end over that of nanoGPT's loop. Both evaluate 20 batches of the
    validation split and save every 250 steps; nanoGPT's evaluates as many of the training split too, and the note
    has the ratio without those. Ours is with making the other ready.

    Both run in this process and take turns: whenever ours has done an eighth of its steps, it waits in its listener
    while the other does as many, so that both meet the machine in the same mood.
    """
    import torch

    from manyhands.coordination.schedule import learning_rates
    from manyhands.engine.run import train
    from manyhands.ui.bench.nanogpt import EVALUATED_EVERY, NanoGpt

    plan = _shakespeare_plan()
    if plan is None:
        return _NO_SHAKESPEARE
    steps = plan.rounds.total * plan.local.steps
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        theirs: list[float] = []
        other: Any = None

        def in_turn(event: dict[str, Any]) -> None:
            """Half an eighth after what ours evaluates and saves, which goes on beside its steps."""
            nonlocal other
            if event["kind"] != "step" or event["step"] % EVALUATED_EVERY != EVALUATED_EVERY // 2 // 10 * 10:
                return
            if other is None:
                task = _opened(plan, Path(name) / "ours" / "materials")
                rates = [
                    r for first in range(0, steps, plan.local.steps) for r in learning_rates(plan, first)
                ]
                other = NanoGpt(task, rates, directory=Path(name) / "nanogpt")
            started = time.perf_counter()
            other.train(EVALUATED_EVERY)
            theirs.append(time.perf_counter() - started)

        times: dict[str, float] = {}

        def listen(event: dict[str, Any]) -> None:
            times.setdefault(event["kind"], time.perf_counter())
            in_turn(event)

        result = train(plan, Path(name) / "ours", on_event=listen)
        ours = times["finished"] - times["started"] - sum(theirs)
    return Measured(
        value=ours / sum(theirs),
        note=f"{ours:.1f} s and {result.validation_loss_after:.4f} against {sum(theirs):.1f} s and "
        f"{other.validation_loss:.4f}; {ours / (sum(theirs) - other.training_split_s):.3f} without nanoGPT's "
        f"evaluations of the training split; {torch.get_num_threads()} threads; load {_load()}",
    )


_NO_SHAKESPEARE = Measured(value=None, note=f"set {SHAKESPEARE} to the file input.txt of tinyshakespeare")


def _shakespeare_plan() -> Plan | None:
    path = os.environ.get(SHAKESPEARE)
    return compose([f"task.text.path={path}"], config_name="shakespeare_char") if path else None


def _opened(plan: Plan, materials: Path) -> Any:
    from manyhands.tasks.registry import family_of

    return family_of(plan).open(plan, materials)


def ddp_speedup() -> Measured:
    """Two processes with one thread each against one with one thread, batch 48 x 64, five alternated pairs.

    The floor is what the cores give to two trainings of half the batch that have nothing to do with each other.
    """
    common = [*CHARACTER_GPT, "local.steps=60", "rounds.total=1", "exec.threads=1"]
    whole, half = [*common, "local.batch_size=48"], [*common, "local.batch_size=24"]
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        pairs, apart = [], []
        for number in range(5):
            directory = Path(name) / str(number)
            (two,) = _trained_rates(directory / "two", [*whole, "processes=2"])
            (one,) = _trained_rates(directory / "one", whole)
            pairs.append((two, one))
            apart.append(sum(_trained_rates(directory / "apart", half, half)) / one)
    ones = statistics.median(one for _, one in pairs)
    return Measured(
        value=statistics.median(two / one for two, one in pairs),
        floor=statistics.median(apart),
        note=f"{ones:,.0f} tokens/s with one; pairs: {', '.join(f'{a / b:.2f}' for a, b in pairs)}; floor: two "
        f"processes that exchange nothing; load {_load()}",
    )


def _trained_rates(directory: Path, *trainings: list[str]) -> list[float]:
    """Of trainings at the same time: the median of the tokens/s that each reports, the first report left out."""
    command = [sys.executable, "-m", "manyhands", "train", "--logs", "none"]
    places = [directory / str(number) for number in range(len(trainings))]
    started = [
        subprocess.Popen(
            [*command, "--directory", str(place), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place, words in zip(places, trainings, strict=True)
    ]
    rates = []
    for place, process in zip(places, started, strict=True):
        try:
            error = process.communicate(timeout=300)[1]
        finally:
            process.kill()
        if process.returncode:
            raise WorkerError(f"a training of the benchmark failed:\n{error[-2000:]}")
        events = [json.loads(line) for line in (place / "events.jsonl").read_text().splitlines()]
        steps = [event["tokens_per_s"] for event in events if event["kind"] == "step"]
        rates.append(float(statistics.median(steps[1:])))
    return rates


def loader_ratio() -> Measured:
    """How much faster samples are made than the step consumes them: the character GPT's batches."""
    from manyhands.engine.loading import micro_batches, step_indices
    from manyhands.engine.world import ALONE

    plan = compose([*CHARACTER_GPT, "local.steps=60", "rounds.total=1"])
    size = plan.local.batch_size
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        ours = _Ours(plan, Path(name), "fp32")
        ours.rate()
        task = ours.task()

        def load(steps: int) -> None:
            for indices in step_indices(task, 0, size, steps, plan.seed, ALONE):
                micro_batches(task, indices, None)

        load(1)
        started = time.perf_counter()
        load(400)
        loads_per_s = 400 / (time.perf_counter() - started)
        steps_per_s = ours.rate() / (size * task.tokens_per_sample())
    return Measured(
        value=loads_per_s / steps_per_s,
        note=f"{loads_per_s:,.0f} batches/s against {steps_per_s:.1f} steps/s, one thread loading",
    )


def _load() -> str:
    return "/".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
