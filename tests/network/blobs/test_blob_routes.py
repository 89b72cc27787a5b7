"""The routes, asked by plain urllib and sockets: what is refused, how early, and in which words."""

from __future__ import annotations

import json
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from manyhands.network.blobs.manifest import CHUNK_BYTES, Manifest, manifest_of_bytes
from manyhands.network.blobs.store import BlobStore

TOKEN = "t0k3n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Any]:
    """One for the whole module; each test has blobs of its own."""
    made = request.getfixturevalue("server_class")(tmp_path_factory.mktemp("routes") / "store")
    made.start(
        token=TOKEN,
        store={"max_bytes": 2**26, "durable": False},
        routes={"body_timeout_s": 0.3},
        allowed_bytes=2**25,
    )
    yield made
    made.kill()


class Containing:
    """Equal to every text that contains this one."""

    def __init__(self, part: str) -> None:
        self.part = part

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.part in other

    def __hash__(self) -> int:
        return hash(self.part)

    def __repr__(self) -> str:
        return f"...{self.part}..."


def ask(
    server: Any, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, Any, bytes]:
    found: tuple[int, Any, bytes] = server.ask(method, path, body, authorization=TOKEN, **headers)
    return found


def fault(answer: tuple[int, Any, bytes]) -> tuple[int, str, str]:
    value = json.loads(answer[2])["error"]
    return answer[0], value["code"], value["message"]


def fresh(label: str, size: int = 100) -> tuple[bytes, Manifest]:
    data = (label.encode() * size)[:size]
    return data, manifest_of_bytes(data)


def test_a_blob_goes_in_and_comes_out(server: Any, data: bytes, manifest: Manifest) -> None:
    path = f"/blobs/{manifest.blob}"
    status, _, body = ask(server, "PUT", path, manifest.to_json())
    assert (status, json.loads(body)) == (200, {"missing": [0, 1, 2, 3]})
    for index in (2, 0, 2, 3):  # one of them twice
        part = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        assert ask(server, "PUT", f"{path}/chunks/{index}", part)[0] == 204
    assert json.loads(ask(server, "PUT", path, manifest.to_json())[2]) == {"missing": [1]}
    assert fault(ask(server, "POST", f"{path}/complete"))[:2] == (409, "incomplete")
    assert fault(ask(server, "GET", f"{path}/chunks/0"))[:2] == (
        404,
        "unknown",
    )  # not to be seen before it is whole
    assert ask(server, "PUT", f"{path}/chunks/1", data[CHUNK_BYTES : 2 * CHUNK_BYTES])[0] == 204
    for _ in range(2):
        done = ask(server, "POST", f"{path}/complete")
        assert (done[0], json.loads(done[2])) == (200, {"blob": manifest.blob, "size_bytes": len(data)})
    assert ask(server, "GET", f"{path}/manifest")[2] == manifest.to_json()
    got = [ask(server, "GET", f"{path}/chunks/{index}") for index in range(4)]
    assert b"".join(body for _, _, body in got) == data
    tag = got[1][1]["etag"]
    assert tag == f'"{manifest.chunks[1].hex()}"'
    assert ask(server, "GET", f"{path}/chunks/1", if_none_match=tag)[0] == 304
    assert ask(server, "PUT", path, manifest.to_json())[2] == b'{"missing": []}'
    assert ask(server, "PUT", f"{path}/chunks/3", data[3 * CHUNK_BYTES :])[0] == 204


def test_wrong_chunks_are_refused(server: Any) -> None:
    data, manifest = fresh("wrong chunks")
    path = f"/blobs/{manifest.blob}/chunks/0"
    assert fault(ask(server, "PUT", path, data)) == (404, "unknown", Containing("send its manifest first"))
    ask(server, "PUT", f"/blobs/{manifest.blob}", manifest.to_json())
    assert fault(ask(server, "PUT", path, data[:-1] + b"!")) == (422, "corrupt", Containing("SHA-256"))
    assert fault(ask(server, "PUT", path, data[:-1])) == (422, "corrupt", Containing("99 were given"))
    assert fault(ask(server, "PUT", path, b"")) == (422, "corrupt", Containing("0 were given"))
    assert fault(ask(server, "PUT", path, data + b"x")) == (413, "too_large", Containing("100 bytes"))
    assert fault(ask(server, "PUT", path[:-1] + "1", data)) == (404, "unknown", Containing("there is no 1"))
    assert not BlobStore(server.directory).has(manifest.blob)
    assert ask(server, "PUT", path, data)[0] == 204


def test_wrong_manifests_are_refused(server: Any) -> None:
    _, manifest = fresh("wrong manifests")
    path = f"/blobs/{manifest.blob}"
    _, other = fresh("another")
    assert fault(ask(server, "PUT", path, other.to_json())) == (
        400,
        "bad_blob",
        Containing("is that of blob"),
    )
    assert fault(ask(server, "PUT", path, b"[" * 900)) == (400, "bad_blob", Containing("not JSON"))
    assert fault(ask(server, "PUT", path, b" " * 5000)) == (413, "too_large", Containing("larger than"))
    chunks = [f"{n:064x}" for n in range(17)]
    huge = json.dumps({"size": 2**26 + 1, "chunks": chunks}).encode()
    assert fault(ask(server, "PUT", path, huge)) == (400, "bad_blob", Containing("whole number from 0 to"))


def test_the_size_is_authorized_before_anything_is_stored(server: Any) -> None:
    chunks = tuple(bytes([n]) * 32 for n in range(9))
    manifest = Manifest(2**25 + 1, chunks)
    answer = ask(server, "PUT", f"/blobs/{manifest.blob}", manifest.to_json())
    assert fault(answer) == (403, "forbidden", f"{2**25 + 1} bytes are more than you may store")
    assert fault(ask(server, "PUT", f"/blobs/{manifest.blob}/chunks/0", b"x"))[:2] == (404, "unknown")


@pytest.mark.parametrize("name", ["a" * 63, "A" * 64, "g" * 64, "a" * 65, "..%2f" * 12 + "abcd"])
def test_ids_are_checked(server: Any, name: str) -> None:
    for method, rest in (("GET", "/manifest"), ("GET", "/chunks/0"), ("PUT", ""), ("POST", "/complete")):
        assert ask(server, method, f"/blobs/{name}{rest}")[0] in (400, 404)
    assert ask(server, "GET", f"/blobs/{'a' * 64}/chunks/-1")[0] == 400
    assert fault(ask(server, "GET", f"/blobs/{'a' * 63}/manifest"))[:2] == (400, "bad_request")


def test_strangers_learn_nothing(server: Any) -> None:
    data, manifest = fresh("secret")
    path = f"/blobs/{manifest.blob}"
    ask(server, "PUT", path, manifest.to_json())
    ask(server, "PUT", f"{path}/chunks/0", data)
    ask(server, "POST", f"{path}/complete")
    for blob in (manifest.blob, "0" * 64):  # one that is there, one that is not: the same answer
        for method, rest in (
            ("GET", "/manifest"),
            ("GET", "/chunks/0"),
            ("PUT", ""),
            ("PUT", "/chunks/0"),
            ("POST", "/complete"),
        ):
            body = data if method == "PUT" else None
            answer = server.ask(method, f"/blobs/{blob}{rest}", body)
            assert fault(answer)[:2] == (401, "unauthorized"), (method, rest)
            assert "sign in first" in fault(answer)[2]


def test_a_refused_chunk_does_not_reset_the_connection(server: Any) -> None:
    """Who sends a whole chunk with a stale token still reads why it was refused."""
    for _ in range(3):
        assert fault(server.ask("PUT", f"/blobs/{'1' * 64}/chunks/0", bytes(CHUNK_BYTES)))[0] == 401


# ------------------------------------------------------------------------------------------- bodies
def converse(server: Any, head: str, *bodies: bytes, pause_s: float = 0.0) -> tuple[bytes, float]:
    """Send a request by hand, and read the answer; returns that and the seconds."""
    begun = time.monotonic()
    text = f"{head}\r\nHost: x\r\nAuthorization: {TOKEN}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        raw.sendall(text.encode())
        for body in bodies:
            raw.sendall(body)
            time.sleep(pause_s)
        answer = whole_answer(raw)
    return answer, time.monotonic() - begun


def whole_answer(raw: socket.socket) -> bytes:
    """Head and body may come one after the other."""
    answer = b""
    while part := raw.recv(65536):
        answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if length is not None and len(body) >= int(length[1]):
            break
    return answer


@pytest.fixture
def begun(server: Any, request: pytest.FixtureRequest) -> str:
    _, manifest = fresh(request.node.name)
    ask(server, "PUT", f"/blobs/{manifest.blob}", manifest.to_json())
    return f"/blobs/{manifest.blob}/chunks/0"


def test_a_body_that_says_it_is_too_large_is_not_read(server: Any, begun: str) -> None:
    answer, seconds = converse(server, f"PUT {begun} HTTP/1.1", b"Content-Length: 99999999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()
    assert seconds < 2


def test_a_body_of_unsaid_length_is_read_to_its_limit(server: Any, begun: str) -> None:
    pieces = [b"Transfer-Encoding: chunked\r\n\r\n", *[b"20\r\n" + b"x" * 32 + b"\r\n"] * 4]
    answer, _ = converse(server, f"PUT {begun} HTTP/1.1", *pieces)  # 128 bytes of 100, and no end
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_body_that_stops_is_given_up(server: Any, begun: str) -> None:
    answer, seconds = converse(server, f"PUT {begun} HTTP/1.1", b"Content-Length: 100\r\n\r\nonly this")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"after 9 bytes" in answer
    assert 0.25 < seconds < 4


def test_a_slow_body_that_goes_on_is_waited_for(server: Any) -> None:
    data, manifest = fresh("slow")
    ask(server, "PUT", f"/blobs/{manifest.blob}", manifest.to_json())
    pieces = [b"Content-Length: 100\r\n\r\n", *[data[i : i + 20] for i in range(0, 100, 20)]]
    answer, seconds = converse(server, f"PUT /blobs/{manifest.blob}/chunks/0 HTTP/1.1", *pieces, pause_s=0.12)
    assert answer.startswith(b"HTTP/1.1 204")
    assert seconds > 0.5  # longer than the silence that is allowed


def test_a_body_that_trickles_is_given_up(server: Any, begun: str) -> None:
    """Never silent for long, and never done: four silences and the time of its size at the slowest rate."""
    head = f"PUT {begun} HTTP/1.1\r\nHost: x\r\nAuthorization: {TOKEN}\r\nContent-Length: 100\r\n\r\n"
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        raw.sendall(head.encode())
        while not select.select([raw], [], [], 0.1)[0]:
            assert time.monotonic() - started < 10
            raw.sendall(b"x")
        answer = whole_answer(raw)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"too slowly" in answer
    assert time.monotonic() - started > 1


def test_a_client_that_hangs_up_harms_nobody(server: Any, begun: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(
            f"PUT {begun} HTTP/1.1\r\nHost: x\r\nAuthorization: {TOKEN}\r\nContent-Length: 100\r\n\r\nab".encode()
        )
    data, _ = fresh("test_a_client_that_hangs_up_harms_nobody")
    assert ask(server, "PUT", begun, data)[0] == 204


def test_bodies_wait_their_turn(new_server: Callable[[], Any]) -> None:
    """With one place for bodies a second sender waits until the first one is done, unread."""
    server = new_server().start(token=TOKEN, routes={"max_bodies": 1, "body_timeout_s": 0.5})
    data, manifest = fresh("turn")
    path = f"/blobs/{manifest.blob}"
    ask(server, "PUT", path, manifest.to_json())
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        head = f"PUT {path}/chunks/0 HTTP/1.1\r\nHost: x\r\nAuthorization: {TOKEN}\r\nContent-Length: 100\r\n\r\nab"
        slow.sendall(head.encode())
        time.sleep(0.2)
        begun = time.monotonic()
        assert ask(server, "PUT", f"{path}/chunks/0", data)[0] == 204
        assert time.monotonic() - begun > 0.15
        assert slow.recv(65536).startswith(b"HTTP/1.1 408")


def test_a_full_disk_is_said(new_server: Callable[[], Any]) -> None:
    server = new_server().start(token=TOKEN, store={"reserve_bytes": 2**60})
    _, manifest = fresh("full")
    answer = ask(server, "PUT", f"/blobs/{manifest.blob}", manifest.to_json())
    assert fault(answer) == (507, "storage", Containing("Free some space"))
