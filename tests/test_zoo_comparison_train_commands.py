"""Commands of a report: those that repeat a run's training, and nothing that a run could slip into them."""

import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sb3_clipvf import ClipPPO, zoo
from sb3_clipvf.zoo.comparison.groups import Group, group_records
from sb3_clipvf.zoo.comparison.records import find_records
from sb3_clipvf.zoo.comparison.train_commands import train_commands
from tests.written_runs import write_run

TODAY: dict[str, Any] = yaml.safe_load(zoo.hyperparams_path().read_text())["CartPole-v1"]
"""Today's settings of CartPole-v1, of 100,000 steps."""

TRAIN = "sb3-clipvf train --env CartPole-v1"


def groups_of(folder: Path) -> list[Group]:
    return group_records(find_records([folder])[0])


def text_of(folder: Path) -> str:
    (group,) = groups_of(folder)
    return train_commands(group)


def changed(params: Mapping[Any, Any], **arguments: Any) -> dict[str, Any]:
    """Settings and options of a training with changes to today's settings."""
    return {"settings": {**TODAY, **params}, "arguments": {"hyperparams": dict(params), **arguments}}


def in_shell(text: str) -> tuple[list[list[str]], Any]:
    """The arguments of each call of the command, and the settings in the file that the first one names."""
    program = 'sb3-clipvf() { printf "%s\\0" "$@"; printf "\\n"; }\n' + text + '\n[ -z "$settings" ] || cat "$settings"'
    output = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout
    calls, _, settings = output.rpartition("\0\n")
    return [call.rstrip("\0").split("\0") for call in calls.split("\n")], yaml.safe_load(settings)


def test_one_command_serves_if_todays_settings_are_the_runs(tmp_path: Path) -> None:
    for seed in (1, 2):
        made = changed({"clip_range": "lin_0.1"}, n_timesteps=400, vec_env="envpool", device="auto")
        write_run(tmp_path / f"clipppo/CartPole-v1_{seed}", seed=seed, **made)
    assert text_of(tmp_path) == (
        "for seed in 1 2; do\n"
        f"  {TRAIN} --seed $seed --vec-env envpool -n 400 -params 'clip_range:'\"'\"'lin_0.1'\"'\"''\n"
        "done"
    )


def test_runs_of_several_processes_are_a_group_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "clipppo/CartPole-v1_1", **changed({}))
    write_run(tmp_path / "clipppo/CartPole-v1_2", **changed({}, n_processes=2))
    launch = "torchrun --standalone --nproc-per-node 2 -m sb3_clipvf train --env CartPole-v1"
    assert {train_commands(group) for group in groups_of(tmp_path)} == {f"{TRAIN} --seed 1", f"{launch} --seed 1"}


def test_runs_evaluated_in_other_environments_are_a_group_of_their_own(tmp_path: Path) -> None:
    for number, arguments in enumerate(({}, *[{"eval_env_kwargs": {"g": 5.0}}] * 2), 1):
        write_run(tmp_path / f"clipppo/CartPole-v1_{number}", seed=number, **changed({}, **arguments))
    own, others = groups_of(tmp_path)
    assert (own.name, others.name) == ("default", 'eval_env_kwargs {"g": 5.0}')
    assert train_commands(others) == f"for seed in 2 3; do\n  {TRAIN} --seed $seed --eval-env-kwargs g:5.0\ndone"


def test_other_algorithms_have_the_settings_of_the_zoo(tmp_path: Path) -> None:
    settings = {"policy": "MlpPolicy", "ent_coef": 0.0, "n_envs": 8, "n_timesteps": 5e5}
    write_run(tmp_path / "a2c/CartPole-v1_1", algo="a2c", settings=settings)
    assert text_of(tmp_path) == "sb3-clipvf train --algo a2c --env CartPole-v1 --seed 1"


@pytest.mark.parametrize(
    "settings",
    [
        {**TODAY, "gamma": 0.5},  # changed since, or from a trial of a study
        {key: value for key, value in TODAY.items() if key != "gamma"},  # added since
        {**TODAY, "target_kl": 0.1, "normalize": "{'norm_reward': False}", "policy_kwargs": "dict(a=[1])"},
    ],
)
def test_settings_that_are_not_todays_are_written_into_a_file(settings: dict[str, Any], tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = tmp_path / f"clipppo/CartPole-v1_{seed}"
        write_run(folder, seed=seed, settings=settings, arguments={"n_timesteps": 400, "trial_id": 3})
    calls, written = in_shell(text_of(tmp_path))
    assert written == {"CartPole-v1": {**settings, "n_timesteps": 400}}
    start, end = ["train", "--env", "CartPole-v1", "--seed"], ["--conf-file"]
    assert [(call[:4], call[4], call[5:-1]) for call in calls] == [(start, seed, end) for seed in ("1", "2")]


def test_settings_files_are_named_if_they_have_the_settings_of_the_run(tmp_path: Path) -> None:
    config = tmp_path / "own.yml"
    config.write_text(yaml.safe_dump({"default": {"policy": "MlpPolicy", "n_timesteps": 1e3, "gamma": 0.9}}))
    settings = {"n_timesteps": 1e3, "gamma": 0.8}
    arguments = {"conf_file": str(config), "hyperparams": {"gamma": 0.8}}
    write_run(tmp_path / "logs/clipppo/CartPole-v1_1", settings=settings, arguments=arguments)
    assert text_of(tmp_path / "logs") == f"{TRAIN} --seed 1 --conf-file {config} -params gamma:0.8"
    for name in (str(tmp_path / "gone.yml"), "package.settings", "/dev/zero.yml"):
        group = groups_of(tmp_path / "logs")[0]
        record = replace(group.records[0], arguments={**arguments, "env": "CartPole-v1", "conf_file": name})
        _, written = in_shell(train_commands(replace(group, records=(record,))))
        assert written == {"CartPole-v1": {"policy": "MlpPolicy", **settings}}


def test_settings_files_beside_a_run_are_not_named(tmp_path: Path) -> None:
    config = tmp_path / "clipppo" / "settings.yml"
    settings = {"clip_range": None, "gamma": 0.9, "n_timesteps": 100}
    write_run(tmp_path / "clipppo/CartPole-v1_1", settings=settings, arguments={"conf_file": str(config)})
    text = text_of(tmp_path)
    assert "settings.yml" not in text
    assert in_shell(text)[1] == {"CartPole-v1": {"policy": "MlpPolicy", **settings}}
    beside = str(tmp_path / "same/settings.yml")
    write_run(tmp_path / "same/clipppo/CartPole-v1_1", settings=TODAY, arguments={"conf_file": beside})
    assert text_of(tmp_path / "same") == f"{TRAIN} --seed 1"


def test_trained_agents_are_named(tmp_path: Path) -> None:
    for number, (agent, end) in enumerate((("logs/a b.zip", " -i 'logs/a b.zip'"), ("-x", "")), 1):
        write_run(tmp_path / f"{number}/CartPole-v1_1", **changed({}, trained_agent=agent))
        note, command = text_of(tmp_path / str(number)).split("\n")
        assert command == f"{TRAIN} --seed 1{end}"
        assert note.startswith("# The training continues from an agent:" if end else "# Without the agent that")


def test_unknown_seeds_and_settings_are_stated(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1", **changed({}, seed=None))
    assert text_of(tmp_path) == f"# The files of a run do not name its seed.\n{TRAIN}"
    (folder / "CartPole-v1" / "config.yml").unlink()
    assert "# The settings of the run are not known: these are today's.\n" in text_of(tmp_path)


@pytest.mark.slow
def test_commands_repeat_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = {
        "policy": "MlpPolicy",
        "n_envs": 2,
        "n_steps": 16,
        "batch_size": 16,
        "n_timesteps": 64,
        "clip_range": "lin_0.3",
    }
    (tmp_path / "logs").mkdir()
    Path("logs/settings.yml").write_text(yaml.safe_dump({"CartPole-v1": tiny}))
    options = "train --env CartPole-v1 --seed 3 --eval-freq -1 --device cpu --conf-file logs/settings.yml"
    assert zoo.main([*options.split(), "-params", "gamma:0.9"]) == 0
    program = f'sb3-clipvf() {{ {sys.executable} -m sb3_clipvf "$@" -f again; }}\n{text_of(Path("logs"))}'
    subprocess.run(["bash", "-ec", program], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    first, second = (ClipPPO.load(f"{name}/clipppo/CartPole-v1_1/CartPole-v1.zip") for name in ("logs", "again"))
    assert first.gamma == second.gamma == 0.9
    for key, value in first.policy.state_dict().items():
        np.testing.assert_array_equal(value, second.policy.state_dict()[key])


# --- what a run could slip in


@pytest.mark.parametrize(
    ("key", "value", "is_shown"),
    [
        ("policy_kwargs", "dict(net_arch=[64], activation_fn=nn.ReLU)", True),
        ("policy_kwargs", "__import__('os').system('x')", False),
        ("policy_kwargs", "dict(a=dict(b=[f() for f in g]))", False),
        ("policy_kwargs", {"net_arch": [64, "f()"]}, False),
        ("policy_kwargs", {"net_arch": [64, 32]}, True),
        ("env_wrapper", "some.module.Wrapper", False),
        ("callback", [{"some.module.Callback": {"a": 1}}], False),
        ("learning_rate", "lin_0.1", True),
        ("normalize", " \t__import__('os').system('x')", False),
        ("policy", "some.module.Policy", False),
        ("policy", "MlpPolicy", True),
        ("net_arch", OrderedDict(a=1), False),
    ],
)
def test_commands_leave_out_what_could_run_code(key: str, value: object, is_shown: bool, tmp_path: Path) -> None:
    write_run(tmp_path / "clipppo/CartPole-v1_1", settings=TODAY)
    (group,) = groups_of(tmp_path)
    made = changed({"gamma": 0.9, key: value})
    arguments = {**group.records[0].arguments, **made["arguments"]}
    record = replace(group.records[0], settings=made["settings"], arguments=arguments)
    text = train_commands(replace(group, records=(record,)))
    calls, written = in_shell(text)
    # Settings that a command shows are in its pairs, or in its file.
    assert f"{key}:" in " ".join(calls[0]) if is_shown else written["CartPole-v1"].get(key, TODAY.get(key)) != value
    assert text.startswith(f"# Without {key} of the settings: read them first") == (not is_shown)


def test_wrappers_that_are_todays_are_not_left_out(tmp_path: Path) -> None:
    atari = yaml.safe_load(zoo.hyperparams_path().read_text())["atari"]
    write_run(tmp_path / "clipppo/PongNoFrameskip-v4_1", env_id="PongNoFrameskip-v4", settings=atari)
    assert text_of(tmp_path) == "sb3-clipvf train --env PongNoFrameskip-v4 --seed 1"


def test_commands_quote_what_a_run_names(tmp_path: Path) -> None:
    for number in (1, 2):
        arguments = {"seed": "1; touch mark", "env": "a; b", "n_timesteps": "8; c", "device": "$(d)", "vec_env": "`e`"}
        write_run(tmp_path / f"clipppo/CartPole-v1_{number}", arguments=arguments)
    calls, written = in_shell(text_of(tmp_path))
    (call,) = calls
    assert call[:-1] == ["train", "--env", "a; b", "--vec-env", "`e`", "--device", "$(d)", "--conf-file"]
    assert written == {"a; b": {"policy": "MlpPolicy", "n_timesteps": 400.0}}


@pytest.mark.parametrize("value", ["a\nEND\ntouch mark", "END", "\x03touch mark", "$(touch mark)", "`touch mark`"])
def test_values_stay_in_the_file_of_settings(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for env_id in ("END", "CartPole-v1"):
        write_run(tmp_path / f"{env_id}_1", env_id=env_id, settings={"policy": value, "gamma": 0.9})
        (group,) = groups_of(tmp_path / f"{env_id}_1")
        _, written = in_shell(train_commands(group))
        assert written == {env_id: {"policy": value, "gamma": 0.9, "n_timesteps": 400.0}}
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("a\ntouch mark #", r"'a\ntouch mark #'"),
        ("a\u2028b\x1bc", r"'a\u2028b\x1bc'"),
        ("None", "'None'"),
    ],
)
def test_keys_of_a_run_stay_in_the_comment(key: str, named: str, tmp_path: Path) -> None:
    write_run(tmp_path / "CartPole-v1_1", **changed({"gamma": 0.9, key: 1}))
    text = text_of(tmp_path)
    assert text.startswith(f"# Without {named} of the settings: read them first, since they could run code.\nsettings=")
    assert in_shell(text)[1] == {"CartPole-v1": {**TODAY, "gamma": 0.9}}


@pytest.mark.parametrize(
    "arguments",
    [
        {"gym_packages": ["--conf-file=/d/evil.py", "a b", "-n", ""]},
        {"env_kwargs": {"a": OrderedDict(a=1), True: 3, "b\nc": 4}},
        {"device": "--conf-file=/d/evil.py", "vec_env": "-x", "eval_freq": "\x03touch mark\n"},
        {"conf_file": "--help"},
        {"conf_file": "a\x00b.py"},
        {"n_timesteps": "--conf-file=/d/evil.py"},
        {"env_kwargs": "evil", "eval_env_kwargs": ["evil"], "hyperparams": "evil"},
    ],
)
def test_values_of_a_run_are_no_options(arguments: dict[str, object], tmp_path: Path) -> None:
    write_run(tmp_path / "clipppo/CartPole-v1_1", settings=TODAY, arguments=arguments)
    text = text_of(tmp_path)
    calls, _ = in_shell(text)
    assert calls[0][:5] == ["train", "--env", "CartPole-v1", "--seed", "1"]
    assert calls[0][5:] == []
    assert "evil" not in text and "mark" not in text


@pytest.mark.parametrize("arguments", [{"env": "-n"}, {"env": "a\x03b"}, {"algo": "--conf-file=/d/evil.py"}])
def test_runs_without_a_usable_name_have_no_command(arguments: dict[str, str], tmp_path: Path) -> None:
    write_run(tmp_path / "clipppo/CartPole-v1_1", arguments=arguments)
    assert text_of(tmp_path) == ""
