"""Text from a file, a directory or Python's own standard library, split into training and validation
documents.

Deterministic: files come in the order of their relative paths; whether one is for validation is decided by
the hash of its relative path alone, so it does not depend on the machine, the directory's order or the
file's age. Bytes are kept as they are (no newline translation). Each document says where it came from, for
the run's record.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from manyhands.errors import DataError
from manyhands.plan.tasks import TextSource

STDLIB = "stdlib"
SUFFIXES = (".md", ".py", ".txt")
_KINDS = {".parquet": "parquet", ".bin": "tokens", ".npy": "tokens"}
_LONGEST_CHARACTER_BYTES = 4  # of UTF-8: a cut may fall short by three bytes; what is left then is no text
_SKIPPED_DIRECTORIES = frozenset({"__pycache__", "site-packages", "dist-packages"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One file, or one part of it, as it was read. `start_byte` is above 0 only for the later part of a
    file.
    """

    path: str  # relative to the source, with forward slashes
    text: str
    start_byte: int
    size_bytes: int
    sha256: str  # of the bytes of `text`


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The documents of a source. No file is in both lists, except that a single file is cut in two."""

    source: str
    training: tuple[Document, ...]
    validation: tuple[Document, ...]
    broken: tuple[str, ...]  # files left out because they are not UTF-8 or cannot be read

    def size_bytes(self) -> int:
        return sum(document.size_bytes for document in (*self.training, *self.validation))


def read_corpus(source: TextSource, *, minimum_bytes: int = 2) -> Corpus:
    """Read and split the text of `source`. Raises DataError if it is missing, empty or too small, or has a broken
    file and `source.on_broken` is "stop".

    `minimum_bytes`: what each of the two parts must have at least. `source.max_bytes` cuts the last file.
    """
    left = source.max_bytes
    if left is not None and left < 2 * minimum_bytes + _LONGEST_CHARACTER_BYTES:
        wanted = 2 * minimum_bytes + _LONGEST_CHARACTER_BYTES
        raise DataError(f"task.text.max_bytes is {left}: at least {wanted} bytes are needed; raise it")
    broken: list[str] = []
    documents = _documents(source, source.path, left, broken)
    if source.validation_path is not None:
        training, validation = documents, _documents(source, source.validation_path, None, broken)
    elif len(documents) == 1:
        training, validation = _cut(documents[0], source.validation_share)
    else:
        training, validation = _split(documents, source.validation_share)
    for part, name in ((training, "training"), (validation, "validation")):
        size = sum(document.size_bytes for document in part)
        if size < minimum_bytes:
            raise DataError(
                f"task.text.path {source.path!r}: the {name} part has {size} bytes of text, at least "
                f"{minimum_bytes} are needed: give more text, raise task.text.max_bytes, "
                "or change task.text.validation_share"
            )
    return Corpus(source=source.path, training=training, validation=validation, broken=tuple(broken))


def _documents(source: TextSource, path: str, left: int | None, broken: list[str]) -> tuple[Document, ...]:
    """The documents of the files at `path`, `left` bytes of them at most; names of broken files go to `broken`.

    Python's own source has tests of other encodings, so there a file that is not UTF-8 is nothing broken.
    """
    documents: list[Document] = []
    root, files = _find(path)
    for file in files:
        if left is not None and left < _LONGEST_CHARACTER_BYTES:
            break
        name = file.relative_to(root).as_posix()
        try:
            document = _read(file, name, left)
        except DataError:
            if source.on_broken == "stop" and path != STDLIB:
                raise
            broken.append(name)
            continue
        if document.size_bytes:
            documents.append(document)
            left = None if left is None else left - document.size_bytes
    if not documents:
        raise DataError(_nothing(path, files, broken))
    return tuple(documents)


def _find(path: str) -> tuple[Path, list[Path]]:
    """The directory that names are relative to, and the files of the source, sorted by relative path."""
    root = Path(sysconfig.get_path("stdlib")) if path == STDLIB else Path(path).expanduser()
    if not root.exists():
        hint = (
            "this Python has no library source" if path == STDLIB else "give a file, a directory or 'stdlib'"
        )
        raise DataError(f"task.text.path {path!r}: {root} does not exist; {hint}")
    if root.is_file():
        return root.parent, [root]
    suffixes = (".py",) if path == STDLIB else SUFFIXES
    return root, sorted(_walk(root, suffixes), key=lambda file: file.relative_to(root).as_posix())


def _walk(directory: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Regular files with one of the suffixes below `directory`; links to directories are not followed."""
    try:
        entries = list(directory.iterdir())
    except OSError as error:
        raise DataError(
            f"directory {directory} cannot be read: {error.strerror}; check its permissions"
        ) from error
    for entry in entries:
        if entry.is_dir():
            if entry.name not in _SKIPPED_DIRECTORIES and not entry.is_symlink():
                yield from _walk(entry, suffixes)
        elif entry.suffix in suffixes and entry.is_file():
            yield entry


def _read(file: Path, name: str, limit: int | None) -> Document:
    """The file's first `limit` bytes at most, cut at a character. Raises DataError if it is broken."""
    or_skip = "or leave it out with task.text.on_broken=skip"
    try:
        with file.open("rb") as stream:
            data = stream.read() if limit is None else stream.read(limit + _LONGEST_CHARACTER_BYTES)
    except OSError as error:
        raise DataError(
            f"text file {file} cannot be read: {error.strerror}; check its permissions, {or_skip}"
        ) from error
    if limit is not None and len(data) > limit:
        data = data[: _boundary(data, limit)]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        kind = _KINDS.get(file.suffix)
        what = "convert it" if kind is None else f"give task.text.kind={kind}"
        raise DataError(
            f"text file {file} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; {what}, {or_skip}"
        ) from None
    return _document(name, text, data, 0)


def _document(name: str, text: str, data: bytes, start: int) -> Document:
    digest = hashlib.sha256(data).hexdigest()
    return Document(path=name, text=text, start_byte=start, size_bytes=len(data), sha256=digest)


def _boundary(data: bytes, position: int) -> int:
    """The last start of a UTF-8 character at or before `position`."""
    while position > 0 and position < len(data) and data[position] & 0xC0 == 0x80:
        position -= 1
    return position


def _cut(document: Document, share: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """A single file: its end is for validation."""
    data = document.text.encode("utf-8")
    position = _boundary(data, len(data) - max(1, round(len(data) * share)))
    head, tail = data[:position], data[position:]
    return (
        (_document(document.path, head.decode("utf-8"), head, 0),),
        (_document(document.path, tail.decode("utf-8"), tail, position),),
    )


def _split(documents: Sequence[Document], share: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """By file: in the order of the hash of their paths, files are for validation until the share is reached.

    A file that would take validation above twice its share is left to training, so that one giant does not
    turn the split around; if every file is one, the smallest of them is for validation.
    """
    total = sum(document.size_bytes for document in documents)
    wanted = total * share
    chosen: set[str] = set()
    size = 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.path.encode()).digest()):
        if size >= wanted:
            break
        if size + document.size_bytes <= 2 * wanted and len(chosen) < len(documents) - 1:
            chosen.add(document.path)
            size += document.size_bytes
    if not chosen:
        chosen.add(min(documents, key=lambda d: (d.size_bytes, d.path)).path)
    training = tuple(d for d in documents if d.path not in chosen)
    validation = tuple(d for d in documents if d.path in chosen)
    return training, validation


def _nothing(path: str, files: list[Path], broken: list[str]) -> str:
    where = f"task.text.path {path!r}"
    if broken:
        kinds = "; .parquet, .bin and .npy files need their task.text.kind"
        return f"{where}: none of {len(broken)} files is UTF-8 text, as {broken[0]!r}; convert them{kinds}"
    if files:
        return f"{where}: {len(files)} files, all of them empty; give text"
    return f"{where}: no {', '.join(SUFFIXES)} files in it; give a file, or a directory that has some"
