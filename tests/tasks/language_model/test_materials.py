from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyhands.data.tokens import open_tokens
from manyhands.errors import DataError
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import TextSource, Tokenizer
from manyhands.tasks.language_model import FAMILY, LanguageModel

MakePlan = Callable[..., Plan]
TEXTS = [f"document number {i} about hands\n" * 3 for i in range(300)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": [*TEXTS, None]}), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def prepared(plan: Plan, directory: Path) -> tuple[LanguageModel, dict[str, Any]]:
    FAMILY.prepare(plan, directory)
    task = FAMILY.open(plan, directory)
    assert isinstance(task, LanguageModel)
    return task, json.loads((directory / "split.json").read_text())


def documents(task: LanguageModel, tokens: Any) -> list[str]:
    end = task.configuration["eos_token_id"]
    pieces = np.split(np.asarray(tokens), np.flatnonzero(np.asarray(tokens) == end) + 1)
    return [task.tokenizer.decode(piece[:-1].tolist()) for piece in pieces if len(piece)]


@pytest.mark.parametrize("kind", ["byte", "character", "bpe"])
def test_streamed_documents_become_tokens(kind: str, plan_for: MakePlan, rows: Path, tmp_path: Path) -> None:
    source = TextSource(kind="parquet", path=str(rows), on_broken="skip", validation_share=0.2)
    task, record = prepared(plan_for(kind, text=source), tmp_path / "out")
    training, validation = documents(task, task.training), documents(task, task.validation)
    assert len(training) + len(validation) == 300
    assert sorted([*training, *validation]) == sorted(TEXTS)
    assert len(validation) == record["validation"]["documents"] > 20
    assert record["training"]["bytes"] == sum(map(len, training))
    assert record["training"]["tokens"] == len(task.training)
    assert record["broken"] == {"count": 1, "named": ["rows.parquet:300"]}
    again, _ = prepared(plan_for(kind, text=source), tmp_path / "again")
    assert again.training.tolist() == task.training.tolist()


def test_a_cap_of_tokens_ends_with_a_document(plan_for: MakePlan, rows: Path, tmp_path: Path) -> None:
    source = TextSource(
        kind="parquet", path=str(rows), max_tokens=4000, validation_share=0.2, on_broken="skip"
    )
    task, record = prepared(plan_for("byte", text=source), tmp_path / "out")
    total = record["training"]["tokens"] + record["validation"]["tokens"]
    assert 4000 <= total < 4000 + max(map(len, TEXTS)) + 1
    found = [*documents(task, task.training), *documents(task, task.validation)]
    assert sorted(found) == sorted(TEXTS[: len(found)])


def test_too_few_documents_for_a_share(plan_for: MakePlan, rows: Path, tmp_path: Path) -> None:
    source = TextSource(kind="parquet", path=str(rows), max_documents=1, validation_share=0.01)
    with pytest.raises(DataError, match=r"0 tokens for validation, one sample needs 17"):
        prepared(plan_for("byte", text=source), tmp_path / "out")


def test_token_files_keep_their_ids(plan_for: MakePlan, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 257, 2000).astype("<u2")
    ids.tofile(tmp_path / "train.bin")
    source = TextSource(kind="tokens", path=str(tmp_path / "train.bin"), validation_share=0.1)
    task, record = prepared(plan_for("byte", text=source), tmp_path / "out")
    assert [*task.training.tolist(), *task.validation.tolist()] == ids.tolist()
    assert record["validation"]["tokens"] == 200
    assert "broken" not in record


def test_ids_outside_the_tokenizer_are_refused(plan_for: MakePlan, tmp_path: Path) -> None:
    """The file is named, and which token: here one of those at its end, which are for validation."""
    ids = np.full(2000, 5)
    ids[1990:] = 257
    np.save(tmp_path / "all.npy", ids)
    source = TextSource(kind="tokens", path=str(tmp_path / "all.npy"))
    with pytest.raises(
        DataError, match=r"all\.npy: token 1990 is 257, and the vocabulary has 257: name the tokenizer"
    ):
        prepared(plan_for(tokenizer=Tokenizer(kind="byte"), text=source), tmp_path / "out")


def test_broken_files_are_in_the_record(plan_for: MakePlan, text_directory: Path, tmp_path: Path) -> None:
    for file in text_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "bad.txt").write_bytes(b"\xff\xff")
    source = TextSource(path=str(tmp_path), validation_share=0.2, on_broken="skip")
    task, record = prepared(plan_for("byte", text=source), tmp_path / "out")
    assert record["broken"] == {"count": 1, "named": ["bad.txt"]}
    assert task.warnings == ("left out as broken (task.text.on_broken=skip): 1, which are bad.txt",)
    assert open_tokens(tmp_path / "out" / "train.tokens").size == record["training"]["tokens"]
