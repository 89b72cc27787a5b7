"""The client program: `join` takes part in a run."""

from manyhands.node.client.node import ClientOptions, join

__all__ = ["ClientOptions", "join"]
