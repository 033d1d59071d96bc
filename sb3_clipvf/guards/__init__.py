"""Checks during a training: non-finite numbers, failures, dead worker processes, observations of wrong shapes."""
