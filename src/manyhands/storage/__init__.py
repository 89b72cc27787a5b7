"""The database: runs and their leases, event logs, the outbox of effects, snapshots of state, metadata of
blobs.

Synchronous and thread-safe: a `Database` may be used from any number of threads; programs with an event loop
call it through `asyncio.to_thread`. What a call has returned from is on the disk (SQLite in WAL mode with
synchronous=FULL). Free of torch.
"""
