"""The documentation: its examples run, its commands and options exist, its tables are complete."""

import doctest
import importlib.util
import inspect
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure

import sb3_clipvf
from sb3_clipvf import ClipPPO
from sb3_clipvf.engines.device import LARGEST_ON_CPU, choose_cpu
from sb3_clipvf.schedules import make_schedule
from sb3_clipvf.zoo import COMMANDS
from sb3_clipvf.zoo.entries import ZOO_KEYS
from sb3_clipvf.zoo.settings import constructor_keys
from tests import bench
from tests.bench.__main__ import BENCHMARKS

DOCS = Path(__file__).resolve().parents[1] / "docs"
# results/ is written by the benchmark, and the build is HTML.
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in [*DOCS.glob("*.md"), *DOCS.glob("api/*.md")])
PAGES.append("../README.md")
# Enough for two rollouts of the examples, though not to learn anything.
MAX_STEPS = 300


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


def commands(program: str = "sb3-clipvf") -> list[list[str]]:
    lines = [
        line for page in PAGES for block in blocks(page, "console") for line in block.replace("\\\n", " ").splitlines()
    ]
    start = f"$ {program} "
    return [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start)]


def source_of(name: str) -> str:
    """The text of the modules in which a sub-command reads its options; found without importing them."""
    package, *path = COMMANDS[name].target.partition(":")[0].split(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    module = Path(spec.origin).parent.joinpath(*path)
    if module.is_dir():
        # The plot commands have a module each in one package.
        files = [module / f"{name}.py"]
    else:
        files = [module.with_suffix(".py")]
    if name == "train":
        # Its options that the Zoo does not have.
        files.append(Path(inspect.getfile(ClipPPO)).with_name("zoo") / "options.py")
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def parameters_of(command: list[str]) -> list[str]:
    """The tokens ``key:value`` behind ``-params``."""
    tokens = command[command.index("-params") + 1 :] if "-params" in command else []
    return [token for token in tokens if re.match(r"\w+:", token)]


def test_the_api_lists_what_the_package_exports() -> None:
    sentence = re.search(r"The package `sb3_clipvf` exports (.*?)\.\n", text_of("api/index.md"), re.DOTALL)
    assert sentence is not None
    assert sorted(re.findall(r"`(\w+)`", sentence[1])) == sorted(sb3_clipvf.__all__)


@pytest.fixture
def in_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An empty folder and one torch thread."""
    monkeypatch.chdir(tmp_path)
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(n_threads)


@pytest.fixture
def short_trainings(monkeypatch: pytest.MonkeyPatch, in_folder: None) -> None:
    """An empty folder, one torch thread, ``MAX_STEPS`` of one epoch for longer trainings, and short evaluations."""

    def few_episodes(*args: Any, n_eval_episodes: int, **kwargs: Any) -> Any:
        return evaluate_policy(*args, n_eval_episodes=min(n_eval_episodes, 2), **kwargs)

    limit_trainings(monkeypatch, MAX_STEPS)
    monkeypatch.setattr("stable_baselines3.common.evaluation.evaluate_policy", few_episodes)


def limit_trainings(monkeypatch: pytest.MonkeyPatch, max_steps: int) -> None:
    """Limit the steps of longer trainings, and their epochs to one."""
    learn = ClipPPO.learn

    def short(self: ClipPPO, total_timesteps: float, *args: Any, **kwargs: Any) -> ClipPPO:
        if total_timesteps > max_steps:
            total_timesteps, self.n_epochs = max_steps, 1
        return learn(self, total_timesteps, *args, **kwargs)

    monkeypatch.setattr(ClipPPO, "learn", short)


# The migration page shows that a file of SB3 loads with this warning.
@pytest.mark.filterwarnings("ignore:The file was not saved by ClipPPO")
@pytest.mark.usefixtures("short_trainings")
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_examples_run(page: str) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize("script", sorted((DOCS / "examples").glob("*.py")), ids=lambda script: script.name)
def test_example_scripts_run(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # The shortest training of tensor_environment.py in which episodes end; other scripts take fewer steps.
    limit_trainings(monkeypatch, 7 * 32 * 4096)
    assert f"examples/{script.name}" in text_of("examples.md")
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.usefixtures("short_trainings")
def test_the_cells_of_the_notebook_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plt, "show", lambda: None)
    notebook = json.loads(text_of("examples/quickstart.ipynb"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), namespace)
    plt.close("all")
    assert "steps" in capsys.readouterr().out


@pytest.mark.parametrize("page", pages_with("pycon"))
def test_interactive_examples_print_what_the_page_shows(page: str) -> None:
    example = doctest.DocTestParser().get_doctest("\n".join(blocks(page, "pycon")), {}, page, page, 0)
    report: list[str] = []
    failed, attempted = doctest.DocTestRunner().run(example, out=report.append)
    assert attempted > 0
    assert failed == 0, "".join(report)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_and_their_options_exist(command: list[str]) -> None:
    name, *arguments = command
    assert name in COMMANDS
    source = source_of(name)
    for option in (token for token in arguments if re.match(r"--?[a-zA-Z]", token)):
        assert f'"{option}"' in source, f"{name} has no option {option}"


@pytest.mark.parametrize("command", commands("python -m tests.bench"), ids=" ".join)
def test_benchmarks_and_their_options_exist(command: list[str]) -> None:
    name, *arguments = command
    assert name in BENCHMARKS
    source = "".join(file.read_text(encoding="utf-8") for file in Path(bench.__file__).parent.rglob("*.py"))
    for option in (token for token in arguments if token.startswith("--")):
        assert f'"{option}"' in source, f"{name} has no option {option}"


def test_the_contributors_page_runs_all_tests_that_need_a_gpu() -> None:
    tests = Path(__file__).parent
    (command,) = re.findall(r"^\$ python -m pytest -m cuda (.*?);", text_of("../CONTRIBUTING.md"), re.M)
    chosen = {path for pattern in command.split() for path in tests.parent.glob(pattern)}
    mark = "mark." + "cuda"
    assert {path for path in tests.glob("test_*.py") if mark in path.read_text(encoding="utf-8")} <= chosen


def test_parameters_on_command_lines_are_keys_of_the_settings() -> None:
    keys = {token.partition(":")[0] for command in commands() for token in parameters_of(command)}
    # The example of an error.
    assert keys - (constructor_keys() | ZOO_KEYS) == {"clip_rnge"}


def test_every_argument_has_its_place_in_the_migration_tables() -> None:
    tables = "\n".join(line for line in text_of("migration.md").splitlines() if line.startswith("|"))
    for name in set(inspect.signature(ClipPPO.__init__).parameters) - {"self"}:
        assert f"`{name}`" in tables, name


class LocalNames(BaseCallback):
    names: frozenset[str] = frozenset()

    def _on_step(self) -> bool:
        self.names = frozenset(self.locals)
        return True


def test_the_documented_names_for_callbacks_exist() -> None:
    section = text_of("callbacks.md").partition("## What a callback sees")[2].partition("\n## ")[0]
    promised = {
        name
        for row in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    callback = LocalNames()
    ClipPPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(8, callback=callback)
    assert "infos" in promised
    assert promised <= callback.names


def test_the_glossary_has_every_key_of_the_log_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    glossary = set(re.findall(r"`((?:train|rollout|time|eval)/\w+)`", text_of("metrics.md")))
    env = make_vec_env("MountainCarContinuous-v0", env_kwargs={"max_episode_steps": 16})
    model = ClipPPO(
        "MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=2, device="cpu", adaptive_kl_target=0.01, kl_coef=1.0,
        clip_range_vf=1.0, on_nonfinite="skip",
    )  # fmt: skip
    logger, logged = configure(None, []), set()
    record = logger.record
    monkeypatch.setattr(logger, "record", lambda key, *rest, **kwargs: (logged.add(key), record(key, *rest, **kwargs)))
    model.set_logger(logger)
    model.learn(64)
    # Logged by SB3 only with an environment that reports success, or by its EvalCallback.
    elsewhere = {"rollout/success_rate", "eval/mean_reward", "eval/mean_ep_length", "eval/success_rate"}
    assert logged == glossary - elsewhere


@pytest.mark.usefixtures("short_trainings")
@pytest.mark.parametrize(("policy", "env"), [("MlpPolicy", "CartPole-v1"), ("SquashedMlpPolicy", "Pendulum-v1")])
def test_the_engines_page_quotes_the_log(policy: str, env: str, capsys: pytest.CaptureFixture[str]) -> None:
    ClipPPO(policy, env, n_steps=32, batch_size=32, n_epochs=1, device="cpu", verbose=1).learn(32)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Training runs on"))
    assert f"\n{line}\n" in text_of("engines.md")


def test_the_engines_page_has_the_rule_of_the_device() -> None:
    page = text_of("engines.md")
    for largest in LARGEST_ON_CPU.values():
        assert f"| at most {largest // 10**6} million | CPU |" in page
    reason = choose_cpu("auto", "native MLP", 9_155, 256)[1]
    assert f"\ndevice='auto' selects 'cpu': {reason}\n" in page


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_written_as_github_draws_them(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    assert "$$" not in text, "displayed formulas are blocks of the language `math`"
    displayed, inline = blocks(page, "math"), re.findall(r"\$([^$]+)\$", re.sub(r"`[^`]*`", "", text))
    assert not [formula for formula in displayed + inline if r"\operatorname" in formula], "GitHub refuses this command"
    assert not [formula for formula in inline if re.search(r"\\[^a-zA-Z]", formula)], "Markdown removes the backslash"
    for formula in displayed:
        outside = re.sub(r"\\begin\{(\w+)\}.*?\\end\{\1\}", "", formula, flags=re.DOTALL)
        assert "&" not in outside and r"\\" not in outside, "lines need an environment, such as `aligned`"


def test_the_table_of_schedules_has_their_values() -> None:
    rows = re.findall(r"^\| `(\w+_0\.2)` \|[^|]*\| ([^\n]*) \|$", text_of("algorithm.md"), flags=re.MULTILINE)
    assert len(rows) == 4
    for text, values in rows:
        schedule = make_schedule(text, "clip_range")
        # The table gives four decimals.
        expected = [round(schedule(p), 4) for p in (1.0, 0.75, 0.5, 0.25, 0.0)]
        assert [float(value) for value in values.split(" | ")] == expected
