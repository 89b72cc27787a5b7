"""What a person wants to know of the host before anything runs there."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

from manyhands.hosts.on_host.frames import Line, absolute


def probe(line: Line, request: dict[str, Any]) -> None:
    work = absolute(request["work"])
    outputs = request.get("outputs")
    line.answer(
        python=list(sys.version_info[:3]),
        executable=sys.executable,
        manyhands=version_of("manyhands"),
        torch=version_of("torch"),
        platform=sys.platform,
        name=socket.gethostname(),
        work=work,
        writable=os.access(nearest(work), os.W_OK | os.X_OK),
        free=free_bytes(work),
        time=time.time(),
        gpus=gpus() if request.get("gpus") else None,
        cpus=os.cpu_count(),
        memory=memory(),
        address=os.environ.get("SSH_CONNECTION", "   ").split(" ")[2] or None,
        docker=shutil.which("docker") or shutil.which("podman"),
        outputs=state_of(absolute(outputs), request.get("secret")) if outputs else None,
        paths={path: os.path.exists(absolute(path)) for path in request.get("paths", ())},
        packages={name: has(name) for name in request.get("packages", ())},
    )


def free_port(line: Line, request: dict[str, Any]) -> None:
    """A port that nobody listens at just now."""
    with socket.socket() as trial:
        trial.bind((request.get("address") or "", 0))
        line.answer(port=trial.getsockname()[1])


def run(line: Line, request: dict[str, Any]) -> None:
    """A command to its end, with the end of its output."""
    command = [absolute(word) if word.startswith("~") else word for word in request["command"]]
    environment = dict(os.environ, **request.get("environment", {}))
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=absolute(request.get("cwd", "~")),
        check=False,
    )
    line.answer(code=done.returncode, output=done.stdout.decode("utf-8", "replace")[-8000:])


def version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def gpus() -> list[dict[str, Any]] | None:
    """Name, memory and free memory in MiB of each; None where nvidia-smi does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, stdout=subprocess.PIPE, timeout=20, check=True).stdout.decode()
        rows = [[part.strip() for part in row.split(",")] for row in text.splitlines() if row.strip()]
        return [{"name": name, "memory": int(total), "free": int(free)} for name, total, free in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def nearest(path: str) -> str:
    """The path, or the directory that it will be made in."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def free_bytes(path: str) -> int:
    return shutil.disk_usage(nearest(path)).free


def state_of(outputs: str, secret: str | None) -> str:
    """Whether this directory is one that the other side sees too: it has put a file there to find."""
    if not os.path.isdir(outputs):
        return "missing"
    if not (secret and os.path.exists(os.path.join(outputs, secret))):
        return "not shared"
    return "shared" if os.access(outputs, os.W_OK) else "read-only"
