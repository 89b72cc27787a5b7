"""Files of the host, to it and from it, in chunks whose hashes are checked by whoever receives them."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from manyhands.hosts.on_host.frames import Line, absolute

CHUNK = 4 * 1024 * 1024
PARTIAL = ".part"


def put(line: Line, request: dict[str, Any]) -> None:
    """Write a part of a file aside; the last part gives it its name."""
    path, offset = absolute(request["path"]), request["offset"]
    body = line.body(request.get("size", 0))
    if hashlib.sha256(body).hexdigest() != request["sha256"]:
        raise OSError(0, f"{path} has changed on the way")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + PARTIAL, "r+b" if offset else "wb") as file:
        file.seek(offset)
        file.write(body)
        if request["last"]:
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
    if request["last"]:
        os.replace(path + PARTIAL, path)
    line.answer(done=True)


def partial(line: Line, request: dict[str, Any]) -> None:
    """How many bytes of a file are here already, in whole chunks of the right content; -1: it is here."""
    path, wanted = absolute(request["path"]), request["hashes"]
    sized = os.path.isfile(path) and os.path.getsize(path) == request["bytes"]
    whole = sized and alike(path, wanted) == len(wanted)
    line.answer(offset=-1 if whole else alike(path + PARTIAL, wanted) * CHUNK)


def alike(path: str, wanted: list[str]) -> int:
    """How many of the first chunks have these hashes."""
    try:
        with open(path, "rb") as file:
            for count, digest in enumerate(wanted):
                if hashlib.sha256(file.read(CHUNK)).hexdigest() != digest:
                    return count
            return len(wanted)
    except OSError:
        return 0


def listing(line: Line, request: dict[str, Any]) -> None:
    """The files below a directory with their sizes, but for hidden ones (these are being written) and `without`."""
    root, without = absolute(request["path"]), set(request.get("without", ()))
    files = []
    for here, directories, names in os.walk(root):
        kept = [d for d in directories if not d.startswith(".") and (here != root or d not in without)]
        directories[:] = sorted(kept)
        for name in sorted(names):
            path = os.path.join(here, name)
            if not name.startswith(".") and os.path.isfile(path) and not (here == root and name in without):
                files.append([os.path.relpath(path, root).replace(os.sep, "/"), os.path.getsize(path)])
    line.answer(files=files, there=os.path.isdir(root))


def read(line: Line, request: dict[str, Any]) -> None:
    """Files one after the other, from an offset up to a size, in chunks with their hashes, of which the next one is
    read meanwhile."""
    root = absolute(request["path"])
    for number, (name, offset, size) in enumerate(request["files"]):
        try:
            with open(os.path.join(root, name), "rb") as file, ThreadPoolExecutor(1) as reader:
                file.seek(offset)
                body, digest = hashed(file, size - offset)
                while body:
                    following = reader.submit(hashed, file, size - offset - len(body))
                    line.answer(body, more=True, file=number, offset=offset, sha256=digest)
                    offset += len(body)
                    body, digest = following.result()
            line.answer(more=True, file=number, whole=offset)
        except OSError as error:
            line.answer(more=True, file=number, failed=str(error), errno=error.errno)
    line.answer(done=True)


def hashed(file: IO[bytes], most: int) -> tuple[bytes, str]:
    body = file.read(min(CHUNK, most))
    return body, hashlib.sha256(body).hexdigest()


def hashes(line: Line, request: dict[str, Any]) -> None:
    """SHA-256 of each chunk of a file's beginning: what a copy that was cut off is compared with."""
    found, left = [], request["bytes"]
    with open(absolute(request["path"]), "rb") as file:
        while left > 0:
            body = file.read(min(CHUNK, left))
            if not body:
                break
            found.append(hashlib.sha256(body).hexdigest())
            left -= len(body)
    line.answer(hashes=found)


def text(line: Line, request: dict[str, Any]) -> None:
    """The end of a file, at most so many bytes."""
    path = absolute(request["path"])
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - request["bytes"]))
        line.answer(text=file.read(request["bytes"]).decode("utf-8", "replace"))
