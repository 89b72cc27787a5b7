"""The server program: `serve` prepares a plan's run, or takes it up again, and serves it."""

from manyhands.node.server.program import ServerOptions, serve

__all__ = ["ServerOptions", "serve"]
