"""Checks during training: non-finite numbers, failures, dead workers, wrong observations, processes that differ."""
