"""Processes of the host, told apart by more than their number."""

from __future__ import annotations

import os

AT_ONCE = "ended-at-once"
"""In a run's directory, where somebody has had its processes killed."""
ASKED = "asked-to-end"
"""In a run's directory, where its training was asked to save and end: a second time it would leave at once."""


def boot() -> str | None:
    """Tells one start of this machine from the next."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def begun(pid: int | None) -> int | None:
    """When a process began, in ticks, so that a number that came back is not taken for it; None: it is gone."""
    if pid is None:
        return None
    if not os.path.isdir("/proc/self"):  # the number alone
        try:
            os.kill(pid, 0)
            return 0
        except OSError:
            return None
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except OSError:
        return None


def killed_by_kernel() -> int | None:
    """How many processes of this machine the kernel has killed for memory; None where it does not tell."""
    try:
        with open("/proc/vmstat", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    except (OSError, StopIteration, ValueError):
        return None
