"""What the RL Zoo's plots need: runs, episodes, evaluations."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_clipvf.zoo import main

RUNS = Path("logs") / "clipppo"


@pytest.fixture(autouse=True)
def _folder_of_runs(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.zoo.cli.has_display", lambda: False)
    RUNS.mkdir(parents=True)


def _make_run(name: str, n_evaluations: int = 0, n_episodes: int = 5, n_training: int = 0, step: int = 100) -> None:
    run = RUNS / name
    run.mkdir()
    if n_evaluations:
        steps = step * np.arange(1, n_evaluations + 1)
        results = np.arange(n_evaluations * n_episodes, dtype=float).reshape(n_evaluations, n_episodes)
        np.savez(run / "evaluations.npz", timesteps=steps, results=results, ep_lengths=results)
    rows = "".join(f"{i}.0,10,{i}.5\n" for i in range(n_training))
    (run / "0.monitor.csv").write_text(f'#{{"t_start": 0.0, "env_id": "E-v0"}}\nr,l,t\n{rows}')


def _refused(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(command.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["(Set SB3_CLIPVF_TRACEBACK=1 to see the traceback.)"]
    return lines[0]


@pytest.mark.parametrize("command", ["all_plots", "plot_train"])
def test_an_environment_without_runs_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"with runs in {RUNS}, got 'E-v0'. The runs are: none." in _refused(f"{command} -e E-v0", capsys)
    _make_run("Other-v1_1", 3, n_training=200)
    assert "got 'E-v0'. The runs are: Other-v1_1." in _refused(f"{command} -e Other-v1 E-v0", capsys)
    assert "with runs in elsewhere" in _refused(f"{command} -e E-v0 -f elsewhere", capsys)


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ([{}], "", "they were trained without evaluations in logs/clipppo. Train with `--eval-freq`."),
        ([{"n_evaluations": 1}], "", "they have one evaluation in logs/clipppo."),
        ([{"n_evaluations": 3}], "-max 99", "evaluations.npz has none up to `-max` 99. Pass more."),
        (
            [{"n_evaluations": 3}],
            "-k successes",
            "has no 'successes' for `--key`. It has timesteps, results, ep_lengths.",
        ),
        ([{"n_evaluations": 3, "n_episodes": 1}], "", "one run with one episode in each evaluation"),
        ([{"n_evaluations": 3}, {"n_evaluations": 3, "n_episodes": 4}], "", "they differ in the episodes"),
    ],
)
def test_evaluations_that_cannot_be_drawn_are_refused(
    runs: list[dict[str, int]], options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, run in enumerate(runs):
        _make_run(f"E-v0_{number}", **run)
    assert message in _refused(f"all_plots -e E-v0 {options}", capsys)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([[[1.0, 2.0], [3.0, np.nan]]], "in logs/ppo/E-v0_0/evaluations.npz differ in the number of episodes. Use"),
        ([[[1.0, 2.0]] * 2, [[1.0]] * 2], "they differ in the episodes of an evaluation in logs/ppo"),
    ],
)
def test_evaluations_that_differ_are_refused_beside_others(
    runs: list[list[list[float]]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _make_run("E-v0_1", 3)
    for number, results in enumerate(runs):
        run = RUNS.parent / "ppo" / f"E-v0_{number}"
        run.mkdir(parents=True)
        np.savez(run / "evaluations.npz", timesteps=[100, 200], results=results, ep_lengths=results)
    assert message in _refused("all_plots -e E-v0 -a clipppo ppo", capsys)


def test_damaged_evaluations_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    _make_run("E-v0_1", 3)
    path = RUNS / "E-v0_1" / "evaluations.npz"
    path.write_bytes(path.read_bytes()[:300])
    assert f"{path} must hold evaluations of SB3's EvalCallback, but is damaged" in _refused(
        "all_plots -e E-v0", capsys
    )


@pytest.mark.parametrize(
    ("runs", "options"),
    [
        ([{"n_evaluations": 3}], ""),
        ([{"n_evaluations": 3}], "-max 100"),
        ([{"n_evaluations": 3}, {"n_evaluations": 1}, {}], ""),
        ([{"n_evaluations": 2}, {"n_evaluations": 4, "n_episodes": 4}], ""),
        ([{"n_evaluations": 3, "n_episodes": 1}] * 2, ""),
    ],
)
def test_evaluations_that_can_be_drawn_are(runs: list[dict[str, int]], options: str) -> None:
    for number, run in enumerate(runs):
        _make_run(f"E-v0_{number}", **run)
    assert main(f"all_plots -e E-v0 --no-display {options}".split()) == 0


def test_all_evaluations_are_in_the_table_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    _make_run("E-v0_1", 3, step=2_000_000)
    assert main("all_plots -e E-v0 --no-display".split()) == 0
    assert "|12 +/- 0|" in capsys.readouterr().out  # the mean of 10 to 14, the last evaluation
    assert main("all_plots -e E-v0 --no-display -max 4000000".split()) == 0
    assert "|7 +/- 0|" in capsys.readouterr().out


def test_runs_that_are_left_out_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for number, n_evaluations in enumerate((4, 2, 4, 1)):
        _make_run(f"E-v0_{number}", n_evaluations)
    command = "all_plots -e E-v0 --no-display --print-n-trials"
    for options, names, n_trials in (("", "E-v0_1, E-v0_3", 2), ("-max 200", "E-v0_3", 3), ("-min 200", "E-v0_3", 3)):
        assert main(f"{command} {options}".split()) == 0
        out = capsys.readouterr().out
        assert f"Left out, with fewer evaluations than other runs in {RUNS}: {names}\n" in out
        assert f"E-v0-CLIPPPO-logs: {n_trials}\n" in out


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        (
            [(10, 100), (20, 1000)],
            "-max 2000",
            "were evaluated at different steps. Keep them in different folders (`-f`)",
        ),
        ([(10, 100), (10, 1000)], "", "logs/clipppo/E-v0_1 and logs/clipppo/E-v0_0 were evaluated at different steps"),
        ([(10, 100), (5, 1000)], "-min 2000", "were evaluated at different steps"),
        ([(10, 100), (5, 1000)], "-max 500", "E-v0_1/evaluations.npz has none up to `-max` 500. Pass more."),
        (
            [(10, 100), (9, 50)],  # the second is shorter than `-min`, with as many evaluations up to `-max`
            "-min 1000 -max 500",
            "were evaluated at different steps. Keep them in different folders (`-f`).",
        ),
        ([(10, 100)], "-min 2000", "no run reaches `-min` 2000 in logs/clipppo. Pass less."),
    ],
)
def test_evaluations_at_other_steps_are_refused(
    runs: list[tuple[int, int]], options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (n_evaluations, step) in enumerate(runs):
        _make_run(f"E-v0_{number}", n_evaluations, step=step)
    assert message in _refused(f"all_plots -e E-v0 --no-display {options}", capsys)


def test_long_runs_are_compared_at_the_nearest_steps(capsys: pytest.CaptureFixture[str]) -> None:
    _make_run("E-v0_0", 4, n_episodes=2)
    _make_run("E-v0_1", 2, n_episodes=2, step=200)
    assert main("all_plots -e E-v0 --no-display -min 400".split()) == 0
    assert "|4 +/- 1|" in capsys.readouterr().out  # 6.5 and 2.5


def test_runs_below_the_least_steps_are_compared_up_to_the_most(capsys: pytest.CaptureFixture[str]) -> None:
    for number, n_evaluations in enumerate((10, 6)):
        _make_run(f"E-v0_{number}", n_evaluations)
    assert main("all_plots -e E-v0 --no-display --print-n-trials -min 1000 -max 500".split()) == 0
    out = capsys.readouterr().out
    assert "Left out" not in out and "E-v0-CLIPPPO-logs: 2\n" in out


@pytest.mark.parametrize(
    "options", ["-f logs other -l one", "-f logs other -l a a", "-f logs other -l a b b", "-l a b", "-f logs logs"]
)
def test_labels_are_one_for_each_folder(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    _make_run("E-v0_1", 3)
    message = _refused(f"all_plots -e E-v0 {options}", capsys)
    assert "`--labels` must be as many different labels as `--exp-folders` has folders, " in message


def test_what_one_folder_lacks_is_named_beside_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    _make_run("E-v0_1", 3)
    assert main("all_plots -e E-v0 -a clipppo ppo --no-display".split()) == 0
    assert "logs/ppo has no evaluations of E-v0 to plot: the table shows 0.0 for it" in capsys.readouterr().out


def test_a_file_of_one_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    _make_run("E-v0_1", 3)
    assert main("all_plots -e E-v0 -o post --no-display".split()) == 0
    capsys.readouterr()
    message = _refused("plot_from_file -i post", capsys)
    assert (
        "`--input` must hold at least two runs with at least two episodes in each evaluation, got post.pkl" in message
    )
    _make_run("E-v0_2", 3)
    assert main("all_plots -e E-v0 -o post --no-display".split()) == 0
    assert main("plot_from_file -i post".split()) == 0


@pytest.mark.parametrize(
    ("results", "options", "message"),
    [
        ({}, "", "of which the options select none. It has no environments and no keys."),
        ({"E": {"A": 0}}, "--keep-envs F", "of which the options select none. It has E and A."),
        ({"E": {"A": 0}}, "--skip-keys A", "of which the options select none."),
        ({"E": {"A": 0}, "F": {}}, "", "got post.pkl without those in F"),
        ({"E": {"A": 0, "B": 0}}, "-l ours", "`--labels` must be one label for each of A, B, got ours. Pass 2"),
    ],
)
def test_a_file_that_lacks_something_is_refused(
    results: dict[str, dict[str, Any]], options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    full = {"last_evals": np.zeros(2)}
    filled = {env: dict.fromkeys(keys, full) for env, keys in results.items()}
    Path("post.pkl").write_bytes(pickle.dumps({**filled, "results_table": {}}))
    assert message in _refused(f"plot_from_file -i post {options}", capsys)
    assert "No such file" in _refused("plot_from_file -i none", capsys)


def test_results_are_merged_before_they_are_selected() -> None:
    full = {"last_evals": np.zeros(2), "timesteps": np.arange(2), "mean": np.zeros(2), "std_error": np.zeros(2)}
    table = {"headers": ["Environments", "A"], "value_matrix": [["E", "0"]]}
    for name, key in (("post", "A"), ("other", "B")):
        Path(f"{name}.pkl").write_bytes(pickle.dumps({"E": {key: full}, "results_table": table}))
    for options in ("--keep-keys B", "--skip-keys A", "-l ours theirs"):
        assert main(f"plot_from_file -i post --merge other.pkl {options}".split()) == 0


@pytest.mark.parametrize(
    ("n_training", "options", "message"),
    [
        (0, "", "of a run, 0 for E-v0, got 100"),
        (150, "-y success", "must be a quantity that the training of E-v0 logged, got 'success'"),
        (99, "", "`--episode-window` must be at most the number of episodes of a run, 99 for E-v0, got 100"),
        (150, "-max 500", "`--episode-window` must be at most the number of episodes of a run, 50 for E-v0, got 100"),
    ],
)
def test_training_returns_that_cannot_be_drawn_are_refused(
    n_training: int, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _make_run("E-v0_1", n_training=n_training)
    assert message in _refused(f"plot_train -e E-v0 {options}", capsys)


def test_training_returns_that_can_be_drawn_are() -> None:
    _make_run("NS-E-v0_1", n_training=100)
    _make_run("NS-E-v0_2", n_training=3)
    assert main("plot_train -e NS/E-v0".split()) == 0
    assert Path("plot_train_1.png").is_file()
