"""Tuned settings of ClipPPO for the RL Zoo command, one YAML file an algorithm."""
