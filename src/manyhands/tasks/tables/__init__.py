"""What the two table tasks, tabular and survival, have in common."""
