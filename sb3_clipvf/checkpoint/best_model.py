"""
The file of a best model: one zip with the model, its ``VecNormalize`` statistics and its score, replaced atomically.

Two files cannot be replaced in one atomic step. A copy of the statistics, for ``VecNormalize.load``, is written beside
the zip, after it. A process that reads both during a save may get files of two saves. The zip alone is consistent.
"""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_clipvf.files.archive import entries_of, read_bytes, read_json, reason_of
from sb3_clipvf.files.atomic import atomic_write
from sb3_clipvf.files.statistics import STATISTICS_FILE, statistics_bytes

SCORE_ENTRY = "evaluation.json"
"""Entry of the zip with the score. The entry with the statistics is ``STATISTICS_FILE``."""


def write_best_model(path: Path, model: BaseAlgorithm, score: dict[str, Any]) -> bytes | None:
    """Write a model with its statistics and its score, which holds ``mean_reward``; return the pickled statistics."""
    # In memory first: if a write of its zip fails, torch hides the disk's error behind a misleading one.
    content = io.BytesIO()
    model.save(content)
    normalizer = model.get_vec_normalize_env()
    statistics = None if normalizer is None else statistics_bytes(normalizer)
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr(SCORE_ENTRY, json.dumps(score))
        if statistics is not None:
            archive.writestr(STATISTICS_FILE, statistics)
    with atomic_write(path) as file:
        file.write(content.getbuffer())
    return statistics


def read_score(path: Path) -> dict[str, Any] | None:
    """Return the score in a model's zip, or None without a zip or a score. Raise ValueError if it cannot be read."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            score = read_json(archive, SCORE_ENTRY) if SCORE_ENTRY in archive.namelist() else None
        if score is not None and not (isinstance(score, dict) and isinstance(score.get("mean_reward"), float)):
            raise ValueError("it holds no mean return")
    except Exception as error:  # zipfile and JSON raise many types for damaged bytes
        raise ValueError(f"the evaluation in it could not be read ({reason_of(error)})") from error
    return score


def read_statistics(path: Path) -> bytes | None:
    """Return the pickled statistics in a model's zip, or None if it has none."""
    return dict(entries_of(*read_bytes(path, None))).get(STATISTICS_FILE)


def write_copy(path: Path, content: bytes | None) -> None:
    """Write a copy beside a best model's zip, unless it is complete; None removes the copy of an earlier model."""
    if content is None:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_bytes() != content:
        with atomic_write(path) as file:
            file.write(content)
