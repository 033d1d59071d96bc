"""
Search hyperparameters on all nodes of a Ray cluster.

python docs/recipes/ray_search.py <workers> --env <id> --study-name <name> --storage <file.log> <other options of train>

Workers share the study by its name and its storage. Without them, each searches alone.
"""

import os
import subprocess
import sys

import ray

ray.init("auto", log_to_driver=False)


@ray.remote(num_cpus=1)
def search(folder: str, options: list[str]) -> None:
    """Make trials of the study in the storage, in a process of its own. All nodes have the folder."""
    subprocess.run([sys.executable, "-m", "sb3_clipvf", "train", "-optimize", *options], cwd=folder, check=True)


ray.get([search.remote(os.getcwd(), sys.argv[2:]) for _ in range(int(sys.argv[1]))])
