"""Runs in one process: the same plan, the same `tick`, the same five functions, and no network."""
