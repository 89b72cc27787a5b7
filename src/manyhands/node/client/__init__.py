"""The client program: `join` takes part in a run."""

from manyhands.node.client.node import join
from manyhands.node.client.options import ClientOptions

__all__ = ["ClientOptions", "join"]
