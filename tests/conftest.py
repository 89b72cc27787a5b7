"""Every process of the tests computes with one thread, unless a test says otherwise: there are few cores, many
processes run at a time, and threads that wait for each other on a busy core take most of its time."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
