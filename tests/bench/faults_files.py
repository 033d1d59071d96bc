"""Files that are damaged at random and read: each must give what was saved, or an error that names the damage."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.bench.faults_processes import Tally, append_line, finish, limit_memory, limit_processor, read_lines, start
from tests.bench.faults_training import Training, digest, digest_of

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

READS_IN_A_PROCESS = 250

MEMORY = 2**30
"""Bytes by which a process that reads may grow."""

SECONDS = 20.0
"""Processor time for reading one file with all readers."""

_HEADERS = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06")
_HEADER_LENGTH = 64
_SECTOR = 512

KINDS = ("checkpoint", "model", "statistics")
"""A checkpoint, what ``save`` of a model writes, and what ``save`` of normalised environments writes."""

_Reader = Callable[[Path], dict[str, str]]


@dataclass
class FileCampaign:
    """Damage to the files of one training, of a kind in :data:`KINDS`."""

    training: Training
    kind: str
    folder: Path
    seed: int

    def run(self, index: int, wanted: int) -> Tally:
        """Damage a file and read it, up to :data:`READS_IN_A_PROCESS` times, and count the outcomes."""
        path = self._file()
        report = path.with_suffix(".report")
        report.unlink(missing_ok=True)
        tally = Tally()
        first, last = index * READS_IN_A_PROCESS, index * READS_IN_A_PROCESS + min(wanted, READS_IN_A_PROCESS)
        while first < last:
            code = finish(start(read_damaged, report, self.training, self.kind, path, self.seed, first, last))
            lines = read_lines(report)
            if lines and lines[-1]["event"] == "error":
                raise RuntimeError(f"the whole {path} cannot be read: {lines[-1]['text']}")
            done = [line for line in lines if line["event"] == "read" and line["number"] >= first]
            for line in done:
                outcome = _outcome(line)
                tally.counts[outcome[1]] += 1
                tally.add(outcome[0], "" if outcome[0] == "survived" else _described(line))
            first += len(done)
            if first < last:
                tally.add("unclear", f"damage {self.seed}, {first}: the process ended with code {code}")
                first += 1
        return tally

    def _file(self) -> Path:
        """Return the whole file, the same one for all calls, since a new one may have other bytes."""
        folder = self.folder / self.training.name
        path = folder / f"{self.kind}.whole"
        if not path.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            code = finish(start(write_files, folder / "report", self.training, folder))
            if code != 0 or not path.exists():
                raise RuntimeError(f"the files of {self.training.name} were not made: {read_lines(folder / 'report')}")
        return path


def damaged(content: bytes, generator: np.random.Generator) -> tuple[bytes, str]:
    """Damage a file's bytes as disks, networks and crashes do, and describe the damage."""
    at = _place(content, generator)
    length = int(generator.integers(1, 65))
    noise = generator.bytes(length)
    kind = str(generator.choice(["bit", "byte", "bytes", "zeros", "cut", "insert", "remove"]))
    if kind == "bit":
        changed = content[:at] + bytes([content[at] ^ 1 << int(generator.integers(8))]) + content[at + 1 :]
    elif kind == "byte":
        changed = content[:at] + noise[:1] + content[at + 1 :]
    elif kind == "bytes":
        changed = content[:at] + noise[: len(content) - at] + content[at + length :]
    elif kind == "zeros":
        end = min(at + _SECTOR, len(content))
        changed = content[:at] + bytes(end - at) + content[end:]
    elif kind == "cut":
        changed = content[:at]
    elif kind == "insert":
        changed = content[:at] + noise + content[at:]
    else:
        changed = content[:at] + content[at + length :]
    return changed, f"{kind} at {at} of {len(content)}, {base64.b64encode(noise).decode()}"


def _place(content: bytes, generator: np.random.Generator) -> int:
    """Draw a place; half of all damage hits the headers of zips, which are a small part of a file."""
    at = int(generator.integers(len(content)))
    if generator.integers(2):
        return at
    # The nearest header after a random place, or the first one.
    found = [start for header in _HEADERS if (start := content.find(header, at)) >= 0]
    found = found or [start for header in _HEADERS if (start := content.find(header)) >= 0]
    return min(min(found) + int(generator.integers(_HEADER_LENGTH)), len(content) - 1) if found else at


def write_files(report: Path, training: Training, folder: Path) -> None:
    """Train briefly and write one file of each kind, in a separate process."""
    from sb3_clipvf.checkpoint import TrainingCheckpoint

    env = training.make_env(None)
    model = training.make_model(env)
    steps = 4 * model.n_steps * model.n_envs
    model.learn(steps, callback=TrainingCheckpoint(steps, folder / "checkpoints", on_signal=False))
    shutil.copy(folder / "checkpoints" / f"checkpoint_{model.num_timesteps}.zip", folder / "checkpoint.whole")
    model.save(folder / "model.zip")
    (folder / "model.zip").rename(folder / "model.whole")
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        normalizer.save(str(folder / "statistics.whole"))
    env.close()


def read_damaged(report: Path, training: Training, kind: str, path: Path, seed: int, first: int, last: int) -> None:
    """Damage a file and read it, from damage ``first`` to the one before ``last``, in a separate process."""
    content = path.read_bytes()
    readers = _readers(kind, training.make_env(None))
    victim = path.with_name("checkpoint_1.zip" if kind == "checkpoint" else f"{kind}.damaged")
    victim.write_bytes(content)
    whole = {name: reader(victim) for name, reader in readers.items()}
    limit_memory(MEMORY)
    for number in range(first, last):
        changed, what = damaged(content, np.random.default_rng((seed, number)))
        victim.write_bytes(changed)
        limit_processor(SECONDS)
        results = {name: _result(reader, victim, whole[name]) for name, reader in readers.items()}
        limit_processor(0)
        append_line(report, event="read", number=number, seed=seed, what=what, file=path.name, results=results)


def _readers(kind: str, env: VecEnv) -> dict[str, _Reader]:
    """Return the ways to read a file, each of which returns a digest of what it has read."""
    from sb3_clipvf import ClipPPO
    from sb3_clipvf.checkpoint import read_manifest
    from sb3_clipvf.envs import FastVecNormalize

    def statistics(path: Path) -> dict[str, str]:
        loaded = FastVecNormalize.load(str(path), env.unwrapped)
        numbers = {name: value for name, value in vars(loaded).items() if isinstance(value, (bool, int, float))}
        return {"numbers": digest_of(numbers), "moments": digest_of([vars(loaded.obs_rms), vars(loaded.ret_rms)])}

    if kind == "statistics":
        return {"FastVecNormalize.load": statistics}
    load: _Reader = lambda path: digest(ClipPPO.load(path, device="cpu"))  # noqa: E731
    if kind == "model":
        return {"ClipPPO.load": load}
    return {
        "read_manifest": lambda path: {"manifest": digest_of(vars(read_manifest(path)))},
        "ClipPPO.load": load,
        "ClipPPO.resume": lambda path: digest(ClipPPO.resume(path, env, device="cpu")),
    }


def _result(reader: _Reader, path: Path, whole: dict[str, str]) -> str:
    """Return "same", "other: <parts>", "refused: <class>", or "unclear: <error>"."""
    try:
        found = reader(path)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return f"refused: {type(error).__name__}" if is_clear(error, path) else f"unclear: {text[:500]}"
    differing = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
    return f"other: {', '.join(differing)}" if differing else "same"


def is_clear(error: Exception, path: Path) -> bool:
    """Return whether an error is of a class documented for damaged files, or a ValueError that names the file."""
    from sb3_clipvf import UnsafeFileError
    from sb3_clipvf.checkpoint import DamagedCheckpointError, NotACheckpointError

    if isinstance(error, (UnsafeFileError, DamagedCheckpointError, NotACheckpointError)):
        return True
    return type(error) is ValueError and path.name in str(error)


def _outcome(line: dict[str, Any]) -> tuple[str, str]:
    """Return the outcome, and the name under which it is counted."""
    results = list(line["results"].values())
    if any(result.startswith("unclear") for result in results):
        return "unclear", "unclear errors"
    if any(result.startswith("other") for result in results):
        return "wrong", "wrong"
    is_same = all(result == "same" for result in results)
    return "survived", "the same state" if is_same else "refused by a reader"


def _described(line: dict[str, Any]) -> str:
    results = "; ".join(f"{name}: {result}" for name, result in line["results"].items())
    return f"{line['file']}, damage {line['seed']}, {line['number']} ({line['what']}): {results}"
