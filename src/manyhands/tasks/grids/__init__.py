"""The grids task: puzzles on coloured grids, from ARC's files or generated (task.py is where to start)."""

from manyhands.tasks.grids.task import FAMILY, load_pretrained

__all__ = ["FAMILY", "load_pretrained"]
