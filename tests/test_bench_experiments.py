"""``python -m tests.bench experiments``: suites, their order and rules, campaigns, tables and the command."""

import csv
import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_bench_experiments_runs import MAKE, TINY, record_of, run_with, spec_of

from sb3_clipvf.zoo.commands import hyperparams_path
from tests.bench.experiments import main, runs
from tests.bench.experiments.command import Campaign
from tests.bench.experiments.executors import Finished
from tests.bench.experiments.runs import Record, RunSpec, check_folder, prepare_folder, this_machine
from tests.bench.experiments.suite import Suite, zoo_settings
from tests.bench.experiments.suite_file import FOLDER, read_suite, suite_names
from tests.bench.experiments.tables import SuiteTable
from tests.bench.results import ROOT

CONTENT: dict[str, Any] = {
    "kind": "report",
    "first_seed": 1000,
    "evaluation_episodes": 2,
    "settings": {"constant": {"clip_range": 0.2}, "annealed": {"clip_range": "lin_0.2"}},
    "environments": {
        "CartPole-v1": {"steps": 64, "seeds": 2, "settings": TINY},
        "Pendulum-v1": {"steps": 96, "seeds": 1, "vec_env": "gymnasium", "settings": {"clip_range": 0.3}},
    },
}


def suite_file(folder: Path, changes: Callable[[dict[str, Any]], None] | None = None) -> str:
    content = json.loads(json.dumps(CONTENT))
    if changes is not None:
        changes(content)
    path = folder / "small.yml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.fixture
def small(tmp_path: Path) -> Suite:
    return read_suite(suite_file(tmp_path))


class FakeExecutor:
    """Calls a function in place of the run, in this process."""

    def __init__(self, run: Callable[[RunSpec], Record]) -> None:
        self.made: list[str] = []
        self._run = run

    def run(self, specs: Sequence[RunSpec]) -> Generator[Finished, None, None]:
        for spec in specs:
            self.made.append(spec.label)
            try:
                yield Finished(spec, self._run(spec), "", 1.0)
            except ValueError as error:
                yield Finished(spec, None, str(error), 1.0)


def campaign(suite: Suite, folder: Path) -> Campaign:
    return Campaign(suite, SuiteTable(folder / "results", suite.name), folder / "logs", 1)


# --- suites


def test_suite_of_the_defaults_compares_four_settings_in_thirteen_environments(tmp_path: Path) -> None:
    suite = read_suite("defaults")
    specs = [spec for _, spec in suite.runs(tmp_path)]
    assert len(specs) == 4 * (6 * 10 + 7 * 5)
    # Each setting in each environment once, before any a second time.
    assert {spec.seed for spec in specs[: 4 * 13]} == {1000}
    assert len({(spec.env_id, spec.folder.parent.name) for spec in specs[: 4 * 13]}) == 4 * 13
    assert {spec.seed for spec in specs} == set(range(1000, 1010))
    assert {spec.n_timesteps for spec in specs if spec.env_id.endswith("-v5")} == {500_000}
    suite.check_settings()


def test_constant_setting_of_the_defaults_is_sb3s(tmp_path: Path) -> None:
    (spec,) = [
        s for n, s in read_suite("defaults").runs(tmp_path) if (s.env_id, s.seed, n) == ("Hopper-v5", 1000, "constant")
    ]
    assert spec.hyperparams == {
        "policy": "MlpPolicy",
        "n_timesteps": 500_000,
        "normalize": True,
        "clip_range": 0.2,
        "clip_range_vf": None,
    }


def test_runs_go_seed_by_seed_over_environments_and_settings(small: Suite, tmp_path: Path) -> None:
    found = small.runs(tmp_path)
    assert [(spec.env_id, setting, spec.seed) for setting, spec in found] == [
        ("CartPole-v1", "constant", 1000),
        ("CartPole-v1", "annealed", 1000),
        ("Pendulum-v1", "constant", 1000),
        ("Pendulum-v1", "annealed", 1000),
        ("CartPole-v1", "constant", 1001),
        ("CartPole-v1", "annealed", 1001),
    ]
    setting, spec = found[1]
    assert spec.folder == tmp_path / "small" / "CartPole-v1" / "annealed" / "seed_1000"
    assert spec.hyperparams == {"policy": "MlpPolicy", "n_timesteps": 64, **TINY, "clip_range": "lin_0.2"}
    assert (spec.n_timesteps, spec.vec_env, spec.n_eval_episodes) == (64, "dummy", 2)
    assert found[2][1].vec_env == "gymnasium"
    assert (found[2][1].hyperparams or {})["clip_range"] == 0.2  # the suite's settings change the environment's
    assert pickle.loads(pickle.dumps(spec)) == spec  # for executors on other machines


@pytest.mark.parametrize("name", suite_names())
def test_suites_of_the_repository_are_whole(name: str, tmp_path: Path) -> None:
    suite = read_suite(name)
    suite.check_settings()
    n_runs = len(suite.runs(tmp_path))
    n_steps = sum(spec.n_timesteps for _, spec in suite.runs(tmp_path))
    assert f"# {n_runs} runs, {n_steps / 1e6:.0f} million steps" in (FOLDER / f"{name}.yml").read_text()
    for _, spec in suite.runs(tmp_path):
        # So that runs of other defaults are recognised as other runs. `family` has the packaged settings.
        hyperparams = spec.hyperparams or {}
        assert {"clip_range", "clip_range_vf"} <= hyperparams.keys() or name == "family"
        assert hyperparams.get("clip_range_vf") is None or {"vf_clip", "vf_clip_units"} <= hyperparams.keys()
    assert 1 <= len(suite.quick().runs(tmp_path)) <= 8


def test_best_setting_of_each_family_of_table_1_is_made_first(tmp_path: Path) -> None:
    suite = read_suite("table1")
    found = suite.runs(tmp_path)
    assert {setting for setting, _ in found[: 4 * 7 * 3]} == {"clip-0.2", "adaptive-0.01", "fixed-3", "none"}
    assert {spec.seed for _, spec in found[: 4 * 7]} == {1000}
    assert suite.settings["clip-0.2"].expected == "score 0.82"
    assert len({json.dumps(spec.hyperparams) for _, spec in found if spec.env_id == "Hopper-v5"}) == 11


def test_algorithms_have_their_own_settings_of_the_zoo(tmp_path: Path) -> None:
    suite = read_suite("family").only(["HalfCheetah-v5"], ["A2C", "TRPO"])
    a2c, trpo = (spec for _, spec in suite.runs(tmp_path) if spec.seed == 1000)
    # The Zoo's entries for HalfCheetah-v4, of a million steps.
    assert (a2c.algo, a2c.hyperparams) == ("a2c", {"policy": "MlpPolicy", "normalize": True, "n_timesteps": 500_000})
    assert (trpo.algo, trpo.hyperparams) == (
        "trpo",
        {
            "policy": "MlpPolicy",
            "normalize": True,
            "n_timesteps": 500_000,
            "n_envs": 2,
            "n_steps": 1024,
            "batch_size": 128,
            "gamma": 0.99,
            "gae_lambda": 0.95,
            "sub_sampling_factor": 1,
            "cg_max_steps": 25,
            "cg_damping": 0.1,
            "n_critic_updates": 20,
            "learning_rate": 0.001,
            "target_kl": 0.04,
        },
    )
    own = zoo_settings("Acrobot-v1", "clipppo")
    assert own == yaml.safe_load(hyperparams_path().read_text())["Acrobot-v1"]
    with pytest.raises(ValueError, match=r"needs an entry for Reacher-v5, but .*a2c.yml has none. Write the settings"):
        zoo_settings("Reacher-v5", "a2c")
    with pytest.raises(ValueError, match="needs an entry for default"):
        zoo_settings("default", "a2c")


def test_environment_of_another_suite_and_its_own_settings(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["environments"] = {
            "Acrobot-v1": {"as_in": "defaults", "steps": 5, "seeds": 1},
            "CartPole-v1": {"steps": 64, "seeds": 1, "only": ["annealed"]},
        }
        content["first"] = ["annealed"]
        content["settings"]["annealed"]["expected"] = "all"

    suite = read_suite(suite_file(tmp_path, change))
    found = suite.runs(tmp_path)
    assert [(spec.env_id, setting) for setting, spec in found] == [
        ("Acrobot-v1", "annealed"),
        ("CartPole-v1", "annealed"),
        ("Acrobot-v1", "constant"),
    ]
    spec = found[0][1]
    assert (spec.vec_env, spec.n_timesteps, len(read_suite("defaults").environments)) == ("envpool", 5, 13)
    assert spec.hyperparams is not None and (spec.hyperparams["n_envs"], spec.hyperparams["n_timesteps"]) == (16, 5)
    assert "expected" not in spec.hyperparams
    assert campaign(suite, tmp_path).listed().splitlines()[2].endswith("0 of 1 seeds done (expected: all)")
    scored = replace(suite, best_result_score=True)
    assert campaign(scored, tmp_path).listed().splitlines()[2].endswith("(expected over all environments: all)")
    assert [spec.env_id for _, spec in suite.only(None, ["constant"]).runs(tmp_path)] == ["Acrobot-v1"]
    with pytest.raises(ValueError, match="`--settings` must be made in one of `--envs`, got constant"):
        suite.only(["CartPole-v1"], ["constant"])


def test_some_environments_and_settings_and_a_quick_suite(small: Suite, tmp_path: Path) -> None:
    some = small.only(["Pendulum-v1"], ["annealed"])
    assert [(spec.env_id, setting) for setting, spec in some.runs(tmp_path)] == [("Pendulum-v1", "annealed")]
    quick = read_suite("defaults").quick()
    specs = [spec for _, spec in quick.runs(tmp_path)]
    assert quick.name == "defaults-quick"
    assert {(spec.env_id, spec.seed, spec.n_timesteps, spec.n_eval_episodes) for spec in specs} == {
        ("CartPole-v1", 1000, 4096, 2),
        ("MountainCarContinuous-v0", 1000, 4096, 2),
    }


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(key)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.__setitem__(key, value)


def in_cartpole(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["environments"]["CartPole-v1"].__setitem__(key, value)


@pytest.mark.parametrize(
    "changes, match",
    [
        (put("kind", "final"), "`kind` must be tune or report, got 'final'"),
        (put("first_seed", 999), "seeds of a suite of kind report must be from 1000, got 999"),
        (put("kind", "tune"), "seeds of a suite of kind tune must be 0 to 999, got 1000"),
        (drop("settings"), "`suite` must have the entry `settings`, got none"),
        (put("settings", {}), "`settings` must have at least one entry"),
        (put("settings", {"a/b": {}}), "a name must consist of letters.*got 'a/b'"),
        (put("settings", {"a": 3}), "`settings.a` must be a dict of settings, got 3"),
        (put("setings", {}), "`suite` must be a known name, got 'setings'. Did you mean settings?"),
        (put("environments", []), "`environments` of `suite` must be of type dict"),
        (put("evaluation_episodes", 0), "`evaluation_episodes` must be at least 1, got 0"),
        (in_cartpole("steps", "1e5"), "`steps` of `environments.CartPole-v1` must be of type int, got '1e5'"),
        (in_cartpole("steps", True), "`steps` of `environments.CartPole-v1` must be of type int, got True"),
        (in_cartpole("settings", "zo"), "`environments.CartPole-v1.settings` must be a dict of settings, got 'zo'"),
        (
            in_cartpole("only", ["anealed"]),
            "`environments.CartPole-v1.only` must be a known name, got 'anealed'. Did you mean",
        ),
        (
            in_cartpole("as_in", "defalts"),
            "`environments.CartPole-v1.as_in` must be a known name, got 'defalts'. Did you mean defau",
        ),
        (put("first", ["anealed"]), "`first` must be a known name, got 'anealed'. Did you mean annealed?"),
        (put("settings", {"a": {"algo": 1}}), "`algo` of `settings.a` must be of type str, got 1"),
        (in_cartpole("seeds", 0), "`environments.CartPole-v1.seeds` must be at least 1"),
        (in_cartpole("vec_env", "pool"), "`environments.CartPole-v1.vec_env` must be a known name, got 'pool'"),
        (put("environments", {"CartPole-v1": None}), "`environments.CartPole-v1` must be a dict of steps"),
    ],
)
def test_bad_suites_are_refused(tmp_path: Path, changes: Callable[[dict[str, Any]], None], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_suite(suite_file(tmp_path, changes))


def test_seeds_for_tuning_end_below_those_for_reporting(tmp_path: Path) -> None:
    def tune(content: dict[str, Any]) -> None:
        content["kind"], content["first_seed"] = "tune", 998

    assert len(read_suite(suite_file(tmp_path, tune)).runs(tmp_path)) == 6  # seeds 998 and 999
    with pytest.raises(ValueError, match="must be 0 to 999, got 1000"):
        read_suite(suite_file(tmp_path, lambda content: (tune(content), in_cartpole("seeds", 3)(content))[0]))


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            lambda c: c["environments"].update({"CartPole-v7": {"steps": 5, "seeds": 1}}),
            "got 'CartPole-v7'. Did you mean",
        ),
        (lambda c: c["settings"].update(bad={"clip_rnge": 0.1}), "`clip_rnge` must be an argument of ClipPPO"),
        (
            lambda c: c["settings"].update(bad={"algo": "pppo"}),
            "`settings.bad.algo` must be a known name, got 'pppo'",
        ),
        (
            lambda c: c["settings"].update(bad={"algo": "a2c"}),
            "`batch_size` must be an argument of A2C or a key of the RL Zoo",
        ),
    ],
)
def test_unknown_environments_and_keys_are_refused_before_the_first_run(
    tmp_path: Path, changes: Callable[[dict[str, Any]], None], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        read_suite(suite_file(tmp_path, changes)).check_settings()


# --- campaign


def test_runs_are_made_in_order_and_written(small: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    executor = FakeExecutor(lambda spec: replace(record_of(float(spec.seed)), jobs=7 if spec.seed == 1000 else None))
    campaign(small, tmp_path).run(executor)
    assert executor.made == [spec.label for _, spec in small.runs(tmp_path)]
    with (tmp_path / "results" / "small.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["env"], row["setting"], row["seed"]) for row in rows][:2] == [
        ("CartPole-v1", "annealed", "1000"),
        ("CartPole-v1", "annealed", "1001"),
    ]
    # Without the number in the record, it is that of this command.
    assert [row["jobs"] for row in rows[:2]] == ["7", "1"]
    row = rows[1]
    assert (row["suite"], row["steps"], row["last_return"], row["evaluation_mean"]) == ("small", "64", "1001", "2002")
    assert (row["mean_return"], row["num_timesteps"], row["jobs"]) == ("", "64", "1")
    assert row["numpy_version"] == np.__version__ and row["cpu"]
    packed = (tmp_path / "results" / "small" / "CartPole-v1" / "annealed" / "1001.csv.gz").read_bytes()
    assert gzip.decompress(packed).decode() == "step,return,episodes,seconds\n10,1.5,1,0.5\n20,2.0,1,\n"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 runs to make, 0 are done already; time left is not known yet"
    assert lines[1].startswith(
        "[1/6] CartPole-v1, constant, seed 1000: last 100 episodes 1000.0, evaluation 2000.0; 1 s | "
    )
    assert lines[-1].startswith("[6/6]") and lines[-1].endswith(" steps/s, about 0 h 00 min left")


def test_finished_runs_are_skipped(small: Suite, tmp_path: Path) -> None:
    first = FakeExecutor(lambda spec: record_of())
    campaign(small.only(["CartPole-v1"], None), tmp_path).run(first)
    before = (tmp_path / "results" / "small.csv").read_text()
    second = FakeExecutor(lambda spec: record_of())
    campaign(small, tmp_path).run(second)
    assert second.made == ["Pendulum-v1, constant, seed 1000", "Pendulum-v1, annealed, seed 1000"]
    assert (tmp_path / "results" / "small.csv").read_text().startswith(before)
    # A row without its episodes is made again.
    (tmp_path / "results" / "small" / "CartPole-v1" / "constant" / "1001.csv.gz").unlink()
    assert [spec.label for _, spec in campaign(small, tmp_path).todo] == ["CartPole-v1, constant, seed 1001"]


def test_failed_run_does_not_stop_the_others(small: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(spec: RunSpec) -> Record:
        if spec.env_id == "Pendulum-v1":
            raise ValueError("it fell over")
        return record_of()

    made = campaign(small, tmp_path)
    made.run(FakeExecutor(run))
    assert made.failed == {f"Pendulum-v1, {name}, seed 1000": "it fell over" for name in ("constant", "annealed")}
    assert "[3/6] Pendulum-v1, constant, seed 1000: FAILED, it fell over; 1 s | " in capsys.readouterr().out
    again = campaign(small, tmp_path)
    assert len(again.todo) == 2
    path = tmp_path / "results" / "small-failed.csv"
    with path.open() as file:
        assert [(row["env"], row["setting"], row["seed"], row["error"]) for row in csv.DictReader(file)] == [
            ("Pendulum-v1", name, "1000", "it fell over") for name in ("annealed", "constant")
        ]
    again.run(FakeExecutor(lambda spec: record_of()))
    assert not path.exists()


def test_two_commands_may_add_runs_at_once(small: Suite, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.test_bench_experiments import *\n"
        "suite, table = read_suite(sys.argv[1]), SuiteTable(Path(sys.argv[2]), 'small')\n"
        "for setting, spec in suite.only([sys.argv[3]], None).runs(Path()):\n"
        "    for seed in range(1000, 1020): table.add(setting, replace(spec, seed=seed), record_of(), 1)"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", program, str(tmp_path / "small.yml"), str(tmp_path / "results")]
    processes = [
        subprocess.Popen([*command, env_id], env={**os.environ, "PYTHONPATH": paths})
        for env_id in ("CartPole-v1", "Pendulum-v1")
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(SuiteTable(tmp_path / "results", "small").rows) == 2 * 2 * 20


def test_resumed_runs_count_neither_in_the_speed_nor_in_the_time_left(
    small: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = record_of()
    resumed = replace(resumed, scores={**resumed.scores, "run_seconds": None})
    some = small.only(["CartPole-v1"], None)
    campaign(some, tmp_path).run(FakeExecutor(lambda spec: resumed))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert all("; 1 s since it was resumed | 0 steps/s, time left is not known yet" in line for line in lines[:-1]), (
        lines
    )
    assert campaign(small, tmp_path).listed().endswith("2 of 6 runs to make; time left is not known yet")
    made_before = Finished(some.runs(tmp_path)[0][1], record_of(), "", 0.0)
    assert not made_before.is_whole and made_before.time_text() == "made before"


# --- nothing is mixed or overwritten


def test_runs_of_mixed_versions_are_refused(small: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_folder(spec_of(tmp_path / "run"))
    campaign(small.only(["Pendulum-v1"], None), tmp_path).run(FakeExecutor(lambda spec: record_of()))
    before = (tmp_path / "results" / "small.csv").read_text()
    now = {**this_machine(), "versions": {**this_machine()["versions"], "numpy": "9.9"}}
    monkeypatch.setattr(runs, "this_machine", lambda: now)
    with pytest.raises(ValueError, match=r"versions of its start, but has numpy '.*' \(now '9.9'\)"):
        check_folder(spec_of(tmp_path / "run"))
    monkeypatch.setattr("tests.bench.experiments.tables.this_machine", lambda: now)
    with pytest.raises(ValueError, match=r"one set of versions, but has numpy_version '.*' \(now '9.9'\). Move it"):
        campaign(small, tmp_path)
    assert (tmp_path / "results" / "small.csv").read_text() == before


def test_rows_of_other_settings_are_refused(small: Suite, tmp_path: Path) -> None:
    campaign(small.only(["Pendulum-v1"], None), tmp_path).run(FakeExecutor(lambda spec: record_of()))
    changed = read_suite(suite_file(tmp_path, put("evaluation_episodes", 3)))
    with pytest.raises(ValueError, match="the suite's settings, but Pendulum-v1, constant, seed 1000 was made with"):
        campaign(changed, tmp_path)


@pytest.mark.parametrize("change", [lambda text: "a,b\n1,2\n", lambda text: text[:-40], lambda text: ""])
def test_foreign_and_cut_tables_are_refused(small: Suite, tmp_path: Path, change: Callable[[str], str]) -> None:
    campaign(small.only(["Pendulum-v1"], None), tmp_path).run(FakeExecutor(lambda spec: record_of()))
    path = tmp_path / "results" / "small.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match="`--out` must be a folder of results of suites, but .*small.csv has other"):
        SuiteTable(tmp_path / "results", "small")


# --- the command


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A working folder, the quick stand-in for a run, and the name of the suite's file."""
    monkeypatch.chdir(tmp_path)
    record_of().write(tmp_path / "made.json")
    run_with(monkeypatch, MAKE, str(tmp_path / "made.json"))
    suite_file(tmp_path)
    return "small.yml"


def test_command_makes_lists_and_skips_runs(in_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([in_folder, "--envs", "CartPole-v1", "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 runs to make, 0 are done already;")
    assert printed.endswith("Results: docs/results/experiments/small.csv\n")
    assert Path("logs/bench/experiments/small/CartPole-v1/annealed/seed_1001/train.log").read_text() == "made\n"
    settings = yaml.safe_load(
        Path("logs/bench/experiments/small/CartPole-v1/annealed/seed_1001/settings.yml").read_text()
    )
    assert settings["CartPole-v1"]["clip_range"] == "lin_0.2"
    assert main([in_folder, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        "CartPole-v1 constant 64 steps 2 of 2 seeds done, last 100 episodes 5.0, evaluation 10.0".split(),
        "CartPole-v1 annealed 64 steps 2 of 2 seeds done, last 100 episodes 5.0, evaluation 10.0".split(),
        "Pendulum-v1 constant 96 steps 0 of 1 seeds done".split(),
    ]
    assert lines[-1].startswith("2 of 6 runs to make; about 0 h 00 min left")


def test_command_leaves_out_runs_that_another_one_makes(
    in_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(monkeypatch, f"raise SystemExit({runs.IN_PROGRESS_CODE})")
    assert main([in_folder, "--envs", "Pendulum-v1"]) == 0
    assert "2 runs are left out, since another command makes them." in capsys.readouterr().out
    assert not Path("docs").exists()


def test_command_reports_failures(
    in_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(monkeypatch, "raise ValueError('broken')")
    assert main([in_folder, "--envs", "Pendulum-v1", "--settings", "annealed"]) == 1
    printed = capsys.readouterr().out
    assert "Failed:\n  Pendulum-v1, annealed, seed 1000: ValueError: broken (code 1), see " in printed
    (path,) = Path("docs/results/experiments").iterdir()
    assert path.name == "small-failed.csv"
    row = path.read_text().splitlines()[1]
    # Without the place of the log.
    assert row.startswith("Pendulum-v1,annealed,1000,") and row.endswith(",ValueError: broken (code 1)")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt_ends_the_runs_and_keeps_what_is_done(
    in_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main([in_folder, "--envs", "CartPole-v1"]) == 0
    # The run interrupts the campaign and would then last for an hour.
    run_with(monkeypatch, f"import os, signal, time\nos.kill(os.getppid(), signal.{name})\ntime.sleep(3600)")
    assert main([in_folder]) == 130
    assert "Interrupted. The same command resumes with what is missing." in capsys.readouterr().out
    assert len(Path("docs/results/experiments/small.csv").read_text().splitlines()) == 1 + 4


@pytest.mark.parametrize(
    "options, match",
    [
        ("defalts", "value-clip-forms, or a .yml file, got 'defalts'"),
        (
            "small.yml --envs CartPole-v2",
            "`--envs` must be a known name, got 'CartPole-v2'. Did you mean CartPole-v1?",
        ),
        ("small.yml --settings anealed", "got 'anealed'. Did you mean annealed?"),
        ("broken.yml", "`suite` must be a YAML file, got broken.yml"),
        ("small.yml --log-folder foreign", "must be empty or the folder of a run"),
        ("small.yml --jobs 0", "--jobs: must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(in_folder: str, capsys: pytest.CaptureFixture[str], options: str, match: str) -> None:
    Path("broken.yml").write_text("a: [")
    foreign = Path("foreign/small/CartPole-v1/constant/seed_1001")
    foreign.mkdir(parents=True)
    (foreign / "mine.txt").touch()
    with pytest.raises(SystemExit, match="2"):
        main(options.split())
    assert match in capsys.readouterr().err
    assert not Path("docs").exists()


@pytest.mark.slow
def test_real_quick_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["environments"] = {"CartPole-v1": {**content["environments"]["CartPole-v1"], "vec_env": "gymnasium"}}

    monkeypatch.chdir(tmp_path)
    name = suite_file(tmp_path, change)
    assert main([name, "--quick", "--jobs", "2"]) == 0
    with Path("logs/bench/experiments/results/small-quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["env"], row["setting"]) for row in rows] == [
        ("CartPole-v1", setting) for setting in ("annealed", "constant")
    ]
    assert all(row["evaluation_mean"] for row in rows)
    assert rows[0]["last_return"] and rows[0]["seconds"]
    assert len({row["digest"] for row in rows}) == 2
