"""The files of a simulation: payloads by content, as blobs are, and deleted as soon as nobody needs them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from manyhands.coordination.types import BlobId, BlobRef
from manyhands.network.blobs.manifest import manifest_of


class Scratch:
    """Files in a directory of their own. What was lent (`lend`) is found here, but never deleted."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[BlobId, Path] = {}
        self._lent: set[BlobId] = set()
        self._made = 0

    def new(self, kind: str) -> Path:
        """A path for a file that is about to be written."""
        self._made += 1
        return self._directory / f"{kind}-{self._made}.safetensors"

    def keep(self, path: Path) -> BlobRef:
        """Take in a file from `new`; two of the same content are kept once."""
        ref = manifest_of(path).ref
        if ref.blob in self._files:
            path.unlink()
        else:
            self._files[ref.blob] = path
        return ref

    def lend(self, path: Path) -> BlobRef:
        """Make a file of somebody else's known."""
        ref = manifest_of(path).ref
        self._files[ref.blob] = path
        self._lent.add(ref.blob)
        return ref

    def path(self, ref: BlobRef) -> Path:
        return self._files[ref.blob]

    def keep_only(self, needed: Collection[BlobId]) -> None:
        """Delete everything else."""
        for blob in self._files.keys() - set(needed) - self._lent:
            self._files.pop(blob).unlink()
