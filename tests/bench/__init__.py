"""Benchmarks, campaigns and experiments, which write ``docs/results/``. Run ``python -m tests.bench`` in a clone."""
