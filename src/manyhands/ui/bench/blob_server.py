"""A blob store behind uvicorn and nothing else: the other end of blob_up and blob_down.

python -m manyhands.ui.bench.blob_server PORT DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request

from manyhands.network.blobs.routes import Action, blob_routes
from manyhands.network.blobs.store import BlobStore
from manyhands.node.event_loop import run


async def _everybody(request: Request, action: Action, blob: str, size: int) -> None:
    """No sign-in: only this measurement knows the port."""


def main() -> None:
    app = FastAPI()
    app.include_router(blob_routes(BlobStore(Path(sys.argv[2])), _everybody))
    config = uvicorn.Config(
        app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False
    )
    run(uvicorn.Server(config).serve())


if __name__ == "__main__":
    main()
