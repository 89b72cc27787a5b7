"""A worker's side of the socket to its node: requests in, results and notices out, one JSON line each.

Tensors never pass here; they go through files in the participant's directory. A control thread reads the socket,
so that `abandon` is heard and `ping` is answered while an operation runs, and ends the process when the node is gone:
a worker never outlives its node. Operations run one after the other in the main thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from manyhands.errors import ManyhandsError

Operation = Callable[..., Any]


class Channel:
    """Serves operations by name. `abandoned(assignment)` is true once the node has given that work up."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("r", encoding="utf-8")
        self._write_lock = threading.Lock()
        self._requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self._abandoned: set[str] = set()

    def abandoned(self, assignment: str) -> bool:
        return assignment in self._abandoned

    def notify(self, **notice: Any) -> None:
        """Tell the node something that nobody has asked for, such as progress."""
        self._send({"notice": notice})

    def serve(self, operations: Mapping[str, Operation]) -> None:
        """Carry out requests until the node closes the socket (which ends the process at once)."""
        threading.Thread(target=self._control, name="control", daemon=True).start()
        self._send({"notice": {"started": os.getpid()}})
        while True:
            request = self._requests.get()
            name = request["op"]
            try:
                result = operations[name](**request["arguments"])
                self._send({"id": request["id"], "result": result})
            except ManyhandsError as error:
                self._send({"id": request["id"], "error": str(error), "type": type(error).__name__})
            except Exception as error:  # noqa: BLE001 - the boundary of a process: reported to the node
                traceback.print_exc()
                text = f"{type(error).__name__}: {error}"
                self._send({"id": request["id"], "error": text, "type": "WorkerError"})

    def _control(self) -> None:
        """Until the node is gone, however it went: killed, it leaves a half line, or a reset instead of an end."""
        with contextlib.suppress(OSError, ValueError):
            for line in self._reader:
                request = json.loads(line)
                if request["op"] == "ping":
                    self.notify(alive=True)
                elif request["op"] == "abandon":
                    self._abandoned.add(request["arguments"]["assignment"])
                else:
                    self._requests.put(request)
        os._exit(0)

    def _send(self, message: dict[str, Any]) -> None:
        data = (json.dumps(message) + "\n").encode()
        with self._write_lock:
            try:
                self._connection.sendall(data)
            except OSError:
                os._exit(0)


def open_channel() -> Channel:
    """The channel on the file descriptor that the node named as the first argument."""
    return Channel(socket.socket(fileno=int(sys.argv[1])))
