"""Engines act with a policy and update it. ``autograd`` is the reference; others differ in speed and rounding."""
