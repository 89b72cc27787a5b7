"""The tokenizers of the language model task: bytes, characters, byte-level BPE trained on the run's own text, or
one that exists already (tokenizer_files.py).

The first three are `tokenizers` objects, saved as one tokenizer.json that transformers loads; encoding a text and
decoding it again gives the text back (characters: those that the training text has). Deterministic: the same
documents give the same file, whatever the number of threads.

END stands behind every document and before a sample that starts from nothing; in a text of its own it is only
text. UNKNOWN exists for characters alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from manyhands.errors import DataError
from manyhands.plan.language_model import Tokenizer
from manyhands.tasks.tokenizer_files import load_tokenizer

END = "<|endoftext|>"
UNKNOWN = "<|unknown|>"

BPE_SAMPLE_CHARACTERS = 8_000_000
"""A trained vocabulary hardly changes with more text than this; training on it takes about a second."""
LARGEST_VOCABULARY = 65_536

_BATCH_CHARACTERS = 2_000_000  # per call: enough to keep the threads busy, little enough to stay in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTokenizer:
    """A tokenizer, and its token that ends a text."""

    fast: FastTokenizer
    end: str = END

    @property
    def size(self) -> int:
        """Token ids are below this."""
        return 1 + max(self.fast.get_vocab(with_added_tokens=True).values())

    @property
    def end_id(self) -> int:
        found = self.fast.token_to_id(self.end)
        assert found is not None, "make_tokenizer gives none without its end"
        return found


def make_tokenizer(settings: Tokenizer, documents: Sequence[str]) -> RunTokenizer:
    """The tokenizer of the wanted kind for these training documents, or from its file. Raises DataError if they
    cannot give one.
    """
    if settings.kind == "file":
        fast, end = load_tokenizer(settings.path or "", settings.end)
        return RunTokenizer(fast=fast, end=end)
    if settings.kind == "byte":
        tokenizer = _bytes()
    elif settings.kind == "character":
        tokenizer = _characters(documents)
    else:
        tokenizer = _byte_pairs(settings.vocabulary_size, documents)
    tokenizer.add_special_tokens([AddedToken(END, normalized=False, special=True)])
    return RunTokenizer(fast=tokenizer)


def encode(tokenizer: RunTokenizer, documents: Sequence[str]) -> Iterator[npt.NDArray[np.int64]]:
    """The ids of each document, END behind it, in order; several documents at a time on all threads."""
    fast = tokenizer.fast
    end = np.array([tokenizer.end_id], dtype=np.int64)
    fast.encode_special_tokens = True  # a document that contains "<|endoftext|>" does not end there
    try:
        for batch in _batches(documents):
            for encoding in fast.encode_batch_fast(batch, add_special_tokens=False):
                yield np.concatenate([np.asarray(encoding.ids, dtype=np.int64), end])
    finally:
        fast.encode_special_tokens = False


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bytes() -> FastTokenizer:
    """One token per byte: ids 0 to 255 are the bytes themselves."""
    tokenizer = FastTokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in that byte-level tokenizers use for each byte -> the byte (GPT-2's table).

    Printable Latin-1 bytes stand for themselves; the others, in order, for the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    stand_ins = {chr(byte): byte for byte in printable}
    return stand_ins | {chr(256 + position): byte for position, byte in enumerate(others)}


def _characters(documents: Sequence[str]) -> FastTokenizer:
    """One token per character of the training text, sorted; others become UNKNOWN."""
    characters = sorted(set().union(*(set(document) for document in documents)))
    if len(characters) + 2 > LARGEST_VOCABULARY:
        raise DataError(
            f"the training text has {len(characters)} different characters, at most {LARGEST_VOCABULARY - 2} "
            "can be tokens: use task.tokenizer.kind=bpe"
        )
    vocabulary = {UNKNOWN: 0} | {character: i for i, character in enumerate(characters, start=1)}
    tokenizer = FastTokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(UNKNOWN, normalized=False, special=True)])
    return tokenizer


def _byte_pairs(vocabulary_size: int, documents: Sequence[str]) -> FastTokenizer:
    """Byte-level BPE, trained on an even sample of the documents: the same share of each, from its start."""
    if vocabulary_size < 257:
        raise DataError(
            f"task.tokenizer.vocabulary_size is {vocabulary_size}: bpe needs 257 or more (256 bytes and the end "
            "of a text); use task.tokenizer.kind=byte for the smallest vocabulary"
        )
    share = min(1.0, BPE_SAMPLE_CHARACTERS / max(1, sum(map(len, documents))))
    sample = (document[: max(1, int(len(document) * share))] for document in documents)
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END],
        initial_alphabet=sorted(_byte_alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer
