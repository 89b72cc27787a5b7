"""GPT-2 124M at 1,024 tokens on one CUDA device: bf16, compiled. Prints tokens/s, MFU and memory as JSON.

    python benchmarks/gpt2_124m.py [--tiny]

Needs a CUDA device; --tiny tries the script itself on whatever there is, with a model whose figures mean nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from manyhands.engine.configuration import configure
from manyhands.engine.run import train

GPT2 = (
    "model=gpt2_124m", "task.tokenizer.vocabulary_size=50304", "local.batch_size=480", "local.steps=60",
    "rounds.total=1", "parallel.micro_batch_size=32", "exec.precision=bf16", "exec.compile=default",
    "logging.every_steps=5", "evaluation.max_batches=1", "evaluation.every_snapshots=0",
)  # fmt: skip
TINY = (
    "model=gpt2_tiny", "task.text.max_bytes=500000", "local.batch_size=12", "local.steps=40", "rounds.total=1",
    "exec.precision=bf16", "logging.every_steps=5", "evaluation.max_batches=1", "evaluation.every_snapshots=0",
)  # fmt: skip


def main() -> None:
    tiny = "--tiny" in sys.argv
    if not tiny and not torch.cuda.is_available():
        print("skipped: no CUDA device here")
        return
    configuration = configure(TINY if tiny else GPT2)
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        train(
            configuration.plan,
            Path(directory),
            settings=configuration.settings,
            on_event=lambda event: reports.append(event) if event["kind"] == "step" else None,
        )
    settled = reports[3:]  # what comes before compiles
    figures = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "tokens_per_s": statistics.median(report["tokens_per_s"] for report in settled),
        "mfu": settled[-1]["mfu"],
        "memory_bytes": settled[-1]["memory_bytes"],
        "loss": settled[-1]["loss"],
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
