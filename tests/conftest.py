"""Every process of the tests computes with one thread, unless a test says otherwise: there are few cores, many
processes run at a time, and threads that wait for each other on a busy core take most of its time.

Ctrl-C reaches what a test starts, as in a terminal: the tests' own worker processes ignore it, and that is inherited.
"""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)
