"""
Run Stable-Baselines3's own tests with ClipPPO in PPO's place.

``python tests/host_suite/run.py [--only test_save_load.py ...] [--sdist DIR] [--control] [pytest's arguments]``

The tests come from the source distribution of the SB3 that is installed. It is downloaded once into
``build/host_suite``; nothing of it is part of this repository. Every test file that names PPO runs, with the plugin
``ppo_is_clipppo`` loaded first. ``exceptions.toml`` lists the tests that ClipPPO is meant to fail, and why.

It ends with 0 if every other test passes or is skipped, and every exception fails in the way that is written there.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
CACHE = REPOSITORY / "build" / "host_suite"


def main(argv: list[str] | None = None) -> int:
    """
    Run the suite.

    :param argv: Command line without the program's name. None: the process's own.
    :return: pytest's exit status.
    """
    parser = argparse.ArgumentParser(
        description="Run Stable-Baselines3's own tests with ClipPPO in PPO's place.",
        epilog="Further arguments go to pytest, such as -x, -k NAME or -n 2.",
        allow_abbrev=False,
    )
    parser.add_argument("--only", nargs="+", metavar="FILE", help="run these files only, such as test_save_load.py")
    parser.add_argument("--sdist", type=Path, metavar="DIR", help="SB3's unpacked source distribution, not downloaded")
    parser.add_argument("--control", action="store_true", help="leave SB3's PPO in place, to tell whose a failure is")
    args, pytest_args = parser.parse_known_args(argv)

    try:
        sdist = (args.sdist or host_sdist(version("stable-baselines3"))).resolve()
    except subprocess.CalledProcessError:
        parser.error("SB3's source distribution could not be downloaded. Unpack it yourself and pass `--sdist DIR`.")
    files = files_with_ppo(sdist / "tests")
    names = [file.name for file in files]
    unknown = sorted(set(args.only or []) - set(names))
    if unknown:
        parser.error(f"`--only` must name test files that use PPO ({', '.join(names)}), got {', '.join(unknown)}.")
    selected = [file for file in files if args.only is None or file.name in args.only]
    return run_pytest(sdist, selected, pytest_args, control=args.control)


def host_sdist(host_version: str) -> Path:
    """
    Find SB3's source distribution in the cache, or download it.

    :param host_version: Version of the installed SB3.
    :return: Folder with its ``tests`` and its ``pyproject.toml``.
    :raises subprocess.CalledProcessError: If pip cannot download it.
    """
    name = f"stable_baselines3-{host_version}"
    folder = CACHE / name
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(CACHE)]
    source = ["--no-deps", "--no-binary", "stable-baselines3", f"stable-baselines3=={host_version}"]
    subprocess.run([*pip, *source], check=True)
    # Unpacked beside its place and renamed: a run that is interrupted leaves nothing that looks complete.
    unpacked = CACHE / f"{name}.part"
    with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
        archive.extractall(unpacked, filter="data")
    (unpacked / name).rename(folder)
    unpacked.rmdir()
    return folder


def files_with_ppo(tests: Path) -> list[Path]:
    """
    Find the test files that name PPO.

    :param tests: SB3's tests.
    :return: In the order of their names.
    :raises FileNotFoundError: If there are none.
    """
    candidates = sorted(tests.glob("test_*.py"))
    files = [file for file in candidates if re.search(r"\bPPO\b", file.read_text(encoding="utf-8"))]
    if not files:
        raise FileNotFoundError(f"`--sdist` must hold SB3's tests, got {tests} with no test of PPO. Leave it out.")
    return files


def run_pytest(sdist: Path, files: list[Path], pytest_args: list[str], control: bool) -> int:
    """
    Run the files in a process of their own, which imports the installed SB3 under SB3's own pytest settings.

    :param sdist: SB3's source distribution.
    :param files: Its test files to run.
    :param pytest_args: Further arguments of pytest.
    :param control: Whether to leave SB3's PPO in place.
    :return: pytest's exit status.
    """
    scratch = CACHE / "run"
    scratch.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    paths = [str(HERE), str(REPOSITORY), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # The sdist brings a copy of SB3's package, which must not shadow the installed one.
    environment["PYTHONSAFEPATH"] = "1"
    # Without this, torch's threads fight for the cores and the tests' small networks take several times longer.
    environment.setdefault("OMP_NUM_THREADS", "1")
    plugin = [] if control else ["-p", "ppo_is_clipppo"]
    command = [sys.executable, "-m", "pytest", *plugin, "-c", str(sdist / "pyproject.toml"), "--rootdir", str(sdist)]
    options = ["-p", "no:cacheprovider", "-q", "-rfEs", "--tb=short", *pytest_args]
    return subprocess.run([*command, *options, *map(str, files)], cwd=scratch, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
