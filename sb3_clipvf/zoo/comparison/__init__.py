"""The page of ``sb3-clipvf report RUNS``: runs as their files show them, compared by settings and seeds."""
