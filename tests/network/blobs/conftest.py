"""Fixtures: real blob servers in processes of their own, and holders that misbehave."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from manyhands.network.blobs.holders import Holder
from manyhands.network.blobs.manifest import CHUNK_BYTES, Manifest, manifest_of_bytes

SERVER = Path(__file__).with_name("serve_blobs.py")
ChunkAnswer = Callable[[web.Request, int, bytes], Awaitable[web.StreamResponse]]
FakeHolder = Callable[..., AbstractAsyncContextManager[Holder]]


class Server:
    """One server; `start` it again after its death on the same port and directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    def start(self, **options: Any) -> Server:
        arguments = json.dumps({"directory": str(self.directory), "port": self.port, **options})
        command = [sys.executable, str(SERVER), arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                pipe.close()
            self.process = None

    async def died(self) -> None:
        """Wait until it has killed itself, and clear up."""
        assert self.process is not None
        assert await asyncio.to_thread(self.process.wait, 30) == -signal.SIGKILL
        self.kill()

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One request without any of the code under test; returns status, headers in lower case, and body."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=names)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                found = answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                found = error.code, error.headers, error.read()
        return found[0], {name.lower(): value for name, value in found[1].items()}, found[2]


@pytest.fixture(scope="session")
def server_class() -> type[Server]:
    """For fixtures of a wider scope than a test's."""
    return Server


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Callable[[], Server]]:
    """Make servers that are not started yet, each with a store of its own."""
    made: list[Server] = []

    def new() -> Server:
        made.append(Server(tmp_path / f"server-{len(made)}"))
        return made[-1]

    yield new
    for server in made:
        server.kill()


@pytest.fixture(scope="session")
def data() -> bytes:
    """Four chunks, the last one short."""
    return random.Random(5).randbytes(3 * CHUNK_BYTES + 4321)


@pytest.fixture(scope="session")
def manifest(data: bytes) -> Manifest:
    return manifest_of_bytes(data)


@pytest.fixture
def fake_holder(data: bytes, manifest: Manifest) -> FakeHolder:
    """async with fake_holder(answer, manifest_body=None) as holder: it has `data`, and `answer` sends the chunks."""

    @asynccontextmanager
    async def run(answer: ChunkAnswer, manifest_body: bytes | None = None) -> AsyncIterator[Holder]:
        async def chunk(request: web.Request) -> web.StreamResponse:
            index = int(request.match_info["index"])
            return await answer(request, index, data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])

        async def send_manifest(_request: web.Request) -> web.Response:
            return web.Response(body=manifest_body or manifest.to_json())

        app = web.Application()
        app.router.add_get("/blobs/{blob}/manifest", send_manifest)
        app.router.add_get("/blobs/{blob}/chunks/{index}", chunk)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            port = runner.addresses[0][1]
            yield Holder(url=f"http://127.0.0.1:{port}")
        finally:
            await asyncio.wait_for(runner.cleanup(), 10)

    return run
