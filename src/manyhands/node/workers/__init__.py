"""Programs that import torch, each a process of its own that a node starts and speaks to over a socket."""
