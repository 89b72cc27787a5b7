"""Other machines over SSH: which there are, whether they can, and trainings that run there and are seen here."""
