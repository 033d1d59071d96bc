"""Tests of how functions are compiled and kept."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest

from sb3_clipvf import compiled


def test_without_a_writable_folder_it_says_so_and_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    njit = numba.njit

    def without_folder(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cache"):
            raise RuntimeError("no locator available")
        return njit(*args, **kwargs)

    monkeypatch.setattr(compiled, "njit", without_folder)
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        double = compiled.cached()(lambda x: 2 * x)
    assert double(4) == 8
    assert "cannot be kept on disk (no locator available). Point NUMBA_CACHE_DIR to a folder" in caplog.text


@pytest.mark.slow
def test_a_change_of_any_kernel_is_noticed(tmp_path: Path) -> None:
    """numba's cache looks at one file; the kernels lie in several."""
    package = Path(compiled.__file__).parent
    copied = tmp_path / "sb3_clipvf"
    for source in package.rglob("*.py"):
        target = copied / source.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    program = (
        "import numpy as np\n"
        "from sb3_clipvf.engines.kernels import entry\n"
        "a = np.ones((2, 1), np.float32)\n"
        "out = np.zeros((2, 1), np.float32)\n"
        "entry.advantages_and_returns(a, a, a, a[0], a[0], 0.5, 1.0, out, out.copy())\n"
        "print(out[0, 0], sum(entry.advantages_and_returns.stats.cache_hits.values()))\n"
    )

    def run() -> list[str]:
        environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=tmp_path,
            timeout=300,
        )
        return result.stdout.split()

    assert run() == ["0.0", "0"]
    assert run() == ["0.0", "1"]
    rollout = copied / "engines" / "kernels" / "rollout.py"
    source = rollout.read_text()
    changed = source.replace("advantage = delta + decay", "advantage = F(7) + delta + decay")
    assert changed != source
    rollout.write_text(changed)
    assert run() == ["7.0", "0"]
