"""The layout of the package: layers that import one way, short modules, and pages that name only existing files."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sb3_clipvf"

# A module imports modules of its own layer and of those above it. An entry is a module or a folder of modules.
# docs/architecture.md describes them.
LAYERS = (
    ("objectives", "policies", "common"),
    ("schedules", "distributions", "distributed", "rollout", "files"),
    ("envs", "engines"),
    ("arguments", "checkpoint"),
    ("guards", "callbacks"),
    ("collection", "tensor_collection", "tensor_rollouts", "data_parallel"),
    ("clip_ppo",),
    ("zoo",),
    ("__main__",),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


def modules_of(package: Path) -> dict[str, Path]:
    """Paths by dotted names within the package; "" is the package itself."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


def imported_by(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports anywhere: in functions and for annotations, too."""
    prefix = "sb3_clipvf"
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.partition(".")[0] != prefix:
                continue
            inner = name[len(prefix) + 1 :]
            yield inner if inner in modules else inner.rpartition(".")[0]


def breaches(package: Path) -> list[str]:
    """Imports of the package that go from a layer to one below it, as text."""
    modules, found = modules_of(package), []
    for name, path in modules.items():
        if not name:
            continue
        own = LAYER_OF[name.partition(".")[0]]
        for imported in imported_by(path, modules):
            # The package itself only names what it exports.
            layer = LAYER_OF["clip_ppo"] if not imported else LAYER_OF[imported.partition(".")[0]]
            if layer > own:
                found.append(f"{name} (layer {own + 1}) imports {imported or 'sb3_clipvf'} (layer {layer + 1})")
    return found


def cycles(package: Path) -> set[str]:
    """Modules that import themselves by way of others."""
    modules = modules_of(package)
    edges = {name: set(imported_by(path, modules)) - {name, ""} for name, path in modules.items()}
    reached = {name: set(targets) for name, targets in edges.items()}
    for _ in modules:
        grown = {
            name: targets | {far for near in targets for far in reached[near]} for name, targets in reached.items()
        }
        if grown == reached:
            break
        reached = grown
    return {name for name, targets in reached.items() if name in targets}


def test_every_module_has_a_layer() -> None:
    assert {name.partition(".")[0] for name in modules_of(PACKAGE) if name} == set(LAYER_OF)


def test_imports_go_one_way() -> None:
    assert breaches(PACKAGE) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert cycles(PACKAGE) == set()


@pytest.mark.parametrize(
    "statement",
    [
        "from sb3_clipvf.zoo.cli import main",
        "def f():\n    from sb3_clipvf.zoo import cli",
        "import typing\nif typing.TYPE_CHECKING:\n    import sb3_clipvf.zoo.cli",
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, statement: str) -> None:
    package = tmp_path / "sb3_clipvf"
    for folder in (package, package / "zoo"):
        folder.mkdir()
        (folder / "__init__.py").touch()
    (package / "zoo" / "cli.py").write_text("from sb3_clipvf import rollout\n")
    (package / "rollout.py").touch()
    assert breaches(package) == [] and cycles(package) == set()
    (package / "rollout.py").write_text(statement)
    assert breaches(package) == ["rollout (layer 2) imports zoo.cli (layer 8)"]
    assert cycles(package) == {"rollout", "zoo.cli"}


def test_modules_are_short() -> None:
    long = {name: n for name, path in modules_of(PACKAGE).items() if (n := len(path.read_text().splitlines())) > 450}
    assert long.keys() <= {"clip_ppo"} and sum(long.values()) <= 700


def test_the_top_of_the_package_is_small() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 15


FOLDERS = sorted(
    str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("*/__init__.py") if path.parent != PACKAGE
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_packages_list_their_modules(folder: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
    listed = sorted(re.findall(r"^- ``(\w+)``: ", docstring or "", re.MULTILINE))
    paths = [path for path in (PACKAGE / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert listed == sorted(path.stem for path in paths if path.stem != "__init__")


PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "docs/api/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md"
]
# Files of other packages and of users.
OTHERS = {"ppo.py", "train.py", "x.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_files_that_exist(page: Path) -> None:
    folders = [ROOT, PACKAGE, ROOT / "tests", ROOT / "docs", *(path for path in PACKAGE.iterdir() if path.is_dir())]
    text = page.read_text()
    names = set(re.findall(r"`([\w./-]+\.(?:py|cfg|toml))`", text)) - OTHERS
    assert not [name for name in names if not any((folder / name).exists() for folder in folders)]
    links = re.findall(r"\]\(((?!https?:|#|mailto:)[^)#\s]+)", text)
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_objects_that_exist(page: Path) -> None:
    for name in set(re.findall(r"\bsb3_clipvf(?:\.\w+)+", page.read_text())):
        found = importlib.import_module("sb3_clipvf")
        for part in name.split(".")[1:]:
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)
