"""Token files: what a text becomes once, and what every step reads afterwards through a memory map.

Layout, little-endian: 8 bytes magic "MHTOKEN1", u32 width in bytes (2 or 4), u32 vocabulary size, u64
number of tokens, 8 zero bytes; then the tokens as u16 or u32. The header is completed when writing ends,
and the size of the file must fit it: a half-written or cut file is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

_MAGIC = b"MHTOKEN1"
_HEADER = struct.Struct("<8sIIQ8x")


def width_of(vocabulary_size: int) -> int:
    """Bytes per token: 2 where every id fits, else 4."""
    return 2 if vocabulary_size <= 1 << 16 else 4


class TokenWriter:
    """A token file that is being written, as a context: its header is completed when the context ends well."""

    def __init__(self, path: Path, vocabulary_size: int) -> None:
        self.count = 0
        self._path, self._vocabulary_size = path, vocabulary_size
        self._width = width_of(vocabulary_size)
        self._file: BinaryIO

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        self._file.write(bytes(_HEADER.size))
        return self

    def write(self, chunk: npt.ArrayLike) -> None:
        """Append ids (1-D integers). Raises DataError for an id that is not in the vocabulary."""
        ids = np.asarray(chunk, dtype=np.int64)
        if ids.size == 0:
            return
        if ids.min() < 0 or ids.max() >= self._vocabulary_size:
            raise DataError(
                f"{self._path.name}: token ids {ids.min()}..{ids.max()} do not lie within a vocabulary of "
                f"{self._vocabulary_size}: tokenizer and vocabulary size do not belong together"
            )
        self._file.write(ids.astype(f"<u{self._width}").tobytes())
        self.count += ids.size

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file as file:
            if kind is None:
                file.seek(0)
                file.write(_HEADER.pack(_MAGIC, self._width, self._vocabulary_size, self.count))


def write_tokens(path: Path, chunks: Iterable[npt.ArrayLike], vocabulary_size: int) -> int:
    """Write the ids of `chunks` (each 1-D integers) one after the other; returns how many tokens there are.

    Holds one chunk at a time. Raises DataError for an id that is not in the vocabulary.
    """
    with TokenWriter(path, vocabulary_size) as file:
        for chunk in chunks:
            file.write(chunk)
    return file.count


def open_tokens(path: Path) -> TokenArray:
    """The tokens of a file as a read-only map (uint16 or uint32, [n]). Raises DataError for a file that is
    not whole.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"token file {path}: {error.strerror}; prepare the task again") from error
    if len(head) < _HEADER.size or head[:8] != _MAGIC:
        raise DataError(
            f"{path} ({size} bytes) is no token file: it must start with {_MAGIC!r}; prepare the task again"
        )
    _, width, _, count = _HEADER.unpack(head)
    expected = _HEADER.size + width * count
    if width not in (2, 4) or size != expected:
        raise DataError(
            f"token file {path} has {size} bytes, its header says {expected} ({count} tokens of {width} "
            "bytes): it was cut or not finished; prepare the task again or fetch it again"
        )
    if count == 0:
        raise DataError(
            f"token file {path} holds no tokens: give more text (task.text.path, task.text.max_bytes)"
        )
    return np.memmap(path, dtype=f"<u{width}", mode="r", offset=_HEADER.size, shape=(count,))


def sample_count(tokens: int, block_size: int) -> int:
    """How many samples of `block_size` predictions there are: sample i needs one token beyond its block."""
    return max(0, (tokens - 1) // block_size)


def windows(tokens: TokenArray, indices: npt.NDArray[np.int64], block_size: int) -> npt.NDArray[np.int64]:
    """The samples `indices` ([n]) as int64 [n, block_size + 1]: sample i is tokens[i*block : i*block +
    block + 1].

    The first block_size of a row are inputs, the last block_size targets. Raises DataError for an index
    outside.
    """
    samples = sample_count(len(tokens), block_size)
    if indices.size and (indices.min() < 0 or indices.max() >= samples):
        raise DataError(
            f"sample indices {indices.min()}..{indices.max()} do not lie within the {samples} samples of "
            f"{block_size} tokens: the assignment belongs to other data; compare the run's materials"
        )
    offsets = indices[:, None] * block_size + np.arange(block_size + 1, dtype=np.int64)[None, :]
    return np.asarray(tokens[offsets], dtype=np.int64)
