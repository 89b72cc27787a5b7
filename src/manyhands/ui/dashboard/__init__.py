"""The web dashboard: the list of runs, and a page for each run that follows it live."""
