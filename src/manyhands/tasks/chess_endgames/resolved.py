"""The truth of whole endings of up to four men as arrays: made once from Syzygy's files, kept, and mapped.

What the arrays hold is in children.py. Values are the file's after captures have been looked at (where one is best, a
file may hold anything that is no better), so that to look one up is one read. Distances are the file's for the side
that it stores, and one ply of search for the other.

They lie in MANYHANDS_HOME/cache/syzygy, in names that end in a hash of the files they were made from: written aside
and renamed, by one process at a time. 16 MiB (values) and 32 MiB (distances) for a side of a four-man ending.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.config import home
from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.children import Distances, Values
from manyhands.tasks.chess_endgames.pieces import Ending, ending, reachable
from manyhands.tasks.chess_endgames.resolving import resolve_distances, resolve_values
from manyhands.tasks.chess_endgames.syzygy import read_table

MOST_MEN = 4
"""Of endings that are resolved: five men would be 64 times the size."""
_FORM = "1"
"""In the hash: changes with what the arrays hold."""


log = logging.getLogger(__name__)


class Resolved:
    """The arrays of a directory of tables, opened as they are asked for. May be asked by several threads."""

    def __init__(self, tables: Path, cache: Path | None = None) -> None:
        """`cache`: where the arrays lie, by default MANYHANDS_HOME/cache/syzygy."""
        self._tables = tables
        self._cache = cache if cache is not None else home() / "cache" / "syzygy"
        self._turn = threading.RLock()
        self._values: dict[tuple[str, str], Values] = {}
        self._distances: dict[tuple[str, str], Distances] = {}
        self._hashes: dict[str, str] = {}

    def values(self, own: str, other: str) -> Values:
        """Of the positions where the mover has `own`. Raises DataError where a file is missing or broken, and where
        the arrays cannot be kept."""
        with self._turn:
            if (own, other) not in self._values:
                self._values[own, other] = self._open_values(own, other)
            return self._values[own, other]

    def distances(self, own: str, other: str) -> Distances:
        """Likewise."""
        with self._turn:
            if (own, other) not in self._distances:
                pieces = ending(own, other)
                if pieces.men == 2:
                    return np.zeros(64**2, dtype=np.int16)
                for side, found in zip(pieces.sides, self._open_distances(pieces), strict=True):
                    self._distances[side] = found
            return self._distances[own, other]

    def _open_values(self, own: str, other: str) -> Values:
        pieces = ending(own, other)
        if pieces.men == 2:
            return resolve_values(own, other, None, self.values)
        path = self._cache / f"{own}-{other}-values-{self._hash(pieces, '.rtbw')}.npy"
        with _made_once(path):
            if not path.exists():
                table = read_table(self._tables / f"{pieces.table}.rtbw")
                log.info("decoding the values of %s into %s, once", pieces.table, path)
                _keep(path, resolve_values(own, other, table, self.values))
        return _mapped(path)

    def _open_distances(self, pieces: Ending) -> Sequence[Distances]:
        hashed = self._hash(pieces, ".rtbw", ".rtbz")
        paths = [self._cache / f"{own}-{other}-distances-{hashed}.npy" for own, other in pieces.sides]
        with _made_once(paths[0]):
            if not all(path.exists() for path in paths):
                source = self._tables / f"{pieces.table}.rtbz"
                log.info("decoding the distances of %s into %s, once", pieces.table, self._cache)
                try:
                    made = resolve_distances(pieces.sides, read_table(source), self.values)
                except (IndexError, ValueError) as error:
                    raise DataError(
                        f"the Syzygy table {source} contradicts the .rtbw files beside it ({error}): one of them is "
                        "broken or of another ending; fetch them again."
                    ) from None
                for path, found in zip(paths, made, strict=True):
                    _keep(path, found)
        return [_mapped(path) for path in paths]

    def _hash(self, pieces: Ending, *suffixes: str) -> str:
        """Of all files that its arrays are made from: values of what is reachable, its own distances."""
        names = sorted(f"{e.table}.rtbw" for e in reachable(pieces) if e.men > 2)
        if ".rtbz" in suffixes:
            names.append(f"{pieces.table}.rtbz")
        digest = hashlib.sha256(_FORM.encode())
        for name in names:
            digest.update(f"{name}:{self._file_hash(name)};".encode())
        return digest.hexdigest()[:16]

    def _file_hash(self, name: str) -> str:
        if name not in self._hashes:
            path = self._tables / name
            try:
                self._hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise DataError(
                    f"cannot read the Syzygy table {path}: {error.strerror or error}. Any mirror of the Syzygy "
                    "tables has it."
                ) from None
        return self._hashes[name]


@contextlib.contextmanager
def _made_once(path: Path) -> Iterator[None]:
    """One process at a time makes `path`; the others wait. Where there is no flock (Windows) each makes its own, and
    the last one's is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("ab") as lock:
            with contextlib.suppress(ImportError):
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise DataError(
            f"cannot keep the decoded tables in {path.parent}: {error.strerror or error}. Set MANYHANDS_HOME to a "
            "directory with room (about 50 MB for each side of an ending)."
        ) from None


def _keep(path: Path, array: npt.NDArray[Any]) -> None:
    descriptor, aside = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _mapped(path: Path) -> npt.NDArray[Any]:
    try:
        mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(
            f"the decoded table {path} cannot be read ({error}): remove it, and it is made again."
        ) from None
    return mapped.view(np.ndarray)
