"""Read and write models and statistics, atomically and without running code from a file."""
