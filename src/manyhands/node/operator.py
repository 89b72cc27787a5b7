"""The operator's orders to a server: look, pause, resume, kick. Signed by the key that the first run has made."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, Literal

import aiohttp

from manyhands.config import Settings, home
from manyhands.errors import IdentityError, ProtocolError, Refused, ServerUnreachable
from manyhands.identity import keys
from manyhands.identity.canonical import sign_document
from manyhands.identity.contributions import new_nonce
from manyhands.identity.keys import Identity
from manyhands.network.faults import in_words
from manyhands.node.view import RunSummary, RunView
from manyhands.plan.schema import Identifier

ORDER_DOMAIN = "manyhands order v1"
ORDER_LIFETIME_MS = 60_000
TIMEOUT_S = 10.0


class Order(Settings):
    """What is signed. `issued_ms` and `nonce` make it good for a minute, and once."""

    action: Literal["pause", "resume", "kick"]
    run_id: Identifier
    client: str = ""
    """A client's key, or its first digits."""
    reason: str = ""
    issued_ms: int
    nonce: str


def default_key() -> Path:
    """Where `server run` keeps the operator's key."""
    return home() / "keys" / "operator.key"


def load_key(path: Path | None) -> Identity:
    """The operator's key; raises IdentityError that says where it comes from."""
    chosen = path or default_key()
    if not chosen.exists():
        raise IdentityError(
            f"there is no operator's key at {chosen}. The first `manyhands server run` makes it, on the server's "
            "machine; copy it from there and name it with --operator-key."
        )
    return keys.load(chosen)


def status(address: str, run_id: str | None = None) -> RunView | list[RunSummary]:
    """One run's account, or a line on each run of the server."""
    if run_id is not None:
        return RunView.parse(_request("GET", address, f"/api/runs/{run_id}"))
    return [RunSummary.parse(row) for row in _rows(address, "/api/runs")]


def ledger(address: str, run_id: str) -> list[dict[str, Any]]:
    """Who was assigned, contributed, was merged or not and why, for each round."""
    return _rows(address, f"/api/runs/{run_id}/ledger")


def pause(address: str, run_id: str, operator: Identity, reason: str = "") -> str:
    return _order(address, run_id, operator, "pause", reason=reason)


def resume(address: str, run_id: str, operator: Identity) -> str:
    return _order(address, run_id, operator, "resume")


def kick(address: str, run_id: str, operator: Identity, client: str, reason: str = "") -> str:
    return _order(address, run_id, operator, "kick", client=client, reason=reason)


def only_run(address: str) -> str:
    """The id of the server's run, where there is just one. Raises Refused naming them otherwise."""
    runs = status(address)
    assert isinstance(runs, list)
    if len(runs) == 1:
        return runs[0].run_id
    names = ", ".join(run.run_id for run in runs) or "none"
    raise Refused(f"the server at {address} has {len(runs)} runs ({names}): choose one with --run-id")


def _order(
    address: str,
    run_id: str,
    operator: Identity,
    action: Literal["pause", "resume", "kick"],
    *,
    client: str = "",
    reason: str = "",
) -> str:
    order = Order(
        action=action,
        run_id=run_id,
        client=client,
        reason=reason,
        issued_ms=time.time_ns() // 1_000_000,
        nonce=new_nonce(),
    )
    document = {"order": order.model_dump(), "signature": sign_document(operator, ORDER_DOMAIN, order)}
    answer = _request("POST", address, f"/api/runs/{run_id}/orders", document)
    if not isinstance(answer, dict) or not isinstance(answer.get("done"), str):
        raise _no_server(address, f"its answer to an order is {str(answer)[:80]}")
    return str(answer["done"])


def _rows(address: str, path: str) -> list[dict[str, Any]]:
    answer = _request("GET", address, path)
    if not isinstance(answer, list) or not all(isinstance(row, dict) for row in answer):
        raise _no_server(address, f"its {path} is {str(answer)[:80]}")
    return answer


def _no_server(address: str, why: str) -> ProtocolError:
    return ProtocolError(f"what answers at {address} is no manyhands server of this version: {why}")


def _request(method: str, address: str, path: str, document: Any = None) -> Any:
    return asyncio.run(_ask(method, address, path, document))


async def _ask(method: str, address: str, path: str, document: Any) -> Any:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.request(method, f"http://{address}{path}", json=document) as response,
        ):
            answer = await response.json(content_type=None)
            if response.status >= 400:
                raise Refused(f"the server at {address} refuses: {_reason(answer, response.status)}")
            return answer
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ServerUnreachable(
            f"no manyhands server answers at {address}: {in_words(error)}. Is it running, and is "
            "this its host:port?"
        ) from None
    except ValueError as error:
        raise _no_server(address, str(error)) from None


def _reason(answer: Any, status_code: int) -> str:
    if isinstance(answer, dict):
        detail = answer.get("detail") or answer.get("error")
        if detail:
            return str(detail)
    return f"HTTP {status_code}"
