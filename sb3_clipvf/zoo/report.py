"""
``sb3-clipvf report``: evaluate a run, draw its learning curve, record a video; or compare many runs in one page.

``sb3-clipvf report RUNS...`` reads the files of runs and writes the page, see :mod:`sb3_clipvf.zoo.comparison`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_clipvf.common.validation import MAX_SEED, check_device, check_int
from sb3_clipvf.files.atomic import atomic_write
from sb3_clipvf.zoo.commands import ALGORITHM
from sb3_clipvf.zoo.comparison.curves import ROLLING_WINDOW, smoothed
from sb3_clipvf.zoo.comparison.groups import Group, group_records, printable, repeated_seeds
from sb3_clipvf.zoo.comparison.outputs import SUFFIXES, check_outputs, write_outputs
from sb3_clipvf.zoo.comparison.records import RunRecord, find_records
from sb3_clipvf.zoo.comparison.series import Series, read_evaluations
from sb3_clipvf.zoo.comparison.titles import plural
from sb3_clipvf.zoo.comparison.train_commands import environment_options
from sb3_clipvf.zoo.comparison.training import read_saved_model, read_training
from sb3_clipvf.zoo.parsing import option_name
from sb3_clipvf.zoo.process import has_display, patched_environment
from sb3_clipvf.zoo.run_folders import RunId, processes_of, program
from sb3_clipvf.zoo.runs import (
    EVALUATION_SEED,
    Evaluation,
    Run,
    evaluate_run,
    find_run,
    load_model,
    make_env,
    read_arguments,
)
from sb3_clipvf.zoo.training_curve import TrainingCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv

MAX_VIDEO_STEPS = 3000
"""Steps of a video, since an episode may have no end: 50 to 100 s at the usual 30 to 60 frames per second."""


def write_learning_curve(run: Run, curve: TrainingCurve, evaluation: Evaluation, path: Path) -> None:
    """
    Draw returns over environment steps, and write the figure as a PNG.

    It shows the training episodes and their rolling mean, the evaluations during training (the Zoo's
    ``evaluations.npz``, if the run has it) and the evaluation of the trained agent.
    """
    # The figure object draws without pyplot, whose backend belongs to the caller's process.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _draw_training(axes, curve)
    _draw_evaluations(axes, run.folder / "evaluations.npz")
    kind = "deterministic" if evaluation.deterministic else "sampled actions"
    axes.errorbar(
        [evaluation.num_timesteps],
        [evaluation.mean],
        yerr=[evaluation.std],
        fmt="D",
        color="tab:green",
        capsize=4,
        zorder=5,
        clip_on=False,  # the marker lies on the edge of the axes
        label=f"trained agent, {len(evaluation.returns)} episodes, {kind}:\n"
        f"{evaluation.mean:.1f} ± {evaluation.std:.1f} (one std)",
    )
    axes.set_xlim(left=0, right=1.02 * max([evaluation.num_timesteps, *curve.steps[-1:]]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlabel("training (environment steps)")
    axes.set_ylabel("return of an episode (sum of rewards)")
    axes.set_title(f"{run.folder.name} ({run.algo}), {evaluation.num_timesteps:,} steps of training")
    axes.grid(alpha=0.3)
    for handle in axes.legend(loc="best", framealpha=0.9, fontsize="small").legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)  # a single pale dot could not be seen
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _draw_training(axes: Axes, curve: TrainingCurve) -> None:
    if len(curve.steps) == 0:
        axes.text(0.5, 0.5, "no training episode ended", transform=axes.transAxes, ha="center", color="gray")
        return
    # Draw few episodes as clear dots, and thousands as a cloud.
    few = len(curve.steps) < 200
    alpha, size = (0.7, 14) if few else (float(np.clip(300 / len(curve.steps), 0.08, 0.6)), 6)
    axes.scatter(
        curve.steps, curve.returns, s=size, alpha=alpha, color="tab:blue", linewidths=0, label="training episodes"
    )
    mean = smoothed(Series(curve.steps, curve.seconds, curve.returns))
    axes.plot(mean.steps, mean.values, color="tab:blue", label=f"mean of the last {ROLLING_WINDOW} of them")


def _draw_evaluations(axes: Axes, path: Path) -> None:
    if not path.is_file():
        return
    try:
        arrays = read_evaluations(path)
    except ValueError as error:
        sys.stdout.write(f"  left out        {error}\n")
        return
    steps, results = arrays["timesteps"], arrays["results"]
    mean, std = np.nanmean(results, axis=1), np.nanstd(results, axis=1)
    label = f"evaluations during training,\n{results.shape[1]} episodes each (band: one std)"
    axes.plot(steps, mean, marker="o", markersize=4, color="tab:orange", label=label)
    axes.fill_between(steps, mean - std, mean + std, color="tab:orange", alpha=0.2, linewidth=0)


def record_video(run: Run, path: Path, deterministic: bool, seed: int, device: str = "auto") -> str:
    """
    Record one episode of a run's agent as an mp4: the first episode of an evaluation with the same seed.

    Return what the video shows, or ``skipped: <reason>`` if no video could be made.
    """
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return "skipped: the package moviepy is not installed (`pip install moviepy`)"
    drivers = {} if has_display() else {"SDL_VIDEODRIVER": "dummy", "MUJOCO_GL": "egl"}
    with patched_environment(drivers):
        env = make_env(run, 1, seed)
        modes = env.get_attr("metadata")[0].get("render_modes") or ()
        env.close()
        if "rgb_array" not in modes:
            return f"skipped: {run.env_id} has no rgb_array rendering (its modes: {', '.join(modes) or 'none'})"
        try:
            with ExitStack() as stack:
                env = make_env(run, 1, seed, render_mode="rgb_array")
                stack.callback(env.close)
                env.reset()
                env.render()
                open_env = stack.pop_all()
        except Exception as error:  # renderers (OpenGL, pygame, MuJoCo) have errors of no common class
            return f"skipped: {run.env_id} could not be rendered ({type(error).__name__}: {error})"
        with open_env:
            return _record_episode(env, load_model(run, seed, device), path, deterministic, seed)


def _record_episode(env: VecEnv, model: BaseAlgorithm, path: Path, deterministic: bool, seed: int) -> str:
    from imageio_ffmpeg import write_frames  # type: ignore[import-untyped]

    env.seed(seed)  # the reset before the trial frame used the first seed
    observations: Any = env.reset()
    frame = _even_frame(env)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    fps = env.get_attr("metadata")[0].get("render_fps", 30)
    # Encode frame by frame: the frames of an episode may not fit in memory.
    writer = write_frames(str(unfinished), frame.shape[1::-1], fps=fps, macro_block_size=2, quality=7)
    writer.send(None)
    state, episode_start, shows = None, np.ones(1, dtype=bool), f"the first {MAX_VIDEO_STEPS} steps of an episode"
    try:
        for _ in range(MAX_VIDEO_STEPS):
            writer.send(frame)
            actions, state = model.predict(observations, state, episode_start, deterministic)
            observations, _, episode_start, infos = env.step(actions)
            if "episode" in infos[0]:  # in Atari, `done` may be the loss of a life
                shows = f"one episode, return {infos[0]['episode']['r']:.1f}, {infos[0]['episode']['l']} steps"
                break
            frame = _even_frame(env)
    finally:
        writer.close()
    os.replace(unfinished, path)
    return shows


def _even_frame(env: VecEnv) -> np.ndarray:
    """Render a frame, and repeat an odd last row or column, since video players need even sizes."""
    frame = np.asarray(env.render())
    rows, columns = frame.shape[:2]
    return np.ascontiguousarray(np.pad(frame, ((0, rows % 2), (0, columns % 2), (0, 0)), mode="edge"))


def compare_runs(folders: Sequence[str], outputs: Sequence[Path]) -> None:
    """
    Write a report that compares runs, from their files alone; print where it is and what was left out.

    :param folders: Runs, or folders of runs at any depth.
    :param outputs: Files to write, each in the format of its suffix.
    :raises ValueError: If a folder holds no run, or a suffix is unknown.
    """
    records, groups, problems = _compare(folders, outputs)
    for problem in problems:
        sys.stdout.write(f"  {printable(problem)}\n")
    n_env_ids = len({record.env_id for record in records})
    counts = [plural(len(records), "run"), plural(len(groups), "group"), plural(n_env_ids, "environment")]
    sys.stdout.write(f"{', '.join(counts)}\n")
    for path in outputs:
        sys.stdout.write(f"  {path}\n")


def next_commands(run: Run, log_folder: str) -> list[tuple[str, str]]:
    """Return pairs of purpose and command to try after a report; ``log_folder`` is that of ``train -f``."""
    folder = shlex.quote(log_folder)
    algo = "" if run.algo == ALGORITHM else f" --algo {run.algo}"
    other = "Acrobot-v1" if run.env_id != "Acrobot-v1" else "Pendulum-v1"
    arguments = read_arguments(run)
    options = "".join(f" {shlex.quote(option)}" for option in environment_options(arguments, run.folder))
    train = f"{program(arguments)} train --env {run.env_id} -f {folder}{options} -P"
    variant = ("the same with ClipPPO", train)
    if run.algo == ALGORITHM:
        parameters = "-params clip_range:None kl_coef:1.0 adaptive_kl_target:0.01"
        variant = ("the adaptive KL penalty instead of clipping", f"{train} {parameters}")
    number = run.folder.name.removeprefix(f"{run.settings_folder.name}_")
    return [
        ("watch the agent", f"sb3-clipvf enjoy{algo} --env {run.env_id} -f {folder} --exp-id {number}"),
        variant,
        ("another environment", f"sb3-clipvf train{algo} --env {other} -f {folder} -P"),
    ]


def _write_page(run: Run, outputs: Sequence[Path]) -> str:
    """Write the page of one run, and return where it is, or ``skipped: <reason>``."""
    if importlib.util.find_spec("plotly") is None and any(path.suffix == ".html" for path in outputs):
        return "skipped: the package plotly is not installed (`pip install plotly`)"
    _compare([str(run.folder)], outputs)
    return ", ".join(map(str, outputs))


def _compare(folders: Sequence[str], outputs: Sequence[Path]) -> tuple[list[RunRecord], list[Group], list[str]]:
    """Write the files of a report on runs; return the runs, their groups, and messages about what was left out."""
    records, problems = find_records(folders)
    groups = group_records(records)
    problems += repeated_seeds(groups)
    words = ["sb3-clipvf", "report", *folders, *(word for path in outputs for word in ("-o", str(path)))]
    write_outputs(groups, problems, shlex.join(words), outputs)
    return records, groups, problems


def _write_numbers(path: Path, run: Run, curve: TrainingCurve, evaluation: Evaluation, files: dict[str, str]) -> None:
    numbers = {
        "env": run.env_id,
        "algo": run.algo,
        "model": str(run.model_path),
        "mean_return": evaluation.mean,
        "std_return": evaluation.std,
        "n_episodes": len(evaluation.returns),
        "deterministic": evaluation.deterministic,
        "seed": evaluation.seed,
        "returns": evaluation.returns,
        "lengths": evaluation.lengths,
        "num_timesteps": evaluation.num_timesteps,
        "training_seconds": curve.training_seconds,
        "steps_per_second": curve.steps_per_second,
        "files": files,
    }
    with atomic_write(path) as file:
        file.write(json.dumps(numbers, indent=2).encode() + b"\n")


def _print_numbers(curve: TrainingCurve, evaluation: Evaluation, total: int | None) -> None:
    kind = "most probable actions" if evaluation.deterministic else "sampled actions"
    low, high = min(evaluation.returns), max(evaluation.returns)
    speed = curve.steps_per_second
    time = "time not known" if speed is None else f"about {curve.training_seconds:,.0f} s ({speed:,.0f} steps/s)"
    # The time is that of the whole run, but a best model was saved during it.
    training = [f"{evaluation.num_timesteps:,} steps", time]
    if total is None:
        training = [training[0], "of a run that did not end"]
    elif evaluation.num_timesteps != total:
        training = [
            f"{evaluation.num_timesteps:,} of {total:,} steps",
            time if speed is None else f"all of them in {time}",
        ]
    sys.stdout.write(
        f"  mean return     {evaluation.mean:.2f} +/- {evaluation.std:.2f} (std of {len(evaluation.returns)} episodes, "
        f"{low:.2f} to {high:.2f}; {kind})\n"
        f"  training        {', '.join(filter(None, training))}\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sb3-clipvf report",
        description="Evaluate a trained agent; write learning_curve.png, report.json, a video and report.html into its "
        "run folder. With RUNS, compare the files of runs instead, without evaluating them.",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUNS", help="runs, or folders of runs at any depth, to compare in one page"
    )
    parser.add_argument(
        "-o",
        "--output",
        action="append",
        type=Path,
        help=f"file to write; repeat the option for several formats: {', '.join(SUFFIXES)} (default: report.html, "
        "in the run folder unless RUNS are given)",
    )
    parser.add_argument("--env", default="CartPole-v1", help="environment id (default: %(default)s)")
    parser.add_argument("-f", "--folder", default="logs", help="log folder of the training (default: %(default)s)")
    parser.add_argument("--algo", default=ALGORITHM, help="algorithm (default: %(default)s)")
    parser.add_argument(
        "--exp-id", type=RunId.parse, default=0, help="number of the run (default: 0, the newest with a model)"
    )
    parser.add_argument(
        "--load-best", action="store_true", help="use best_model.zip, the best model of the evaluations during training"
    )
    parser.add_argument("--episodes", type=int, default=20, help="number of episodes (default: %(default)s)")
    parser.add_argument("--n-envs", type=int, default=8, help="number of parallel environments (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=EVALUATION_SEED, help="seed of the environments (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="PyTorch device of the policy (default: %(default)s)")
    parser.add_argument("--no-video", action="store_true", help="do not record a video")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--deterministic",
        action="store_true",
        default=None,
        help="use the most probable actions (the default except for Atari and MiniGrid)",
    )
    actions.add_argument(
        "--stochastic", action="store_false", dest="deterministic", default=None, help="sample the actions"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run ``sb3-clipvf report``.

    :param argv: Options; None uses those of the process.
    :return: Exit code 0.
    :raises ValueError: If the run does not exist or holds no model, or a number is out of range.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    check_outputs(args.output or [])
    if args.runs:
        for name, value in vars(args).items():
            if name not in ("runs", "output") and value != parser.get_default(name):
                option = "--stochastic" if value is False else option_name(name)
                raise ValueError(
                    f"`{option}` must be left out with RUNS, got {value}: runs are compared by their files. "
                    "Evaluate each run first, with `sb3-clipvf report --env`."
                )
        compare_runs(args.runs, args.output or [Path("report.html")])
        return 0
    for name in ("episodes", "n_envs"):
        check_int(option_name(name), getattr(args, name), 1, "Pass a positive number.")
    check_int("--seed", args.seed, 0, "Pass a number that is not negative.", MAX_SEED)
    if args.algo != ALGORITHM:  # ClipPPO checks its own
        check_device(args.device)
    _report_run(args)
    return 0


def _report_run(args: argparse.Namespace) -> None:
    """Evaluate the run that the options name; write its files, and print their paths and what to try next."""
    run = find_run(args.folder, args.env, args.algo, args.exp_id, args.load_best)
    sys.stdout.write(f"{run.env_id}, {run.algo}, {run.folder}: {args.episodes} episodes ...\n")
    sys.stdout.flush()  # the evaluation may take long
    evaluation = evaluate_run(run, args.episodes, args.n_envs, args.seed, args.deterministic, args.device)
    # The best model does not know how its training went on.
    problems: list[str] = []
    final = read_saved_model(run.folder / f"{run.settings_folder.name}.zip", problems)
    training = read_training(run.folder, final, processes_of(read_arguments(run)), problems)
    for problem in problems:
        sys.stdout.write(f"  left out        {problem}\n")
    episodes = Series.of([]) if training.is_mean else training.episodes
    curve = TrainingCurve(episodes.steps, episodes.values, episodes.seconds)
    _print_numbers(curve, evaluation, final.num_timesteps)

    figure_path, numbers_path = run.folder / "learning_curve.png", run.folder / "report.json"
    video_path = run.folder / "videos" / f"{run.model_path.stem}.mp4"
    # Without the files, which may fail: the evaluation may have taken long.
    _write_numbers(numbers_path, run, curve, evaluation, {})
    write_learning_curve(run, curve, evaluation, figure_path)
    files = {"learning_curve": str(figure_path)}
    sys.stdout.write(f"  learning curve  {figure_path}\n")
    video = "skipped: --no-video"
    if not args.no_video:
        video = record_video(run, video_path, evaluation.deterministic, args.seed, args.device)
    if not video.startswith("skipped"):
        files["video"], video = str(video_path), f"{video_path} ({video})"
    sys.stdout.write(f"  video           {video}\n")
    _write_numbers(numbers_path, run, curve, evaluation, files)
    sys.stdout.write(f"  numbers         {numbers_path}\n")
    sys.stdout.write(
        f"  page            {_write_page(run, args.output or [run.folder / 'report.html'])}\n\nTry next:\n"
    )
    for purpose, command in next_commands(run, args.folder):
        sys.stdout.write(f"  # {purpose}\n  {command}\n")
