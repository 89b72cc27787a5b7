"""Chess endgames with exact truth: truth.py makes positions and needs no torch, task.py is where the task starts."""
