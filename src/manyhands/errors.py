"""The exception tree. Every error that a user can meet has a class here and an exit code.

    ManyhandsError            1   anything not named below
    ├── PlanError             3   a plan, an override or a combination that is not valid
    ├── DataError             4   missing, empty or broken training data
    ├── IdentityError         5   a key file that is missing, malformed or readable by others
    ├── ServerUnreachable     6   no answer, or the address is in use
    ├── Refused               7   the other side said no: wrong run, version, key, plan; a directory in use
    ├── ProtocolError         8   a message that does not fit the protocol
    ├── StorageError          9   the database or the disk
    │   └── Fenced            9   another server owns the run now
    ├── BlobError            10   a payload that is truncated, oversized, corrupt or not to be had
    ├── UpdateError          11   an update whose schema, indices or values are not acceptable
    ├── WorkerError          12   a worker process failed
    │   ├── NotFinite        12   the loss or a gradient is not finite, on every process of the training
    │   └── RankLost         14   another process of the same training ended first
    ├── MissingExtra         13   an optional part is not installed
    └── Interrupted         130   SIGINT or SIGTERM

A message says what, the value, what was expected, and what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class ManyhandsError(Exception):
    """Base of all errors that manyhands raises on purpose; `exit_code` is what the command returns."""

    exit_code: ClassVar[int] = 1


class PlanError(ManyhandsError):
    exit_code = 3


class DataError(ManyhandsError):
    exit_code = 4


class IdentityError(ManyhandsError):
    exit_code = 5


class ServerUnreachable(ManyhandsError):
    exit_code = 6


class Refused(ManyhandsError):
    exit_code = 7


class ProtocolError(ManyhandsError):
    exit_code = 8


class StorageError(ManyhandsError):
    exit_code = 9


class Fenced(StorageError):
    """An append was refused because a newer owner of the run holds the lease."""


class BlobError(ManyhandsError):
    exit_code = 10


class UpdateError(ManyhandsError):
    exit_code = 11


class WorkerError(ManyhandsError):
    exit_code = 12


class NotFinite(WorkerError):
    """The loss or a gradient is infinite or no number; every process of a training finds it at once."""


class RankLost(WorkerError):
    exit_code = 14


class MissingExtra(ManyhandsError):
    exit_code = 13


class Interrupted(ManyhandsError):
    exit_code = 130
