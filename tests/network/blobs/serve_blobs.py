"""A real blob server in a process of its own, for the tests: uvicorn, the routes, a store, a token.

Argument: JSON with directory, and optionally port, token, store and route settings, and `die_at`: [name of a method
of the store, how many calls of it, "before" or "after"], where it kills itself with SIGKILL. Prints its port.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request

from manyhands.network.blobs.routes import blob_routes
from manyhands.network.blobs.store import BlobStore


def die_at(store: BlobStore, method: str, count: int, moment: str) -> None:
    honest, calls, lock = getattr(store, method), 0, threading.Lock()

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            mine = calls
        if mine == count and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = honest(*arguments)
        if mine == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(store, method, counted)


def die_with_parent() -> None:
    sys.stdin.read()  # ends when the test's process does, however that ends
    os._exit(0)


def main() -> None:
    threading.Thread(target=die_with_parent, daemon=True).start()
    options = json.loads(sys.argv[1])
    store = BlobStore(Path(options["directory"]), **options.get("store", {}))
    if "die_at" in options:
        die_at(store, *options["die_at"])

    async def authorize(request: Request, action: str, blob: str, size: int) -> None:
        if request.headers.get("authorization", "") != options.get("token", ""):
            raise HTTPException(401, f"sign in first to {action} {blob[:8]}")
        if size > options.get("allowed_bytes", 2**40):
            raise HTTPException(403, f"{size} bytes are more than you may store")

    app = FastAPI()
    app.include_router(blob_routes(store, authorize, **options.get("routes", {})))
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", options.get("port", 0)))
        listening.listen(128)
        print(listening.getsockname()[1], flush=True)
        config = uvicorn.Config(app, http="httptools", loop="uvloop", log_level="warning")
        uvicorn.Server(config).run(sockets=[listening])


main()
