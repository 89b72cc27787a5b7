"""Text that is tokens already: nanoGPT's .bin files and NumPy's .npy files, as they come from elsewhere.

A .bin file is uint16, little-endian, without a header, so any file of an even size could be one: that the ids
lie within the vocabulary is all that can be checked, and is (data/tokens.py). A .npy file is one-dimensional
and of integers; one that needs unpickling is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from manyhands.data.tokens import sample_count
from manyhands.errors import DataError
from manyhands.plan.language_model import TextSource

Integers = npt.NDArray[np.integer]

_CHUNK_TOKENS = 1 << 22
_LARGEST_UINT16 = 1 << 16


def read_token_files(source: TextSource, vocabulary_size: int, block_size: int) -> tuple[Integers, Integers]:
    """The training and the validation tokens, mapped, not loaded: of two files, or the end of one is for
    validation.

    Raises DataError for a file that is missing or no token file, that cannot hold the vocabulary, or that has not
    one sample for each part.
    """
    training = open_token_file(Path(source.path).expanduser(), vocabulary_size)
    if source.max_tokens is not None:
        training = training[: source.max_tokens]
    if source.validation_path is not None:
        validation = open_token_file(Path(source.validation_path).expanduser(), vocabulary_size)
    else:
        kept = max(block_size + 1, round(len(training) * source.validation_share))
        training, validation = training[:-kept], training[-kept:]
    for name, tokens in (("training", training), ("validation", validation)):
        if sample_count(len(tokens), block_size) == 0:
            raise DataError(
                f"task.text.path {source.path!r}: {len(tokens)} tokens for {name}, one sample needs "
                f"{block_size + 1}: give more, or make task.block_size smaller"
            )
    return training, validation


def open_token_file(path: Path, vocabulary_size: int) -> Integers:
    """The tokens of one file ([n], any integer dtype) as a read-only map. Raises DataError."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"token file {path}: {error.strerror}; give a .bin or .npy file") from error
    if path.suffix == ".npy":
        return _numpy_file(path)
    if path.suffix != ".bin":
        raise DataError(
            f"token file {path}: the name ends in {path.suffix!r}, expected .bin (uint16 without a header) or .npy; "
            "text needs task.text.kind=files"
        )
    if size % 2:
        raise DataError(f"token file {path} has {size} bytes: tokens of uint16 take two each; write it again")
    if vocabulary_size > _LARGEST_UINT16:
        raise DataError(
            f"token file {path} is uint16, which holds ids up to {_LARGEST_UINT16 - 1}, and the tokenizer has "
            f"{vocabulary_size}: give a .npy file of uint32"
        )
    return np.memmap(path, dtype="<u2", mode="r") if size else np.empty(0, np.uint16)


def in_chunks(tokens: Integers, vocabulary_size: int, file: str, first: int = 0) -> Iterator[Integers]:
    """A long array in pieces that fit into memory: the tokens of `file` from number `first` on.

    Raises DataError for one that is not in the vocabulary.
    """
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        if chunk.min() < 0 or chunk.max() >= vocabulary_size:
            place = int(np.argmax((chunk < 0) | (chunk >= vocabulary_size)))
            raise DataError(
                f"token file {file}: token {first + start + place} is {chunk[place]}, and the vocabulary has "
                f"{vocabulary_size}: name the tokenizer that it was made with (task.tokenizer), or write it again"
            )
        yield chunk


def _numpy_file(path: Path) -> Integers:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"token file {path} is no NumPy array: {error}; write it with numpy.save") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"token file {path} is {tokens.dtype} of shape {list(tokens.shape)}: expected one dimension of integers"
        )
    return np.asarray(tokens)
