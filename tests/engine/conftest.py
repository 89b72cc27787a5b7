"""A tiny language model over made-up text, prepared once; work on it is a matter of milliseconds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manyhands.coordination.schedule import learning_rates
from manyhands.coordination.types import Assignment, OuterTerms, RoundTerms
from manyhands.data.ranges import ranges_between
from manyhands.plan.schema import InnerOptimizer, LocalWork, Plan, Rounds, Schedule
from manyhands.plan.tasks import LanguageModelTask, TextSource, Tokenizer
from manyhands.tasks.protocol import Prepared, Task
from manyhands.tasks.registry import family_of


@dataclass(frozen=True)
class World:
    plan: Plan
    prepared: Prepared
    directory: Path

    def task(self) -> Task:
        return family_of(self.plan).open(self.plan, self.directory)

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.prepared.first_weights)

    def with_local(self, **changes: object) -> Plan:
        return self.plan.model_copy(update={"local": self.plan.local.model_copy(update=changes)})

    def with_optimizer(self, **changes: object) -> Plan:
        return self.with_local(optimizer=self.plan.local.optimizer.model_copy(update=changes))

    def work(self, round_number: int, steps: int | None = None) -> tuple[Assignment, RoundTerms]:
        """The assignment that one client alone would get in that round, and the round's terms."""
        plan = self.plan
        steps = steps or plan.local.steps
        first = round_number * plan.local.steps
        start = first * plan.local.batch_size
        assignment = Assignment(
            id=f"{round_number}-0",
            round=round_number,
            client="ab" * 32,
            steps=steps,
            batch_size=plan.local.batch_size,
            ranges=ranges_between(start, start + steps * plan.local.batch_size, self.prepared.samples),
            weight=1,
            seed=1000 + round_number,
        )
        terms = RoundTerms(
            round=round_number,
            fragment=0,
            first_step=first,
            learning_rates=learning_rates(plan, first),
            outer=OuterTerms(lr=1.0),
            deadline_ms=0,
        )
        return assignment, terms


def made_up_text(characters: int) -> str:
    words = ["one", "two", "three", "many", "hands", "make", "light", "work"]
    generator = random.Random(4)
    text = " ".join(generator.choice(words) for _ in range(characters // 4))
    return text[:characters]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    (root / "text.txt").write_text(made_up_text(12_000), encoding="utf-8")
    plan = Plan(
        seed=7,
        task=LanguageModelTask(
            model={"n_layer": 2, "n_head": 2, "n_embd": 16},
            block_size=16,
            text=TextSource(path=str(root / "text.txt"), validation_share=0.1),
            tokenizer=Tokenizer(kind="character"),
        ),
        local=LocalWork(steps=3, batch_size=4, optimizer=InnerOptimizer(lr=3e-3)),
        schedule=Schedule(kind="cosine", warmup_steps=4),
        rounds=Rounds(total=4, snapshot_every=2),
    )
    prepared = family_of(plan).prepare(plan, root / "materials")
    return World(plan=plan, prepared=prepared, directory=root / "materials")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def same() -> Callable[[object, object], bool]:
    """Whether two mappings of tensors are equal to the last bit."""

    def compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return one.keys() == other.keys() and all(
            one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
        )

    return compare  # type: ignore[return-value]
