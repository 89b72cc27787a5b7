"""The materials that come of the text: train.tokens, validation.tokens, tokenizer.json and split.json.

Same plan and same source: same bytes of every material. Text files are held in memory, once; Parquet and data sets
of `datasets` are streamed; token files are copied piece by piece.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

from manyhands.data.streams import Broken, Side, streams
from manyhands.data.text import Document, read_corpus
from manyhands.data.token_files import in_chunks, read_token_files
from manyhands.data.tokens import TokenWriter, sample_count, write_tokens
from manyhands.errors import DataError
from manyhands.plan.language_model import LanguageModelTask
from manyhands.tasks.tokenizer import BPE_SAMPLE_CHARACTERS, RunTokenizer, encode, make_tokenizer

TRAIN_TOKENS, VALIDATION_TOKENS = "train.tokens", "validation.tokens"
TOKENIZER, SPLIT = "tokenizer.json", "split.json"
FILES: Final[dict[Side, str]] = {"training": TRAIN_TOKENS, "validation": VALIDATION_TOKENS}

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1024, 1_000_000
"""Of a stream, before they are tokenized together on all threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextMaterials:
    """What was written, beside the files."""

    tokenizer: RunTokenizer
    samples: int  # for training


def write_text_materials(task: LanguageModelTask, directory: Path) -> TextMaterials:
    """Read the text of `task`, make or load its tokenizer, write the four materials into `directory`.

    Raises DataError for a source or tokenizer that is missing, broken or too small, MissingExtra.
    """
    write = {"files": _from_files, "tokens": _from_tokens}.get(task.text.kind, _from_streams)
    tokenizer, record = write(task, directory)
    for side, name in FILES.items():
        tokens = record[side]["tokens"]
        if sample_count(tokens, task.block_size) == 0:
            raise DataError(
                f"task.text.path {task.text.path!r}: {tokens} tokens for {name.split('.')[0]}, one sample needs "
                f"{task.block_size + 1}: give more text, or make task.block_size smaller"
            )
    tokenizer.fast.save(str(directory / TOKENIZER), pretty=False)
    write_json(directory / SPLIT, {"version": 2, "kind": task.text.kind, "source": task.text.path} | record)
    samples = sample_count(record["training"]["tokens"], task.block_size)
    return TextMaterials(tokenizer=tokenizer, samples=samples)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------ text files
def _from_files(task: LanguageModelTask, directory: Path) -> tuple[RunTokenizer, dict[str, Any]]:
    # No tokenizer gives more tokens than bytes: this catches what cannot do before any work is done.
    corpus = read_corpus(task.text, minimum_bytes=task.block_size + 1)
    tokenizer = make_tokenizer(task.tokenizer, [document.text for document in corpus.training])
    record: dict[str, Any] = {"broken": {"count": len(corpus.broken), "named": list(corpus.broken)}}
    parts: dict[Side, tuple[Document, ...]] = {"training": corpus.training, "validation": corpus.validation}
    for side, documents in parts.items():
        chunks = encode(tokenizer, [document.text for document in documents])
        tokens = write_tokens(directory / FILES[side], chunks, tokenizer.size)
        record[side] = _files_record(documents, tokens)
    return tokenizer, record


def _files_record(documents: Iterable[Document], tokens: int) -> dict[str, Any]:
    """Where every byte of one side of the split came from."""
    files = [
        {"path": d.path, "start_byte": d.start_byte, "bytes": d.size_bytes, "sha256": d.sha256}
        for d in documents
    ]
    return {
        "documents": len(files),
        "bytes": sum(d.size_bytes for d in documents),
        "tokens": tokens,
        "sha256": hashlib.sha256("".join(str(file["sha256"]) for file in files).encode()).hexdigest(),
        "files": files,
    }


# ------------------------------------------------------------------------------ token files
def _from_tokens(task: LanguageModelTask, directory: Path) -> tuple[RunTokenizer, dict[str, Any]]:
    tokenizer = make_tokenizer(task.tokenizer, ())
    training, validation = read_token_files(task.text, tokenizer.size, task.block_size)
    record: dict[str, Any] = {}
    ends = (
        (task.text.path, len(training))
        if task.text.validation_path is None
        else (task.text.validation_path, 0)
    )
    sides: dict[Side, tuple[Any, str, int]] = {
        "training": (training, task.text.path, 0),
        "validation": (validation, *ends),
    }
    for side, (tokens, source, first) in sides.items():
        path = directory / FILES[side]
        count = write_tokens(path, in_chunks(tokens, tokenizer.size, source, first), tokenizer.size)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        record[side] = {"tokens": count, "sha256": digest}
    return tokenizer, record


# ------------------------------------------------------------------------------ streams
@dataclass(slots=True)
class _Part:
    """One side of a streamed split while it is being written."""

    file: TokenWriter
    documents: int = 0
    bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, text: str, ids: Any) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self.file.write(ids)
        self.documents += 1
        self.bytes += len(data)
        self.digest.update(hashlib.sha256(data).hexdigest().encode())

    def record(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.file.count,
            "sha256": self.digest.hexdigest(),
        }


def _from_streams(task: LanguageModelTask, directory: Path) -> tuple[RunTokenizer, dict[str, Any]]:
    """One pass. What a tokenizer is trained on is read ahead and kept until it is tokenized too."""
    broken = Broken()
    first, *others = streams(task.text, broken)
    ahead = list(_ahead(first, task.tokenizer.kind))
    tokenizer = make_tokenizer(task.tokenizer, [text for side, text in ahead if side == "training"])
    with ExitStack() as stack:
        parts: dict[Side, _Part] = {
            side: _Part(stack.enter_context(TokenWriter(directory / name, tokenizer.size)))
            for side, name in FILES.items()
        }
        for documents in (chain(ahead, first), *others):
            _write(documents, tokenizer, parts, task.text.max_tokens)
    record: dict[str, Any] = {side: part.record() for side, part in parts.items()}
    return tokenizer, record | {"broken": {"count": broken.count, "named": broken.named}}


def _ahead(documents: Iterator[tuple[Side, str]], kind: str) -> Iterator[tuple[Side, str]]:
    """What the tokenizer is made from: nothing, a sample, or, since each character must be known, all."""
    if kind in ("byte", "file"):
        return
    characters = 0
    for side, text in documents:
        yield side, text
        characters += len(text) if side == "training" else 0
        if kind == "bpe" and characters >= BPE_SAMPLE_CHARACTERS:
            return


def _write(
    documents: Iterable[tuple[Side, str]],
    tokenizer: RunTokenizer,
    parts: dict[Side, _Part],
    limit: int | None,
) -> None:
    """Tokenize documents batch by batch, until one of them reaches `limit` tokens of this stream."""
    written = 0
    for batch in _batches(documents):
        ids = encode(tokenizer, [text for _, text in batch])
        for (side, text), tokens in zip(batch, ids, strict=True):
            parts[side].add(text, tokens)
            written += len(tokens)
            if limit is not None and written >= limit:
                return


def _batches(documents: Iterable[tuple[Side, str]]) -> Iterator[Sequence[tuple[Side, str]]]:
    batch: list[tuple[Side, str]] = []
    characters = 0
    for side, text in documents:
        batch.append((side, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
