"""``python -m tests.bench experiments SUITE --report``: estimates, scores, tables and figures of finished runs."""

import gzip
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rliable import library, metrics
from scipy import stats

from sb3_clipvf.zoo.training_curve import TrainingCurve
from tests.bench.experiments import estimates, main, random_policy
from tests.bench.experiments.best_result import best_result_scores
from tests.bench.experiments.episodes import binned_episodes, grid, unbinned_curve
from tests.bench.experiments.estimates import (
    Estimate,
    difference,
    estimate,
    expanded_tail,
    interval,
    iqm,
    mean,
    over_seeds,
    performance_profile,
    probability_of_improvement,
)
from tests.bench.experiments.figures import curve_band, remove_figures, sheets, write_figures
from tests.bench.experiments.finished import SuiteRuns
from tests.bench.experiments.random_policy import RandomReturns, random_returns
from tests.bench.experiments.report import _cell, _verdict, equivalence
from tests.bench.experiments.report import render as render_families
from tests.bench.experiments.runs import Record, this_machine
from tests.bench.experiments.scores import SuiteScores, families, family
from tests.bench.experiments.suite import Suite
from tests.bench.experiments.suite_file import read_suite
from tests.bench.experiments.tables import SuiteTable

ENVIRONMENTS = {"CartPole-v1": (20.0, 5.0), "Pendulum-v1": (-1200.0, 100.0), "Hopper-v5": (0.0, 10.0)}
"""Environments of the suite below with mean and standard deviation of their random returns."""


def suite_of(folder: Path, n_seeds: int = 4, **changes: Any) -> Suite:
    content = {
        "kind": "report",
        "first_seed": 1000,
        "evaluation_episodes": 2,
        "settings": {"constant": {"clip_range": 0.2}, "annealed": {"clip_range": "lin_0.2"}},
        "environments": {env_id: {"steps": 4000, "seeds": n_seeds} for env_id in ENVIRONMENTS},
        **changes,
    }
    path = folder / "small.yml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_suite(str(path))


def record_of(score: float, cpu_seconds: float | None = 8.0) -> Record:
    """A run whose episodes of 100 steps all have this return."""
    steps = np.arange(100.0, 4001.0, 100.0)
    curve = TrainingCurve(steps, np.full(len(steps), score), steps / 1000)
    scores: dict[str, float | None] = {"last_return": score, "mean_return": score, "num_timesteps": 4000}
    return Record({**scores, "cpu_seconds": cpu_seconds}, [], binned_episodes(curve, 4000), this_machine())


def shift(env_id: str, setting: str, seed: int) -> float:
    """Normalised scores of `constant` are 0.7 to 1.3 with mean 1, those of `annealed` are lower by 0.5."""
    return {0: 0.9, 1: 1.1, 2: 0.7, 3: 1.3}[seed - 1000] - (0.5 if setting == "annealed" else 0.0)


def filled(folder: Path, suite: Suite, score: Callable[[str, str, int], float | None] = shift) -> SuiteTable:
    """A table of runs with these normalised scores, where they are not None; one unit is 1000."""
    table = SuiteTable(folder, suite.name)
    for setting, spec in suite.runs(Path()):
        value = score(spec.env_id, setting, spec.seed)
        if value is not None:
            table.add(setting, spec, record_of(ENVIRONMENTS[spec.env_id][0] + 1000 * value), 2)
    rows = [f"{env_id},100,{mean},{std},{version('gymnasium')}\n" for env_id, (mean, std) in ENVIRONMENTS.items()]
    (folder / random_policy.FILE).write_text("env,episodes,mean_return,return_std,gymnasium_version\n" + "".join(rows))
    return table


def scores_of(suite: Suite, table: SuiteTable) -> SuiteScores:
    """The scores of a suite with one baseline."""
    return SuiteScores(suite, SuiteRuns(suite, table))


def render(scores: SuiteScores) -> str:
    return render_families(scores.runs, families(scores.runs))


def figures_of(scores: SuiteScores) -> dict[str, Path]:
    return {one.kind: one.path for one in write_figures(scores, scores.suite.name)}


def lines_of(text: str) -> list[str]:
    return text.replace("\u00a0", " ").replace("\u2212", "-").splitlines()


# --- estimates


def test_interquartile_mean_leaves_out_a_quarter_on_both_sides() -> None:
    assert iqm(np.array([[[0.0], [1.0], [2.0], [3.0], [100.0]]])) == [2.0]  # one of five, since 5 / 4 is rounded down
    assert iqm(np.array([[[0.0], [2.0], [100.0]]])) == [34.0]  # none of three
    # Environments together: 0, 0, 1, 2, 3, 4, 50, 60 without two on both sides.
    assert iqm(np.array([[[0.0, 1.0], [0.0, 2.0], [50.0, 3.0], [60.0, 4.0]]])) == [2.5]
    scores = np.random.default_rng(3).normal(size=(7, 5))
    assert iqm(scores[None])[0] == pytest.approx(metrics.aggregate_iqm(scores), rel=1e-12)
    # Curves of 5 points.
    assert iqm(scores[None, :, None])[0] == pytest.approx(stats.trim_mean(scores, 0.25, axis=0), rel=1e-12)


def test_interval_of_a_known_distribution() -> None:
    # Five draws from four zeros and a one have no 1 with probability 33 %, four with 0.64 %, and five with 0.03 %. So
    # the tails of 0.096 %, see below, end at 0 and 4 / 5; the upper one of 2.5 % would end at 3 / 5.
    found = estimate(mean, np.array([[0.0]] * 4 + [[1.0]]))
    assert found == Estimate(0.2, (0.0, 0.8), 5)
    # IQM of four draws from 0, 0, 0, 1 is 0 with up to one 1 among them, 0.5 with two, 1 with three or four: 5 %.
    assert estimate(iqm, np.array([[0.0], [0.0], [0.0], [1.0]])) == Estimate(0.0, (0.0, 1.0), 4)
    # A difference without spread.
    constant = np.full((5, 2), 3.0)
    assert estimate(difference(iqm), constant, constant - 1) == Estimate(1.0, (1.0, 1.0), 5)


def test_tails_are_expanded_for_few_seeds() -> None:
    # 0.975 quantiles of Student's t in tables: 2.776445 for 4, 2.003241 for 56 = 2 * 7 * 4 degrees of freedom.
    assert expanded_tail((5, 1)) == pytest.approx(stats.norm.cdf(-2.776445 * (5 / 4) ** 0.5), rel=1e-5)
    assert expanded_tail((5, 1)) == pytest.approx(0.000955, abs=1e-6)
    assert expanded_tail((5, 7), (5, 7)) == pytest.approx(stats.norm.cdf(-2.003241 * (5 / 4) ** 0.5), rel=1e-5)
    assert expanded_tail((5, 7), (9, 7)) < expanded_tail((9, 7), (9, 7))
    assert expanded_tail((10_000, 1)) == pytest.approx(0.025, abs=1e-4)


def test_interval_is_that_of_other_programs() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(1, 1, (12, 3)), rng.normal(0, 2, (8, 3))
    found = interval(difference(iqm), first, second)
    assert found is not None
    level = 1 - 2 * expanded_tail(first.shape, second.shape)

    def of_two(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(one) - metrics.aggregate_iqm(other)])

    np.random.seed(0)  # rliable draws from the global generator
    point, intervals = library.get_interval_estimates(
        {"": [first, second]}, of_two, reps=4000, confidence_interval_size=level
    )
    assert difference(iqm)(first[None], second[None]) == pytest.approx(point[""], rel=1e-12)
    # Quantiles at 2 % of 4000 draws have a standard error of 1 % of the width of a normal distribution's interval.
    width = found[1] - found[0]
    assert found == pytest.approx(intervals[""][:, 0], abs=0.05 * width)

    def trimmed(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(stats.trim_mean(one, 0.25, axis=axis) - stats.trim_mean(other, 0.25, axis=axis))

    alone = interval(difference(iqm), first[:, :1], second[:, :1])
    expected = stats.bootstrap(
        (first[:, 0], second[:, 0]),
        trimmed,
        method="percentile",
        vectorized=True,
        n_resamples=20_000,
        confidence_level=1 - 2 * expanded_tail((12, 1), (8, 1)),
        rng=1,
    ).confidence_interval
    assert alone == pytest.approx(expected, abs=0.05 * (expected.high - expected.low))


def test_interval_is_repeatable_and_leaves_global_generators_alone() -> None:
    scores = np.random.default_rng(1).normal(size=(6, 2))
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    first, second = interval(iqm, scores), interval(iqm, scores)
    assert first is not None and second is not None and first.tolist() == second.tolist()
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


@pytest.mark.parametrize("shape", [(10, 1), (5, 7)])
def test_interval_has_the_true_difference_as_often_as_it_states(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    found = [interval(difference(iqm), *rng.normal(1, 0.2, (2, *shape))) for _ in range(300)]
    # 97 and 96 % of 600; the share of 300 has a standard deviation of 1.1 %. Tails of 2.5 % have 92 % of (5, 7).
    assert 0.935 < np.mean([ends is not None and ends[0] <= 0 <= ends[1] for ends in found]) < 0.995


def test_strata_are_drawn_separately() -> None:
    # The environments differ, the seeds do not: drawn together, the mean would vary.
    scores = np.tile([0.0, 10.0], (5, 1))
    ends = interval(mean, scores)
    assert ends is not None and ends.tolist() == [5.0, 5.0]


def test_unknown_scores_of_seeds_do_not_count() -> None:
    assert over_seeds([1.0, None, 3]).tolist() == [[1.0], [3.0]]
    assert estimate(mean, over_seeds([None])) is None


def test_probability_of_improvement_counts_pairs_of_runs() -> None:
    first, second = np.array([[1.0], [2.0], [5.0]]), np.array([[2.0], [3.0]])
    # 1 < 2, 1 < 3, 2 = 2, 2 < 3, 5 > 2, 5 > 3: two and a half of six.
    assert probability_of_improvement(first[None], second[None])[0] == pytest.approx(2.5 / 6)
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 9, (2, 8, 3)).astype(float)
    expected = metrics.probability_of_improvement(first, second)
    assert probability_of_improvement(first[None], second[None])[0] == pytest.approx(expected)


def test_performance_profile_is_rliables() -> None:
    scores = np.random.default_rng(2).normal(1, 0.3, (8, 3))
    thresholds = np.array([0.5, 1.0, 1.5])
    expected, _ = library.create_performance_profile({"": scores}, thresholds, reps=2)
    assert performance_profile(thresholds)(scores[None])[0] == pytest.approx(expected[""])


def test_fewer_than_three_seeds_have_no_interval() -> None:
    scores = np.array([[1.0], [2.0]])
    assert estimate(iqm, scores) == Estimate(1.5, None, 2)
    assert Estimate(1.5, None, 2).text(".1f") == "1.5\u00a0[not\u00a0enough\u00a0data]"
    assert Estimate(-0.5, (-1.25, -0.001), 3).text("+z.2f") == "\u22120.50\u00a0[\u22121.25,\u00a0+0.00]"
    assert estimate(difference(iqm), np.zeros((9, 1)), scores) == Estimate(-1.5, None, 2)
    assert estimate(iqm, np.zeros((0, 1))) is None
    assert interval(iqm, scores) is None
    assert estimates.MIN_SEEDS == 3


# --- random actions


def test_random_returns_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_of(tmp_path)
    runs = SuiteRuns(suite, filled(tmp_path, suite))
    path = tmp_path / "random_policy.csv"
    path.unlink()
    monkeypatch.setattr(random_policy, "N_EPISODES", 5)
    found = random_returns(runs, ["CartPole-v1"])["CartPole-v1"]
    assert 10 < found.mean < 60 and found.std > 0
    text = path.read_text()
    path.unlink()
    random_returns(runs, ["CartPole-v1"])
    assert path.read_text() == text  # the same seeds
    # Those of another version are measured again, unless the runs have it.
    path.write_text(text.replace(version("gymnasium"), "0.1"))
    random_returns(runs, ["CartPole-v1"])
    assert path.read_text() == text
    monkeypatch.setattr(random_policy, "_measured", None)
    assert random_returns(runs, ["CartPole-v1"])["CartPole-v1"].mean == pytest.approx(found.mean, rel=1e-5)
    monkeypatch.setattr(SuiteRuns, "gymnasium_version", "0.1")
    path.write_text(text.replace(version("gymnasium"), "0.1"))
    assert random_returns(runs, ["CartPole-v1"])["CartPole-v1"].mean == pytest.approx(found.mean, rel=1e-5)
    path.write_text("env,mean_return\nCartPole-v1,many\n")
    with pytest.raises(ValueError, match="random_policy.csv must hold returns of random actions, but is damaged"):
        random_returns(runs, ["CartPole-v1"])


def test_two_commands_may_measure_random_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_of(tmp_path)
    runs = SuiteRuns(suite, filled(tmp_path, suite))
    (tmp_path / "random_policy.csv").unlink()

    def measured(env_id: str) -> RandomReturns:
        if env_id == "CartPole-v1":  # another command measures meanwhile
            random_returns(runs, ["Pendulum-v1"])
        return RandomReturns(1.0, 2.0, 3)

    monkeypatch.setattr(random_policy, "_measured", measured)
    random_returns(runs, ["CartPole-v1"])
    lines = (tmp_path / "random_policy.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["env", "CartPole-v1", "Pendulum-v1"]


# --- scores


def test_scores_are_normalised_by_random_actions_and_the_baseline(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    scores = scores_of(suite, filled(tmp_path, suite))
    cart, *_ = scores.environments
    assert cart.by_setting["last_return"]["constant"][:, 0].tolist() == [920.0, 1120.0, 720.0, 1320.0]
    for one in scores.normalised:
        for by_setting in one.by_setting.values():
            assert by_setting["constant"][:, 0] == pytest.approx([0.9, 1.1, 0.7, 1.3])
            assert by_setting["annealed"][:, 0] == pytest.approx([0.4, 0.6, 0.2, 0.8])


def test_groups_are_all_environments_and_each_family(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    groups = scores_of(suite, filled(tmp_path, suite)).groups()
    assert [(group.name, group.env_ids) for group in groups] == [
        ("all", ("CartPole-v1", "Pendulum-v1", "Hopper-v5")),
        ("classic_control", ("CartPole-v1", "Pendulum-v1")),  # a family of one environment is not a group
    ]
    assert groups[0].by_setting["mean_return"]["annealed"].shape == (4, 3)
    assert [family(name) for name in ("LunarLander-v3", "Hopper-v5")] == ["box2d", "mujoco"]


def test_group_has_the_environments_and_seeds_that_all_settings_have(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)

    def partial(env_id: str, setting: str, seed: int) -> float | None:
        missing = (env_id == "CartPole-v1" and seed == 1003) or (env_id == "Hopper-v5" and seed > 1001)
        return None if missing and setting == "annealed" else shift(env_id, setting, seed)

    scores = scores_of(suite, filled(tmp_path, suite, partial))
    (group,) = scores.groups()
    assert (group.name, group.env_ids) == ("classic_control", ("CartPole-v1", "Pendulum-v1"))
    assert group.by_setting["last_return"]["annealed"] == pytest.approx(np.array([[0.4, 0.4], [0.6, 0.6], [0.2, 0.2]]))
    assert (group.n_seeds("constant"), group.n_seeds("annealed")) == (4, 3)
    text = lines_of(render(scores))
    assert text[0].startswith("**So far 21 of 24 runs are finished.** The columns *seeds* and *runs* show")
    assert any(line.startswith("| classic_control (2) | `annealed` | 3 of 4 | **-0.60 [") for line in text)


def test_runs_without_a_finite_return_are_left_out_and_named(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)

    def broken(env_id: str, setting: str, seed: int) -> float | None:
        return float("nan") if (env_id, seed) == ("Hopper-v5", 1001) else shift(env_id, setting, seed)

    table = filled(tmp_path, suite, broken)
    setting, spec = suite.runs(Path())[0]
    record = record_of(0.0)
    table.add(setting, spec, Record({**record.scores, "last_return": None}, [], record.episodes, this_machine()), 2)
    scores = scores_of(suite, table)
    assert [len(one.by_setting["mean_return"]["constant"]) for one in scores.environments] == [3, 4, 3]
    assert [len(one.by_setting["last_return"]["annealed"]) for one in scores.environments] == [4, 4, 3]
    text = render(scores)
    assert (
        "Runs without a score, since no episode ended or a return is not finite: CartPole-v1, constant, seed 1000; "
        "Hopper-v5, constant, seed 1001; Hopper-v5, annealed, seed 1001."
    ) in text
    assert "| Hopper-v5 | `annealed` | 3 of 4, 2 lost |" in text
    assert set(figures_of(scores)) == {"", "-curves", "-time", "-profiles"}


def test_environment_in_which_the_baseline_did_not_learn_has_no_normalised_scores(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    # Hopper's 100 random returns have a standard deviation of 10, so their mean has a standard error of 1.
    scores = scores_of(
        suite, filled(tmp_path, suite, lambda env, name, seed: 0.0019 if env == "Hopper-v5" else shift(env, name, seed))
    )
    assert [one.name for one in scores.normalised] == ["CartPole-v1", "Pendulum-v1"]
    text = render(scores)
    assert (
        "Environments without normalised scores, since `constant` has no run there or has not learned: Hopper-v5."
        in text
    )
    assert "| Hopper-v5 | `annealed` | 4 | 1.9\u00a0[1.9,\u00a01.9] |" in text  # its returns


ARGUMENTS = {"env_kwargs": {"reset_noise_scale": 0.01}}
WRAPPER = {"env_wrapper": ["gymnasium.wrappers.TimeAwareObservation"]}


@pytest.mark.parametrize(
    "of_hopper, of_settings, normalised",
    [
        (ARGUMENTS, {}, ["CartPole-v1", "Pendulum-v1"]),
        (WRAPPER, {}, ["CartPole-v1", "Pendulum-v1"]),
        ({}, {"constant": WRAPPER}, []),
        # The scale is the baseline's.
        ({}, {"annealed": WRAPPER}, list(ENVIRONMENTS)),
        (ARGUMENTS, {"constant": {"env_kwargs": {}}}, list(ENVIRONMENTS)),
    ],
)
def test_no_normalised_scores_where_the_baseline_changes_the_environment_of_random_actions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_hopper: dict[str, Any],
    of_settings: dict[str, Any],
    normalised: list[str],
) -> None:
    monkeypatch.setattr(random_policy, "_measured", None)
    environments: dict[str, Any] = {env_id: {"steps": 4000, "seeds": 4} for env_id in ENVIRONMENTS}
    environments["Hopper-v5"]["settings"] = of_hopper
    settings = {name: of_settings.get(name, {}) for name in ("constant", "annealed")}
    suite = suite_of(tmp_path, settings=settings, environments=environments)
    scores = scores_of(suite, filled(tmp_path, suite))
    assert [one.name for one in scores.normalised] == list(scores.random) == normalised
    text = render(scores)
    changed = [env_id for env_id in ENVIRONMENTS if env_id not in normalised]
    sentence = (
        "Environments without normalised scores, since `constant` has `env_kwargs` or wrappers there, and random "
        f"actions are measured without them: {', '.join(changed)}."
    )
    assert (sentence in text) == bool(changed)
    assert "has not learned" not in text
    for env_id in ENVIRONMENTS:
        assert f"| {env_id} | `annealed` | 4 | " in text  # its returns
        assert (f"| {env_id} | random actions |" in text) == (env_id in normalised)


@pytest.mark.parametrize("change", [ARGUMENTS, WRAPPER])
def test_score_of_the_paper_is_refused_where_a_setting_changes_the_environment(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"constant": {}, "changed": change}
    environments = {"Hopper-v5": {"steps": 4000, "seeds": 3}}
    suite_of(tmp_path, settings=settings, environments=environments).check_settings()
    suite = suite_of(tmp_path, settings=settings, environments=environments, best_result_score=True)
    with pytest.raises(ValueError, match=r"`best_result_score` must be false .* got .*\(Hopper-v5, changed\)"):
        suite.check_settings()


def test_baseline_may_have_learned_by_one_score_alone(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    table = filled(tmp_path, suite)
    for setting, spec in suite.runs(Path()):
        if spec.env_id == "Hopper-v5":
            record = record_of(1000 * shift("", setting, spec.seed))
            table.add(setting, spec, replace(record, scores={**record.scores, "mean_return": 1.0}), 2)
    scores = scores_of(suite, table)
    assert [
        (row.title(), [measure for measure, found in row.by_setting.items() if found]) for row in scores.groups()
    ] == [
        ("all (3)", ["last_return"]),  # in the whole training, only one family is left
        ("classic_control (2)", ["mean_return", "last_return"]),
    ]
    lines = lines_of(render(scores))
    assert (
        "Environments without normalised scores, since `constant` has no run there or has not learned: Hopper-v5 "
        "(whole training)." in lines
    )
    for name in ("all (3)", "Hopper-v5"):
        assert any(line.startswith(f"| {name} | `annealed` | 4 |  |  | ") for line in lines), lines
    assert set(figures_of(scores)) == {"", "-curves", "-time", "-profiles"}


# --- tables


def test_report_of_a_complete_suite(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    text = render(scores_of(suite, filled(tmp_path, suite)))
    lines = lines_of(text)
    assert lines[0] == "## Compared with `constant`"
    # rliable's interval with the same tails is -0.83 to -0.17 (20,000 resamples): the IQM has few values here.
    assert lines[2] == (
        "- `annealed` in 3 environments, seeds 4: whole training worse (-0.50 [-0.83, -0.20]); last 100 episodes worse "
        "(-0.50 [-0.83, -0.20])."
    )
    start = lines.index(
        "| environments | setting | seeds | whole training: difference | whole training: probability "
        "| last 100 episodes: difference | last 100 episodes: probability |"
    )
    # Of 16 pairs of runs in an environment, annealed is better in one: 0.8 and 0.7.
    assert lines[start + 2].startswith("| all (3) | `annealed` | 4 | **-0.50 [-0.83, -0.20]** | **0.06 [0.00, ")
    assert [line.split(" | ")[0] for line in lines[start + 2 : start + 7]] == [
        "| all (3)",
        "| classic_control (2)",
        "| CartPole-v1",
        "| Pendulum-v1",
        "| Hopper-v5",
    ]
    # Three or four draws of four are the lowest score in 5 % of the resamples.
    assert lines[lines.index("| environment | setting | seeds | whole training | last 100 episodes |") + 2 :][:3] == [
        "| CartPole-v1 | `constant` | 4 | 1,020 [720, 1,320] | 1,020 [720, 1,320] |",
        "| CartPole-v1 | `annealed` | 4 | 520 [220, 820] | 520 [220, 820] |",
        "| CartPole-v1 | random actions |  | 20 | 20 |",
    ]
    assert "So far" not in text
    assert "2 parallel runs, one thread each; python 3" in lines[-1]


def test_clear_difference_has_no_end_that_looks_like_none() -> None:
    found = Estimate(-0.011, (-0.02, -0.0031), 5)
    assert _cell(found, "+z.2f", 0.0).replace("\u2212", "-") == "**-0.011\u00a0[-0.020,\u00a0-0.003]**"
    assert "-0.01\u00a0[-0.02,\u00a0+0.00]" == _cell(found, "+z.2f").replace("\u2212", "-")  # without a verdict
    assert _cell(replace(found, interval=(-0.02, 0.0)), "+z.2f", 0.0).startswith("\u22120.01")
    assert "(-0.011\u00a0[" in _verdict(found, "").replace("\u2212", "-")


def test_difference_that_may_be_zero_is_not_bold(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    text = render(scores_of(suite, filled(tmp_path, suite, lambda env, name, seed: shift(env, "constant", seed))))
    assert "not clearly different (+0.00" in text.replace("\u00a0", " ")
    assert "| **" not in text


def test_suite_that_chose_settings_has_no_verdicts(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, kind="tune", first_seed=10, equivalence_margin=0.9)
    text = render(scores_of(suite, filled(tmp_path, suite, lambda env, name, seed: shift(env, name, seed + 990))))
    lines = lines_of(text)
    assert lines[0].startswith("**Seeds of this suite chose settings, so its results are no evidence.**")
    assert "- `annealed` in 3 environments, seeds 4: whole training undecided, since seeds of this suite" in "".join(
        lines
    )
    assert "| **" not in text
    assert "| not shown, since seeds of this suite chose settings |" in text


def test_trainings_of_few_episodes_are_counted(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    table = filled(tmp_path, suite)
    for setting, spec in suite.runs(Path()):
        n_episodes = 99 if spec.env_id == "Hopper-v5" and setting == "annealed" else 100
        record = record_of(1.0)
        table.add(setting, spec, replace(record, scores={**record.scores, "n_episodes": n_episodes}), 2)
    assert (
        "Runs with fewer than 100 episodes, of which *last 100 episodes* has all: Hopper-v5: 4 of 8 runs."
    ) in render(scores_of(suite, table))


@pytest.mark.parametrize("n_seeds, is_bold", [(4, False), (5, True)])
def test_single_environment_is_decided_from_five_seeds_on(tmp_path: Path, n_seeds: int, is_bold: bool) -> None:
    suite = suite_of(tmp_path, n_seeds=n_seeds)
    table = filled(tmp_path, suite, lambda env, name, seed: (0.5 if name == "annealed" else 1.0) + seed / 1e5)
    lines = lines_of(render(scores_of(suite, table)))
    mark = "**" if is_bold else ""
    # All pairs of runs agree.
    cells = f"{mark}0.00 [0.00, 0.00]{mark} | {mark}-0."
    assert any(line.startswith(f"| Hopper-v5 | `annealed` | {n_seeds} | {mark}-0.") and cells in line for line in lines)
    assert any(line.startswith("| all (3) | `annealed` |") and "**0.00 [0.00, 0.00]**" in line for line in lines)


@pytest.mark.parametrize("n_seeds", [1, 2])
def test_report_of_few_seeds_has_no_interval(tmp_path: Path, n_seeds: int) -> None:
    suite = suite_of(tmp_path, n_seeds=n_seeds)
    scores = scores_of(suite, filled(tmp_path, suite))
    assert scores.groups() == []
    lines = lines_of(render(scores))
    difference_of = {1: "-0.56", 2: "-0.50"}[n_seeds]  # 0.5 / 0.9 and 0.5 / 1.0
    start = f"| CartPole-v1 | `annealed` | {n_seeds} | {difference_of} [not enough data] | 0.00 [not enough data] | "
    assert any(line.startswith(start) for line in lines)
    mean_return = {1: "420.0", 2: "520"}[n_seeds]  # without decimals where a return has 1000
    cell = f"{mean_return} [not enough data]"
    assert f"| CartPole-v1 | `annealed` | {n_seeds} | {cell} | {cell} |" in lines
    assert "[" not in "".join(lines[:-1]).replace("[95 % interval]", "").replace("[not enough data]", "")
    assert set(figures_of(scores)) == {"", "-curves", "-time"}


def test_setting_without_runs_is_named_and_left_out(tmp_path: Path) -> None:
    settings: dict[str, Any] = {name: {} for name in ("constant", "other", "annealed")}
    suite = suite_of(tmp_path, settings=settings)
    table = filled(tmp_path, suite, lambda env, name, seed: None if name == "other" else shift(env, name, seed))
    scores = scores_of(suite, table)
    text = render(scores)
    assert "Settings without a finished run: `other`." in text
    assert "| CartPole-v1 | `annealed` | 4 | " in text
    assert len(scores.groups()) == 2


def test_setting_without_runs_in_one_environment(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)

    def missing(env_id: str, setting: str, seed: int) -> float | None:
        return None if (env_id, setting) == ("Hopper-v5", "annealed") else shift(env_id, setting, seed)

    scores = scores_of(suite, filled(tmp_path, suite, missing))
    assert "| Hopper-v5 | `annealed` | 0 of 4 | no seed | no seed | no seed | no seed |" in render(scores)
    assert set(figures_of(scores)) == {"", "-curves", "-time", "-profiles"}


def test_setting_of_few_environments_does_not_shrink_the_groups_of_others(tmp_path: Path) -> None:
    settings: dict[str, Any] = {name: {} for name in ("constant", "few", "annealed")}
    environments = {env_id: {"steps": 4000, "seeds": 4} for env_id in ENVIRONMENTS}
    environments["Hopper-v5"]["only"] = ["constant", "annealed"]  # type: ignore[assignment]
    suite = suite_of(tmp_path, settings=settings, environments=environments)
    scores = scores_of(suite, filled(tmp_path, suite))
    assert [(row.title(), row.settings()) for row in scores.groups()] == [
        ("all (3)", ["constant", "annealed"]),
        ("classic_control (2)", ["constant", "few", "annealed"]),
    ]
    lines = lines_of(render(scores))
    assert [line.partition(", seeds")[0] for line in lines if line.startswith("- `")] == [
        "- `few` in 2 environments",
        "- `annealed` in 3 environments",
    ]
    assert set(figures_of(scores)) == {"", "-curves", "-time", "-profiles"}


def test_failed_runs_are_named_and_leave_no_verdict(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, equivalence_margin=0.9)
    failed = ("Hopper-v5", "annealed", 1003)
    table = filled(tmp_path, suite, lambda *run: None if run == failed else shift(*run))
    (place,) = [(name, spec) for name, spec in suite.runs(Path()) if (spec.env_id, name, spec.seed) == failed]
    table.add_failure(*place, "ValueError: it\nfell over")
    text = "\n".join(lines_of(render(scores_of(suite, table))))
    assert "**So far 23 of 24 runs are finished.**" in text
    assert (
        "Failed runs:\n\n- Hopper-v5, annealed, seed 1003: `ValueError: it fell over`\n\n*Lost* runs failed or" in text
    )
    # Three seeds of four in an environment and in the groups that it is in.
    assert (
        "- `annealed` in 3 environments, seeds 3 of 4, 1 lost: whole training undecided, since runs are lost (-0."
        in text
    )
    assert "| all (3) | `annealed` | 3 of 4, 1 lost | -0." in text
    assert "| Hopper-v5 | `annealed` | 3 of 4, 1 lost | -0." in text
    assert "| classic_control (2) | `annealed` | 4 | **-0.50" in text
    assert "| Hopper-v5 | `annealed` | 3 of 4, 1 lost | whole training |" in text
    assert "not shown, since runs are lost |" in text
    # It is made again, with success.
    table.add(*place, record_of(500.0), 1)
    text = render(scores_of(suite, table))
    assert "Failed runs" not in text and not table.failed_path.exists()
    assert ", one run at a time, one thread each; " in text and ", 2 parallel runs, one thread each; " in text


ALL_OF_CARTPOLE = {("CartPole-v1", name, seed) for name in ("constant", "annealed") for seed in (1000, 1001, 1002)}


@pytest.mark.parametrize(
    "lost, group",
    [
        ({("CartPole-v1", "annealed", 1002)}, "| all (2) | `annealed` | 3, 1 lost | +0."),
        ({("CartPole-v1", "constant", 1002)}, "| all (2) | `annealed` | 3, 1 lost | +0."),
        (ALL_OF_CARTPOLE, "| all (2) | `annealed` | 3, 6 lost | +0."),
        # The sentence is about all environments, the group about others than the lost run's.
        ({("Hopper-v5", "annealed", 1002)}, "| classic_control (2) | `annealed` | 3 | **+0."),
    ],
)
def test_environment_that_lost_runs_leaves_its_groups_without_a_verdict(
    tmp_path: Path, lost: set[tuple[str, str, int]], group: str
) -> None:
    suite = suite_of(tmp_path, n_seeds=3)

    def learned(env_id: str, setting: str, seed: int) -> float | None:
        better = 0.5 if setting == "annealed" else 0.0
        return None if (env_id, setting, seed) in lost else 1.0 + better + (seed - 1001) / 20

    table = filled(tmp_path, suite, learned)
    for setting, spec in suite.runs(Path()):
        if (spec.env_id, setting, spec.seed) in lost:
            table.add_failure(setting, spec, "ValueError: diverged")
    lines = lines_of(render(scores_of(suite, table)))
    assert any(line.startswith(group) for line in lines), lines
    (sentence,) = [line for line in lines if line.startswith("- `annealed` in ")]
    start = (
        f"- `annealed` in 2 environments, seeds 3, {len(lost)} lost: whole training undecided, since runs are lost ("
    )
    assert sentence.startswith(start)
    assert any("**" in line for line in lines if line.startswith("| ")) == ("**" in group)


def test_lost_run_in_an_environment_without_the_setting_leaves_the_verdict(tmp_path: Path) -> None:
    environments: dict[str, Any] = {env_id: {"steps": 4000, "seeds": 4} for env_id in ENVIRONMENTS}
    environments["CartPole-v1"]["only"] = ["constant"]
    suite = suite_of(tmp_path, environments=environments)
    failed = ("CartPole-v1", "constant", 1003)
    table = filled(tmp_path, suite, lambda *run: None if run == failed else shift(*run))
    (place,) = [(name, spec) for name, spec in suite.runs(Path()) if (spec.env_id, name, spec.seed) == failed]
    table.add_failure(*place, "broken")
    lines = lines_of(render(scores_of(suite, table)))
    assert any(line.startswith("- `annealed` in 2 environments, seeds 4: whole training worse (") for line in lines)
    assert any(line.startswith("| all (2) | `annealed` | 4 | **-0.50 [") for line in lines)


def test_settings_are_compared_with_their_own_baselines(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "constant": {},
        "raw": {"gamma": 0.9},
        "annealed": {"clip_range": 0.1},
        "raw-annealed": {"gamma": 0.9, "clip_range": 0.1, "baseline": "raw"},
    }
    suite = suite_of(tmp_path, settings=settings)
    assert "baseline" not in (suite.runs(Path())[3][1].hyperparams or {})
    learned = {"constant": 1.0, "raw": 0.5, "annealed": 1.25, "raw-annealed": 0.4}
    table = filled(tmp_path, suite, lambda env, name, seed: learned[name] + (seed - 1001.5) / 100)
    runs = SuiteRuns(suite, table)
    ours, raw = families(runs)
    assert [list(one.suite.settings) for one in (ours, raw)] == [
        ["constant", "raw", "annealed"],
        ["raw", "raw-annealed"],
    ]
    lines = lines_of(render(ours))
    start = lines.index("## Compared with `raw`")
    # In units of what each baseline learned.
    assert any(line.startswith("| all (3) | `annealed` | 4 | **+0.25 [") for line in lines[:start])
    assert any(line.startswith("| all (3) | `raw` | 4 | **-0.50 [") for line in lines[:start])
    assert any(line.startswith("| all (3) | `raw-annealed` | 4 | **-0.20 [") for line in lines[start:])
    assert [one.path.name for one in write_figures(raw, "small")][:2] == ["small-raw.png", "small-raw-curves.png"]
    remove_figures(runs, "small")
    assert not list(tmp_path.glob("*.png"))
    only = suite.only(None, ["annealed", "raw-annealed"])
    assert [list(one.settings) for one in only.families()] == [["annealed"], ["raw-annealed"]]


def test_value_clips_of_raw_rewards_have_a_raw_baseline() -> None:
    ours, raw = read_suite("value-clip").families()
    assert (ours.baseline, raw.baseline, len(ours.settings), len(raw.settings)) == ("none", "none-raw", 14, 13)
    assert all("False" in str(setting.changes["normalize"]) for setting in raw.settings.values())
    assert [name for name, setting in ours.settings.items() if setting.changes["normalize"] is not True] == ["none-raw"]


@pytest.mark.parametrize(
    "name, baseline, match",
    [
        ("b", "anealed", "`settings.b.baseline` must be a known name"),
        ("b", "b", "got 'b' for itself. Remove it"),
        ("a", "b", "`settings.a.baseline` must be omitted for the first setting, .*got 'b' for the first"),
        ("b", 3, "`baseline` of `settings.b` must be of type str"),
    ],
)
def test_bad_baselines_are_refused(tmp_path: Path, name: str, baseline: Any, match: str) -> None:
    settings: dict[str, Any] = {"a": {}, "b": {}}
    settings[name]["baseline"] = baseline
    with pytest.raises(ValueError, match=match):
        suite_of(tmp_path, settings=settings)


# --- scores between random actions and the best result


def test_score_of_the_paper_is_one_for_the_best_run_and_zero_for_random_actions(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "clip": {"expected": "score 0.82"},
        "none": {"clip_range": 0.1, "expected": "score 0.3"},
    }
    suite = suite_of(tmp_path, n_seeds=3, settings=settings, best_result_score=True)
    # Of `clip` in units of 1000: 0.5, 1, 2 in each environment; the best run of all is 2, so 0.25, 0.5, 1.
    returns = {("clip", 1000): 0.5, ("clip", 1001): 1.0, ("clip", 1002): 2.0}
    table = filled(tmp_path, suite, lambda env, name, seed: returns.get((name, seed), -0.5))
    scores = best_result_scores(SuiteRuns(suite, table))
    for values in scores["clip"]:
        assert values == pytest.approx([0.25, 0.5, 1.0])
    lines = lines_of(render(scores_of(suite, table)))
    start = lines.index("| setting | runs | score | expected |")
    assert lines[start + 2].startswith("| `clip` | 9 of 9 | 0.58 [0.")
    assert lines[start + 2].endswith("] | 0.82 |")
    assert lines[start + 3] == "| `none` | 9 of 9 | -0.25 [-0.25, -0.25] | 0.3 |"
    assert "best run of all settings at 1." in "".join(lines)
    assert not any("score 0.82" in line for line in lines)  # which is no return


def test_score_of_the_paper_of_incomplete_settings_is_marked(tmp_path: Path) -> None:
    settings: dict[str, Any] = {name: {"gamma": gamma} for name, gamma in (("a", 0.1), ("b", 0.2), ("c", 0.3))}
    suite = suite_of(tmp_path, n_seeds=3, settings=settings, best_result_score=True)
    # The best of `a` lies in one environment alone.
    table = filled(
        tmp_path,
        suite,
        lambda env, name, seed: {"a": 1.0, "b": 0.5 if env == "CartPole-v1" else None, "c": None}[name],
    )
    failed = next((name, spec) for name, spec in suite.runs(Path()) if name == "b" and spec.env_id == "Hopper-v5")
    table.add_failure(*failed, "broken")
    lines = lines_of(render(scores_of(suite, table)))
    start = lines.index("| setting | runs | score | expected |")
    assert lines[start + 2 : start + 5] == [
        "| `a` | 9 of 9 | 1.00 [1.00, 1.00] |  |",
        "| `b` | 3 of 9, 1 lost | not complete, so far 0.50 |  |",
        "| `c` | 0 of 9 | not complete |  |",
    ]
    assert "best run of all settings so far at 1." in "".join(lines)


@pytest.mark.parametrize(
    "options, columns, rows",
    [
        ("", "| setting | runs | score | expected |", ["| `best` | 9 of 9 | 1.00 [", "| `other` | 9 of 9 | 0.33 ["]),
        # In units of the best run of all settings, of which `missing` may have a better one.
        ("--settings other", "| setting | runs | score | expected |", ["| `other` | 9 of 9 | 0.33 ["]),
        # What the source reports is a mean over all environments.
        ("--settings other --envs Hopper-v5", "| setting | runs | score |", ["| `other` | 3 of 3 | -0.50 ["]),
    ],
)
def test_score_of_the_paper_in_the_report_of_a_part_is_that_of_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, columns: str, rows: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tests.bench.experiments.report.write_figures", lambda *of: [])
    names = {"best": 0.1, "other": 0.2, "missing": 0.3}
    settings: dict[str, Any] = {name: {"clip_range": of, "expected": "score 0.8"} for name, of in names.items()}
    suite = suite_of(tmp_path, n_seeds=3, settings=settings, best_result_score=True)
    # `other` has 0.75, 0.75 and -0.5 of the best runs.
    other = {"CartPole-v1": 1.5, "Pendulum-v1": 1.5, "Hopper-v5": -1.0}
    filled(tmp_path, suite, lambda env, name, seed: {"best": 2.0, "other": other[env]}.get(name))
    assert main(["small.yml", "--report", "--out", ".", *options.split()]) == 0
    lines = lines_of(Path("small-part.md" if options else "small.md").read_text())
    start = lines.index(columns)
    assert [line.startswith(row) for row, line in zip(rows, lines[start + 2 :], strict=False)] == [True] * len(rows)
    text = "".join(lines)
    assert "best run of all settings so far at 1." in text and "Environments without scores" not in text
    assert ("*Expected*" in text) == ("expected" in columns)


def test_environment_in_which_no_run_beats_random_actions_has_no_scores(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, n_seeds=3, best_result_score=True)
    table = filled(tmp_path, suite, lambda env, name, seed: -0.5 if env == "Hopper-v5" else 1.0)
    scores = best_result_scores(SuiteRuns(suite, table))
    assert [len(values) for values in scores["constant"]] == [3, 3, 0]
    text = render(scores_of(suite, table))
    assert "Environments without scores, since no run is better than random actions: Hopper-v5." in text
    assert "| `constant` | 6 of 9 | not complete, so far 1.00 |" in text


def test_suite_of_table_1_asks_for_the_scores_of_the_paper(tmp_path: Path) -> None:
    suite = read_suite("table1")
    assert suite.best_result_score
    assert {len(environment.seeds) for environment in suite.environments} == {3} and len(suite.environments) == 7
    assert all(setting.expected.startswith("score ") for setting in suite.settings.values())
    assert not read_suite("defaults").best_result_score
    environments = {"CartPole-v1": {"steps": 4000, "seeds": 1}, "Hopper-v5": {"steps": 4000, "seeds": 2}}
    with pytest.raises(
        ValueError, match="`seeds` must be equal in all environments with `best_result_score`, got 1 and 2. Correct"
    ):
        suite_of(tmp_path, environments=environments, best_result_score=True)
    with pytest.raises(ValueError, match="`best_result_score` of `suite` must be of type bool, got 1"):
        suite_of(tmp_path, best_result_score=1)


# --- equivalence


@pytest.mark.parametrize(
    "intervals, expected",
    [
        ([(-0.04, 0.03), (-0.01, 0.049)], "yes"),
        ([(-0.04, 0.03), (-0.01, 0.051)], "not shown"),
        ([(-0.06, 0.03)], "not shown"),
        ([(0.051, 0.07)], "no"),
        ([(-0.08, -0.06), (-0.01, 0.0)], "no"),
        ([(-0.04, 0.03), None], "not enough data"),
    ],
)
def test_equivalence_needs_all_intervals_within_the_margin(
    intervals: list[tuple[float, float] | None], expected: str
) -> None:
    assert equivalence([Estimate(0.0, one, 3) for one in intervals], 0.05) == expected
    assert equivalence([None], 0.05) == "not enough data"


def test_equivalence_agrees_with_two_one_sided_tests() -> None:
    # The margin at which Student's tests reject at 2.5 % is the end of its interval, which bootstrap's is close to.
    first, second = np.random.default_rng(5).normal(1, 0.05, (2, 50, 1))
    found = estimate(difference(mean), first, second)

    def p_value(margin: float) -> float:
        lower = stats.ttest_ind(first[:, 0] + margin, second[:, 0], alternative="greater").pvalue
        upper = stats.ttest_ind(first[:, 0] - margin, second[:, 0], alternative="less").pvalue
        return float(max(lower, upper))

    margins = np.linspace(0.0, 0.06, 601)
    rejected = margins[[p_value(margin) < 0.025 for margin in margins]]
    ours = margins[[equivalence([found], margin) == "yes" for margin in margins]]
    assert ours[0] == pytest.approx(rejected[0], abs=0.002)


def test_report_states_equivalence_where_the_suite_asks_for_it(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, n_seeds=5, equivalence_margin=0.05)
    table = filled(tmp_path, suite, lambda env, name, seed: 1.0 + (seed - 1002) / 500)
    lines = lines_of(render(scores_of(suite, table)))
    assert "**Equivalence to `constant`**: both intervals within ±0.05, in normalised scores" in lines
    (row,) = [line for line in lines if line.startswith("| Hopper-v5 | `annealed` | 5 | whole training | ")]
    assert row.endswith("| yes |")
    assert not any("classic_control" in line and "yes" in line for line in lines)
    few = suite_of(tmp_path, equivalence_margin=0.05)
    assert "| not shown, since 5 seeds are needed |" in render(scores_of(few, filled(tmp_path / "few", few)))
    unequal = filled(tmp_path / "other", suite, lambda env, name, seed: shift(env, name, 1000))
    assert "| no |" in render(scores_of(suite, unequal))


def test_suite_of_the_engines_asks_for_equivalence_on_fifty_seeds(tmp_path: Path) -> None:
    suite = read_suite("engines")
    suite.check_settings()
    assert (suite.baseline, list(suite.settings), suite.equivalence_margin) == (
        "autograd",
        ["autograd", "native"],
        0.05,
    )
    specs = [spec for _, spec in suite.runs(tmp_path)]
    assert {(spec.env_id, spec.seed) for spec in specs} == {
        (env_id, seed) for env_id in ("CartPole-v1", "Pendulum-v1") for seed in range(1000, 1050)
    }


@pytest.mark.parametrize("margin, match", [(1.0, "must be from 0 to below 1, got 1.0"), (1, "must be of type float")])
def test_bad_margins_are_refused(tmp_path: Path, margin: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        suite_of(tmp_path, equivalence_margin=margin)


# --- figures


def test_curves_of_a_file_of_episodes() -> None:
    columns = {"step": [10.0, 20.0], "return": [1.0, 3.0], "episodes": [1.0, 2.0], "seconds": [0.5, np.nan]}
    curve = unbinned_curve({name: np.array(values) for name, values in columns.items()})
    assert curve.steps.tolist() == [10.0, 20.0, 20.0]
    assert curve.returns.tolist() == [1.0, 3.0, 3.0]


def test_band_of_curves_starts_where_all_have_an_episode() -> None:
    def curve(first: float, value: float) -> TrainingCurve:
        steps = np.arange(first, 401.0, 10.0)
        return TrainingCurve(steps, np.full(len(steps), value), steps)

    band = curve_band([curve(10, 1.0), curve(10, 2.0), curve(30, 6.0)], 400)
    assert band is not None and band.ends is not None
    assert band.x.tolist() == grid(400)[2:].tolist()
    assert set(band.values) == {3.0}  # of three seeds, none is cut
    assert band.ends[:, 5].tolist() == [1.0, 6.0]  # three equal draws have probability 1 / 27 > 2.5 %
    two = curve_band([curve(10, 1.0), curve(10, 2.0)], 400)
    assert two is not None and two.ends is None
    assert curve_band([], 400) is None
    assert curve_band([curve(500, 1.0)], 400) is None


def n_pixels(path: Path, color: tuple[int, int, int]) -> int:
    from matplotlib.image import imread

    pixels = np.asarray(imread(path))[:, :, :3] * 255
    return int((np.abs(pixels - np.array(color)) < 2).all(axis=2).sum())


def test_figures_show_both_settings(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    figures = figures_of(scores_of(suite, filled(tmp_path, suite)))
    assert sorted(path.name for path in figures.values()) == [
        "small-curves.png",
        "small-profiles.png",
        "small-time.png",
        "small.png",
    ]
    for path in figures.values():
        assert n_pixels(path, (0, 0x72, 0xB2)) > 100


def test_many_settings_have_several_figures_of_each_kind(tmp_path: Path) -> None:
    settings: dict[str, Any] = {f"s{index}": {"gamma": index / 20} for index in range(17)}
    suite = suite_of(tmp_path, settings=settings, environments={"Hopper-v5": {"steps": 4000, "seeds": 1}})
    scores = scores_of(suite, filled(tmp_path, suite, lambda env, name, seed: 1.0))
    found = sheets(scores)
    assert [len(sheet.others) for sheet in found] == [6, 5, 5]
    assert [sheet.settings[0] for sheet in found] == ["s0"] * 3  # the baseline
    assert [name for sheet in found for name in sheet.others] == [f"s{index}" for index in range(1, 17)]
    for sheet in found:
        assert len({sheet.style(name)[0] for name in sheet.settings}) == len(sheet.settings)
    names = [one.path.name for one in write_figures(scores, "small")]
    assert names == [f"small{kind}{end}.png" for kind in ("", "-curves", "-time") for end in ("", "-2", "-3")]
    assert len(sheets(scores_of(suite.only(None, ["s0"]), filled(tmp_path, suite, lambda *run: 1.0)))) == 1


def test_resumed_runs_are_in_the_curves_against_steps_alone(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    table = filled(tmp_path, suite)
    for setting, spec in suite.runs(Path()):
        table.add(setting, spec, record_of(-5000.0, cpu_seconds=None), 2)
    figures = figures_of(scores_of(suite, table))
    assert set(figures) == {"-curves"}  # and the baseline has not learned
    # Those of the first report would not belong to this one.
    (tmp_path / "small-time.png").write_text("earlier")
    remove_figures(SuiteRuns(suite, table), "small")
    assert not list(tmp_path.glob("*.png"))


# --- what is refused, and the command


def test_runs_of_mixed_versions_are_refused(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    table = filled(tmp_path, suite)
    for row in table.rows:
        row["numpy_version"] = "1.0"
    scores_of(suite, table)  # made elsewhere
    table.rows[3]["numpy_version"] = "2.0"
    with pytest.raises(ValueError, match="one set of versions, but numpy_version is '1.0' and '2.0'. Remove the rows"):
        scores_of(suite, table)


def test_rows_of_other_settings_are_refused(tmp_path: Path) -> None:
    table = filled(tmp_path, suite_of(tmp_path))
    changed = suite_of(tmp_path, evaluation_episodes=3)
    with pytest.raises(ValueError, match="the suite's settings, but CartPole-v1, constant, seed 1000 was made with"):
        scores_of(changed, table)


@pytest.mark.parametrize("has_best_result", [False, True])
def test_rows_of_other_settings_are_refused_in_a_part_that_needs_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_best_result: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tests.bench.experiments.report.write_figures", lambda *of: [])
    filled(tmp_path, suite_of(tmp_path))
    settings: dict[str, Any] = {"constant": {"clip_range": 0.3}, "annealed": {"clip_range": "lin_0.2"}}
    suite_of(tmp_path, settings=settings, best_result_score=has_best_result)
    command = ["small.yml", "--report", "--out", ".", "--settings", "annealed"]
    if not has_best_result:
        assert main(command) == 0
        return
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "the suite's settings, but CartPole-v1, constant, seed 1000 was made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [lambda data: data[:-9], lambda data: b"text", lambda data: gzip.compress(b"a,b\n1,2\n")]
)
def test_damaged_file_of_episodes_is_named(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    suite = suite_of(tmp_path)
    table = filled(tmp_path, suite)
    path = table.episodes_path(*suite.runs(Path())[0])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="1000.csv.gz must hold the episodes of a run, but is damaged"):
        scores_of(suite, table)


def test_command_writes_the_report_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    filled(tmp_path, suite_of(tmp_path))
    Path("small-2.png").touch()  # of an earlier report with more settings
    assert main(["small.yml", "--report", "--out", "."]) == 0
    files = "small.md small.png small-curves.png small-time.png small-profiles.png".split()
    assert capsys.readouterr().out.split() == ["Report:", *files]
    text = Path("small.md").read_text()
    made = "Made by `python -m tests.bench experiments small.yml --report --out .`."
    title = "# Results of the suite `small`"
    assert text.startswith(f"{title}\n\n{made}\n\n## Compared with `constant`\n\n![Difference to")
    for name in files[1:]:
        assert f"]({name})" in text
    assert not Path("logs").exists() and not Path("small-2.png").exists()
    figure = Path("small.png").read_bytes()
    assert main(["small.yml", "--report", "--out", ".", "--envs", "Hopper-v5"]) == 0
    # The report of a part stands beside the whole one.
    assert "CartPole" not in Path("small-part.md").read_text()
    assert (Path("small.md").read_text(), Path("small.png").read_bytes()) == (text, figure)
    assert Path("small-part-curves.png").exists()


@pytest.mark.parametrize("options", ["--settings constant", "--envs Hopper-v5"])
def test_report_without_runs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = suite_of(tmp_path)
    filled(tmp_path, suite, lambda env, name, seed: 1.0 if (env, name) == ("CartPole-v1", "annealed") else None)
    with pytest.raises(SystemExit, match="2"):
        main(["small.yml", "--report", "--out", ".", *options.split()])
    assert "small.csv must have finished runs of the suite, but has none" in capsys.readouterr().err
    assert not list(Path().glob("*.md"))


@pytest.mark.parametrize("options", ["", "--settings annealed"])
def test_report_without_the_baseline_has_returns_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = suite_of(tmp_path)
    filled(tmp_path, suite, lambda env, name, seed: shift(env, name, seed) if name == "annealed" else None)
    assert main(["small.yml", "--report", "--out", ".", *options.split()]) == 0
    name = "small-part" if options else "small"
    text = Path(f"{name}.md").read_text()
    assert "since `constant` has no run there or has not learned: CartPole-v1, Pendulum-v1, Hopper-v5." in text
    assert "| CartPole-v1 | `annealed` | 4 | " in text
    assert "probability" not in text
    assert {path.name for path in Path().glob("*.png")} == {f"{name}-curves.png", f"{name}-time.png"}


def test_settings_of_single_environments_are_compared_there_alone(tmp_path: Path) -> None:
    environments = {env_id: {"steps": 4000, "seeds": 4} for env_id in ENVIRONMENTS}
    only = {"CartPole-v1": ["annealed"], "Hopper-v5": ["constant"], "Pendulum-v1": ["constant", "annealed"]}
    suite = suite_of(tmp_path, environments={name: {**one, "only": only[name]} for name, one in environments.items()})
    scores = scores_of(suite, filled(tmp_path, suite))
    lines = lines_of(render(scores))
    assert (
        "Environments without normalised scores, since `constant` has no run there or has not learned: CartPole-v1."
        in lines
    )
    assert [
        line.split(" | ")[:2]
        for line in lines
        if "random actions" not in line and line.startswith("| ") and "-v" in line
    ] == [
        ["| Pendulum-v1", "`annealed`"],
        ["| CartPole-v1", "`annealed`"],
        ["| Pendulum-v1", "`constant`"],
        ["| Pendulum-v1", "`annealed`"],
        ["| Hopper-v5", "`constant`"],
    ]
    assert scores.groups() == []
    assert set(figures_of(scores)) == {"", "-curves", "-time"}
