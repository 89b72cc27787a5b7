"""The dashboard's pages and assets. What they show they read from the server's JSON (node/view.py).

Nothing is fetched from the internet and nothing is built: the assets are the files in `static/`, read once and sent
under a Content-Security-Policy that allows only them. The pages steer nothing; actions need the operator's key.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

_STATIC = Path(__file__).parent / "static"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".html": "text/html"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def dashboard_router() -> APIRouter:
    """The pages / and /runs/{id}, and /assets/*."""
    router = APIRouter()
    files = {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in sorted(_STATIC.iterdir())}

    def file(name: str, request: Request) -> Response:
        found = files.get(name)
        if found is None:
            return Response("no such file\n", 404, headers=_HEADERS, media_type="text/plain")
        body, media_type = found
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        headers = {**_HEADERS, "ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=media_type)

    @router.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return file("index.html", request)

    @router.get("/runs/{run_id}", include_in_schema=False)
    async def run_page(run_id: str, request: Request) -> Response:  # noqa: ARG001 - the page reads it from its address
        return file("run.html", request)

    @router.get("/assets/{name}", include_in_schema=False)
    async def asset(name: str, request: Request) -> Response:
        return file(name, request)

    return router
