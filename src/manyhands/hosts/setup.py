"""The same version of manyhands on a host, without root: a wheel by sftp, an environment made there.

    <WorkDir>/venv/                 python3 -m venv
    <WorkDir>/wheels/<name>.whl     what was sent

Where there is no sftp (this machine, wsl, an sshd without it) the agent takes the wheel. What that needs (torch, ...)
is installed by pip there, so its own configuration decides from which index. Where it has been made once, the same
again needs no network.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import manyhands
from manyhands import __version__
from manyhands.errors import Refused, StorageError, WorkerError
from manyhands.hosts.agent import Agent, agent, environment_of
from manyhands.hosts.check import NEWEST_PYTHON, OLDEST_PYTHON
from manyhands.hosts.connection import connected
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.launch import send_file

NEEDED_BYTES: Final = 6 << 30
"""Of torch with CUDA and the rest."""
WHEELS: Final = "wheels"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The environment on the host."""

    python: str
    version: str
    wheel: str


async def setup(
    host: Host,
    wheel: Path,
    *,
    system_packages: bool = False,
    dependencies: bool = True,
    extras: Sequence[str] = (),
    tell: Callable[[str], None],
) -> Made:
    """Send the wheel, make the environment, install, and see that it begins.

    system_packages: the environment sees what the host's Python has installed. Raises Refused for a Python that is
    not supported, StorageError for a disk that is too small, WorkerError with the end of what pip has said.
    """
    async with (
        connected(host) as connection,
        agent(connection, host, python=host.python or "python3") as there,
    ):
        facts = await there.ask("probe", work=host.work_dir)
        _check(host, facts, needed=NEEDED_BYTES if dependencies and not system_packages else 0)
        place = f"{facts['work']}/{WHEELS}/{wheel.name}"
        tell(f"sending {wheel.name}")
        await send_file(there, wheel, place, sftp=connection)
        environment = environment_of(host)
        flags = ["--system-site-packages"] if system_packages else []
        tell(f"making {environment} with Python {'.'.join(map(str, facts['python']))}")
        await _run(there, host, [facts["executable"], "-m", "venv", *flags, environment], "venv")
        python = f"{environment}/bin/python"
        wanted = place + (f"[{','.join(extras)}]" if extras else "")
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        tell("installing; pip there knows from where" if dependencies else "installing it alone")
        if dependencies:
            await _run(there, host, [*pip, "--upgrade", wanted], "pip")
        # the same version may have other contents: the wheel itself is always installed anew
        await _run(there, host, [*pip, "--no-deps", "--force-reinstall", wanted], "pip")
        if not dependencies and (lacking := await _lacking(there, python)):
            tell(f"nothing trains there before these are installed too: {', '.join(lacking)}")
        said = await _run(
            there, host, [python, "-c", "import manyhands; print(manyhands.__version__)"], "python"
        )
    version = said.strip().splitlines()[-1]
    if version != __version__:
        raise WorkerError(
            f"{host.host_name}: manyhands {version} begins there, and {__version__} was installed"
        )
    return Made(python=python, version=version, wheel=place)


def _check(host: Host, facts: dict[str, Any], needed: int) -> None:
    name = host.host_name
    version = tuple(facts["python"])
    if not OLDEST_PYTHON <= version[:2] <= NEWEST_PYTHON:
        raise Refused(
            f"{name} has Python {'.'.join(map(str, version))} at {facts['executable']}, and 3.11 to 3.13 are "
            'supported: install one there (without root: uv python install 3.12), and name it in "Python" of the '
            "hosts' file"
        )
    if not facts["writable"]:
        raise StorageError(f"{name}: {facts['work']} cannot be written: choose another WorkDir")
    if facts["free"] < needed:
        raise StorageError(
            f"{name}: {facts['free'] / 2**30:.1f} GiB are free at {facts['work']}, and torch needs about "
            f"{needed >> 30}: free space there, choose another WorkDir, or use what is installed (--system-packages)"
        )


async def _lacking(there: Agent, python: str) -> list[str]:
    """What manyhands requires and the Python there has not."""
    answer = await there.ask("run", command=[python, "-m", "pip", "check", "--disable-pip-version-check"])
    return re.findall(
        r"^manyhands \S+ requires (\S+), which is not installed", answer["output"], re.MULTILINE
    )


async def _run(there: Agent, host: Host, command: Sequence[str], what: str) -> str:
    answer = await there.ask("run", command=list(command))
    if answer["code"] != 0:
        end = "\n".join(f"  {line}" for line in answer["output"].splitlines()[-15:])
        raise WorkerError(
            f"{host.host_name}: {what} ended with exit code {answer['code']}:\n{end}{_advice(what, end)}"
        )
    return str(answer["output"])


def _advice(what: str, output: str) -> str:
    if what == "venv" and "ensurepip" in output:
        return "\nIt lacks ensurepip: install python3-venv there, or name a Python that has it"
    if what == "pip" and any(
        word in output for word in ("No matching distribution", "Connection", "Retrying")
    ):
        return (
            "\npip there found no index: set one in its configuration (pip config set global.index-url URL), or use "
            "what is installed (--system-packages --no-dependencies)"
        )
    return ""


def own_wheel(directory: Path) -> Path:
    """A wheel of what runs here, put together from the package's files and its metadata; nothing is built.

    Raises WorkerError where manyhands runs without having been installed.
    """
    package = Path(manyhands.__file__).parent
    try:
        distribution = importlib.metadata.distribution("manyhands")
    except importlib.metadata.PackageNotFoundError:
        raise WorkerError(
            "manyhands is not installed here: pip install it, or give a wheel with --wheel FILE"
        ) from None
    files = {
        f"{package.name}/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    information = f"manyhands-{distribution.version}.dist-info"
    for name in ("METADATA", "entry_points.txt"):
        files[f"{information}/{name}"] = (distribution.read_text(name) or "").encode()
    files[f"{information}/WHEEL"] = _WHEEL
    record = "".join(f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items())
    files[f"{information}/RECORD"] = f"{record}{information}/RECORD,,\n".encode()
    wheel = directory / f"manyhands-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


_WHEEL: Final = b"Wheel-Version: 1.0\nGenerator: manyhands\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def _digest(content: bytes) -> str:
    """As RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
