"""Imports and compiled kernels that the server of the fault campaign loads before it forks."""
# ruff: noqa: F401

import contextlib
import importlib

# Otherwise, the first optimizer of each process spends four seconds on this import.
import torch._dynamo

import sb3_clipvf.checkpoint
import sb3_clipvf.engines.fused
import sb3_clipvf.envs
import sb3_clipvf.zoo.experiment
import tests.bench.faults_files
import tests.bench.faults_kills
from sb3_clipvf.engines.kernels.warmup import warm_up

for _name in ("gymnasium.envs.mujoco.half_cheetah_v5", "gymnasium.envs.classic_control", "hypothesis"):
    with contextlib.suppress(ImportError):  # a row that needs a missing package reports it
        importlib.import_module(_name)
for _group in ("native", "fused"):
    warm_up(_group)
