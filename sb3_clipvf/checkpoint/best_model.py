"""
The file of a best model: one zip with the model, its ``VecNormalize`` statistics and its score, replaced atomically.

No system replaces two files at once. The copy of the statistics beside the zip, for ``VecNormalize.load``, is therefore
written after it, and again by the next reader if a kill came in between.
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
"""Name of the score in the zip; the statistics have the name of their own file."""


def write_best_model(path: Path, model: BaseAlgorithm, score: dict[str, Any]) -> bytes | None:
    """Write a model with its statistics and its score, which has a ``mean_reward``. Return the pickled statistics."""
    # In memory first: torch turns an error of the disk in the middle of its zip into another, misleading one.
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
    """Return the score in a model's file, or None if it has none. Raise a ValueError if it cannot be read."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            score = read_json(archive, SCORE_ENTRY) if SCORE_ENTRY in archive.namelist() else None
        if score is not None and not (isinstance(score, dict) and isinstance(score.get("mean_reward"), float)):
            raise ValueError("it holds no mean return")
    except Exception as error:  # a damaged zip raises whatever its parts lead to
        raise ValueError(f"the evaluation in it could not be read ({reason_of(error)})") from error
    return score


def read_statistics(path: Path) -> bytes | None:
    """Return the pickled statistics in a model's file, or None if it has none."""
    return dict(entries_of(*read_bytes(path, None))).get(STATISTICS_FILE)


def publish(path: Path, content: bytes | None) -> None:
    """Write a copy of what a best model's file holds, unless it is complete; remove one of an earlier model."""
    if content is None:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_bytes() != content:
        with atomic_write(path) as file:
            file.write(content)
