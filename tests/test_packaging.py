"""Builds of the source tree: an editable install that type checkers see, a wheel, a source distribution."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import sb3_clipvf

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = "sb3_clipvf/hyperparams/clipppo.yml"


def run(*command: str | Path, cwd: Path) -> str:
    # Not this checkout, where a path in PYTHONPATH leads.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Call a hook of the build backend, as pip does: ``editable``, ``sdist`` or ``wheel``."""
    target.mkdir()
    run(sys.executable, "-c", f"from setuptools import build_meta as b; b.build_{kind}({str(target)!r})", cwd=source)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, since builds write beside what they read."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "_build", "build", "dist", "logs", "results")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


def test_type_checkers_find_an_editable_install(source: Path, tmp_path: Path) -> None:
    environment, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    venv.create(environment, symlinks=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    with ZipFile(build("editable", source, tmp_path / "editable")) as wheel:
        wheel.extractall(site_packages)
    elsewhere.mkdir()
    (elsewhere / "script.py").write_text("import sb3_clipvf\nreveal_type(sb3_clipvf.ClipPPO)\n")
    checked = run(
        sys.executable, "-m", "mypy", "--python-executable", environment / "bin" / "python", "--cache-dir", tmp_path,
        "script.py", cwd=elsewhere,
    )  # fmt: skip
    assert "-> sb3_clipvf.clip_ppo.ClipPPO" in checked
    code = "from importlib.resources import files; print(files('sb3_clipvf') / 'hyperparams' / 'clipppo.yml')"
    assert Path(run(environment / "bin" / "python", "-I", "-c", code, cwd=elsewhere).strip()) == source / SETTINGS


def test_the_settings_are_a_file_of_the_wheel(source: Path, tmp_path: Path) -> None:
    with ZipFile(build("wheel", source, tmp_path / "wheel")) as wheel:
        names = wheel.namelist()
        assert wheel.read(SETTINGS) == (ROOT / "hyperparams" / "clipppo.yml").read_bytes()
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert "sb3_clipvf/py.typed" in names
    assert {f"sb3_clipvf/zoo/comparison/page.{kind}" for kind in ("css", "html", "js")} <= {*names}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sb3_clipvf").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    # A package index has no files beside the description.
    assert "# sb3_clipvf\n" in metadata
    links = re.findall(r"\]\(([^)]*)\)", metadata)
    assert links and all(link.startswith("https://") for link in links)
    assert "![" not in metadata


def test_a_source_distribution_builds_the_same_wheel(source: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("sb3_clipvf-*")
    wheels = [build("wheel", tree, tmp_path / name) for tree, name in ((source, "here"), (unpacked, "there"))]
    ours, theirs = (sorted(ZipFile(wheel).namelist()) for wheel in wheels)
    assert ours == theirs


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone, whose files are known")
def test_a_source_distribution_has_all_files_of_a_clone(tmp_path: Path) -> None:
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name, follow_symlinks=False)
    with tarfile.open(build("sdist", tmp_path / "tree", tmp_path / "sdist")) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in names if name == "PKG-INFO" or ".egg-info/" in name}
    # The link to the settings becomes a folder.
    assert names - made == {*tracked, SETTINGS} - {"sb3_clipvf/hyperparams"}


@pytest.mark.parametrize(("pip_works", "created"), [("true", False), ("false", True)])
def test_make_keeps_an_environment_that_works(pip_works: str, created: bool, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    for path, lines in ((folder / "bin/python", pip_works), (tmp_path / "python", f'echo "$@" >> {tmp_path}/calls')):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
    run("make", f"VENV={folder}", f"PYTHON={tmp_path}/python", f"{folder}/.installed-venv", cwd=ROOT)
    assert (f"-m venv --clear {folder}" in (tmp_path / "calls").read_text()) == created
    assert (folder / ".installed-venv").exists()


def test_each_imported_package_is_required() -> None:
    """By its own name, since packages that bring it may allow versions that lack what is imported."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = "".join([config["options"]["install_requires"], *config["options.extras_require"].values()])
    # Extras count: gymnasium[mujoco].
    required = {name.lower().replace("_", "-") for name in re.findall(r"[\w-]+", re.sub("[<>=].*", "", lines))}
    distributions = packages_distributions()
    trees = [ast.parse(path.read_text()) for path in (ROOT / "sb3_clipvf").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    packages = {name.partition(".")[0] for name in names} - {"sb3_clipvf", *sys.stdlib_module_names}
    for package in sorted(packages):
        names = [package, *distributions.get(package, [])]
        assert {name.lower().replace("_", "-") for name in names} & required, package


def test_each_extra_is_asked_for_by_name_where_it_is_missed() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = dict(config["options.extras_require"])
    everything = re.findall(r"\w+", extras.pop("all").partition("[")[2])
    assert set(everything) == set(extras)
    files = [path for folder in ("sb3_clipvf", "tests/bench") for path in (ROOT / folder).rglob("*.py")]
    code = "".join(path.read_text() for path in files)
    assert set(re.findall(r"'sb3_clipvf\[(\w+)\]'", code)) == set(extras) - {"dev"}
    table = (ROOT / "docs" / "quickstart.md").read_text().partition("| extra |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(extras)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (sb3_clipvf.__version__, "MIT")


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https://|#)([^)#]*)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
