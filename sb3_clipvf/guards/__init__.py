"""Checks during a training: non-finite numbers, failures, dead workers, wrong observations, processes that differ."""
