"""How the RL Zoo's experiment manager reads ClipPPO's settings and builds the model."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rl_zoo3
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3.common.callbacks import ProgressBarCallback
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_clipvf import ClipPPO, TensorRolloutBuffer
from sb3_clipvf.engines.callback_access import may_read_actions
from sb3_clipvf.envs import FastDummyVecEnv, FastSubprocVecEnv, FastVecNormalize
from sb3_clipvf.zoo import hyperparams_path, register
from sb3_clipvf.zoo.checked_files import read_settings
from sb3_clipvf.zoo.entries import ZOO_KEYS
from sb3_clipvf.zoo.experiment import ClipPPOExperimentManager, experiment_manager
from sb3_clipvf.zoo.settings import COMMAND_LINE_KEYS, check_hyperparams, constructor_keys, import_packages

register()

ENTRY: dict[str, Any] = {"policy": "MlpPolicy", "n_timesteps": 64, "n_steps": 8, "batch_size": 8}


def _manager(
    tmp_path: Path, entry: dict[str, Any], algo: str = "clipppo", env_id: str = "CartPole-v1", **kwargs: Any
) -> ExperimentManager:
    config = tmp_path / "settings.yml"
    config.write_text(yaml.safe_dump({env_id: entry}))
    return ClipPPOExperimentManager(
        kwargs.pop("args", Namespace()),
        algo,
        env_id,
        str(tmp_path / "logs"),
        config=str(config),
        device="cpu",
        **{"eval_freq": -1, "log_interval": -1, **kwargs},
    )


def _model(manager: ExperimentManager) -> Any:
    result = manager.setup_experiment()
    assert result is not None
    model = result[0]
    model.env.close()  # its monitor holds a file open
    return model


def test_schedules_of_all_coefficients_reach_clipppo_as_written(tmp_path: Path) -> None:
    coefficients = {
        "learning_rate": "cos_0.001",
        "clip_range": "exp_0.3",
        "clip_range_vf": "lin_2.0",
        "ent_coef": "lin_0.01",
        "vf_coef": "const_0.7",
        "kl_coef": "lin_0.5",
    }
    model = _model(_manager(tmp_path, {**ENTRY, **coefficients}))
    assert isinstance(model, ClipPPO)
    assert {name: getattr(model, name) for name in coefficients} == coefficients
    # 1e-12: one rounding of a float64 product at most.
    assert model.lr_schedule(0.5) == pytest.approx(0.0005, rel=1e-12)


def test_numbers_and_null_reach_clipppo_as_written(tmp_path: Path) -> None:
    model = _model(_manager(tmp_path, {**ENTRY, "clip_range": None, "clip_range_vf": None, "kl_coef": 1.0}))
    assert (model.clip_range, model.clip_range_vf, model.kl_coef) == (None, None, 1.0)
    model = _model(_manager(tmp_path, {**ENTRY, "clip_range": 0.3, "clip_range_vf": 2, "learning_rate": 0.01}))
    assert (model.clip_range, model.clip_range_vf, model.learning_rate) == (0.3, 2, 0.01)


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    manager = _manager(tmp_path, {**ENTRY, "clip_range": 0.3}, hyperparams={"clip_range": "lin_0.1", "gamma": 0.9})
    model = _model(manager)
    assert (model.clip_range, model.gamma) == ("lin_0.1", 0.9)


@pytest.mark.parametrize(
    ("policy", "kwargs"),
    [
        ("MlpPolicy", "dict(net_arch=[8], activation_fn=nn.ReLU)"),
        ("SquashedMlpPolicy", "dict(net_arch=[4])"),
        ("SquashedMlpPolicy", None),
    ],
)
def test_a_run_that_continues_an_agent_saves_its_networks(policy: str, kwargs: str | None, tmp_path: Path) -> None:
    own = {"policy": policy, **({} if kwargs is None else {"policy_kwargs": kwargs})}
    model = _model(_manager(tmp_path, {**ENTRY, **own}, env_id="Pendulum-v1"))
    model.save(tmp_path / "agent.zip")

    def saved(entry: dict[str, Any]) -> dict[str, Any]:
        manager = _manager(tmp_path, {**ENTRY, **entry}, env_id="Pendulum-v1", trained_agent=f"{tmp_path}/agent.zip")
        assert _model(manager).policy_kwargs == model.policy_kwargs
        return dict(yaml.unsafe_load(Path(manager.params_path, "config.yml").read_text()))

    assert saved(own) == {**ENTRY, **own}  # as text
    other = {"policy": "MlpPolicy", "policy_kwargs": "dict(net_arch=[16])"}
    assert saved(other) == {**ENTRY, "policy": policy, "policy_kwargs": model.policy_kwargs}


def test_a_run_that_continues_an_agent_saves_its_arguments(tmp_path: Path) -> None:
    buffer = "sb3_clipvf.rollout.TensorRolloutBuffer"
    own = {"kl_coef": 1.0, "adaptive_kl_target": 0.01, "clip_range": None, "stats_window_size": 7, "gamma": 0.9}
    first = _manager(tmp_path, {**ENTRY, **own, "ent_coef": 0.01, "rollout_buffer_class": buffer})
    _model(first).save(tmp_path / "agent.zip")
    manager = _manager(
        tmp_path, {**ENTRY, "gamma": 0.8, "ent_coef": 0.0, "n_epochs": 10}, trained_agent=f"{tmp_path}/agent.zip"
    )
    assert _model(manager).kl_coef == 1.0
    saved = read_settings(Path(manager.params_path, "config.yml"))
    changed = {"gamma": 0.8, "ent_coef": 0.0, "n_epochs": 10, "rollout_buffer_class": buffer}
    assert saved == {**ENTRY, **own, **changed}


def test_a_run_that_continues_an_agent_of_sb3_saves_settings_that_can_be_read(tmp_path: Path) -> None:
    """SB3 stores its clip range as a function."""
    model = _model(_manager(tmp_path, {**ENTRY, "clip_range": 0.1, "n_epochs": 2}, algo="ppo"))
    model.save(tmp_path / "agent.zip")
    manager = _manager(tmp_path, ENTRY, trained_agent=f"{tmp_path}/agent.zip")
    with pytest.warns(UserWarning, match="not saved by ClipPPO"):
        _model(manager)
    saved = read_settings(Path(manager.params_path, "config.yml"))
    assert saved == {**ENTRY, "n_epochs": 2, "engine": "autograd", "vf_clip": "prediction", "vf_clip_units": "absolute"}


def test_a_buffer_class_can_be_named(tmp_path: Path) -> None:
    model = _model(_manager(tmp_path, {**ENTRY, "rollout_buffer_class": "sb3_clipvf.rollout.TensorRolloutBuffer"}))
    assert type(model.rollout_buffer) is TensorRolloutBuffer


def test_clipppo_is_trained_and_evaluated_in_fast_environments(tmp_path: Path) -> None:
    manager = _manager(tmp_path, {**ENTRY, "n_envs": 2})
    assert type(_model(manager).env) is FastDummyVecEnv
    assert type(manager.create_envs(1, eval_env=True)) is FastDummyVecEnv


def test_the_warning_of_a_single_rollout_names_the_command_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = {**ENTRY, "n_timesteps": 8, "n_epochs": 1, "clip_range": "lin_0.2", "learning_rate": "lin_0.001"}
    manager = _manager(tmp_path, entry, log_interval=1, verbose=0)
    result = manager.setup_experiment()
    assert result is not None
    manager.learn(result[0])
    assert [record.getMessage() for record in caplog.records if "rollout" in record.getMessage()] == [
        "The run collects one rollout: `learning_rate` is 0 and `clip_range` is 0 in its only update. As in SB3, "
        "schedules end with the run. Train for more rollouts of 8 steps (`-n`), or use constant values: "
        "`-params learning_rate:0.001 clip_range:0.2`."
    ]


def test_other_algorithms_and_choices_keep_their_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(_model(_manager(tmp_path, ENTRY, algo="ppo")).env) is DummyVecEnv
    assert _manager(tmp_path, ENTRY, algo="ppo", vec_env_type="subproc").vec_env_class is SubprocVecEnv
    assert _manager(tmp_path, ENTRY, vec_env_type="subproc").vec_env_class is FastSubprocVecEnv

    class Own(DummyVecEnv):
        pass

    monkeypatch.setattr(ExperimentManager, "default_vec_env_cls", Own)
    assert type(_model(_manager(tmp_path, ENTRY)).env) is Own


def test_clipppo_is_normalised_fast_with_the_given_settings(tmp_path: Path) -> None:
    manager = _manager(tmp_path, {**ENTRY, "normalize": "{'norm_obs': False, 'clip_reward': 3.0}", "gamma": 0.9})
    env = _model(manager).env
    assert type(env) is FastVecNormalize
    assert (env.norm_obs, env.norm_reward, env.clip_reward, env.gamma) == (False, True, 3.0, 0.9)
    evaluated = manager.create_envs(1, eval_env=True)
    assert type(evaluated) is FastVecNormalize
    assert (evaluated.training, evaluated.norm_reward) == (False, False)


def test_other_algorithms_and_settings_are_normalised_as_the_zoo_does(tmp_path: Path) -> None:
    assert type(_model(_manager(tmp_path, {**ENTRY, "normalize": True}, algo="ppo")).env) is VecNormalize
    assert not isinstance(_model(_manager(tmp_path, ENTRY)).env, VecNormalize)


def test_a_continued_run_is_normalised_fast_with_its_statistics(tmp_path: Path) -> None:
    first = _manager(tmp_path, {**ENTRY, "normalize": True})
    model = _model(first)
    model.env.ret_rms.count = 7.0
    first.save_trained_model(model)
    trained = f"{first.save_path}/CartPole-v1.zip"
    env = _model(_manager(tmp_path, {**ENTRY, "normalize": True}, trained_agent=trained)).env
    assert type(env) is FastVecNormalize
    assert env.ret_rms.count == 7.0


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(
    ("in_file", "given", "for_evaluation", "trained", "evaluated"),
    [
        ({"g": 5.0}, None, None, 5.0, 5.0),
        ({"g": 5.0}, {"g": 3.0}, None, 3.0, 3.0),
        (None, {"g": 3.0}, None, 3.0, 3.0),
        ({"g": 5.0}, None, {"g": 1.0}, 5.0, 1.0),
        ({"g": 5.0}, {"g": 3.0}, {"g": 1.0}, 3.0, 1.0),
        ({"g": 5.0}, None, {"render_mode": "rgb_array"}, 5.0, 5.0),
        (None, None, {"g": 1.0}, 10.0, 1.0),
    ],
)
def test_evaluations_take_place_in_the_environment_of_the_training(
    tmp_path: Path,
    optimize: bool,
    in_file: Any,
    given: Any,
    for_evaluation: Any,
    trained: float,
    evaluated: float,
) -> None:
    manager = _manager(
        tmp_path,
        {**ENTRY, "env_kwargs": in_file},
        env_id="Pendulum-v1",
        env_kwargs=given,
        eval_env_kwargs=for_evaluation,
        optimize_hyperparameters=optimize,
    )
    result = manager.setup_experiment()
    assert (result is None) is optimize
    for eval_env, expected in ((False, trained), (True, evaluated)):
        venv = manager.create_envs(1, eval_env=eval_env)
        assert venv.get_attr("g") == [expected]
        venv.close()
    if result is not None:
        result[0].env.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("vec_env", [None, "gymnasium"])
def test_episodes_that_wrappers_end_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vec_env: str | None
) -> None:
    monkeypatch.setattr(ClipPPOExperimentManager, "vec_env", vec_env)
    limit = {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 3}}
    manager = _manager(tmp_path, {**ENTRY, "n_envs": 2, "env_wrapper": limit}, n_timesteps=16)
    manager.eval_freq = 8
    result = manager.setup_experiment()
    assert result is not None
    manager.learn(result[0])
    assert {episode["l"] for episode in result[0].ep_info_buffer or ()} == {3}
    assert set(np.load(Path(manager.save_path, "evaluations.npz"))["ep_lengths"].flat) == {3}
    assert Path(manager.save_path, "0.monitor.csv").read_text().count(",3,") > 1
    saved = yaml.unsafe_load(Path(manager.params_path, "config.yml").read_text())
    assert saved["env_wrapper"] == limit


def test_an_unknown_key_of_the_file_is_refused(tmp_path: Path) -> None:
    manager = _manager(tmp_path, {**ENTRY, "clip_rnage": 0.2})
    with pytest.raises(
        ValueError, match=r"`clip_rnage` .* the entry for CartPole-v1 in .*settings.yml. Did you mean `clip_range`"
    ):
        manager.setup_experiment()
    assert not (tmp_path / "logs").exists()


def test_an_unknown_key_of_the_command_line_is_refused(tmp_path: Path) -> None:
    manager = _manager(tmp_path, ENTRY, hyperparams={"n_env": 4})
    with pytest.raises(ValueError, match="`n_env` must be .* got `n_env: 4` in `-params`. Did you mean `n_envs`"):
        manager.setup_experiment()


def test_an_unknown_key_without_a_near_match_is_refused_with_the_list_of_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`zzz` must be .* The keys are: adaptive_kl_target, .*, vf_coef"):
        _manager(tmp_path, {**ENTRY, "zzz": 1}).setup_experiment()


def test_keys_of_other_algorithms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`buffer_size` must be an argument of ClipPPO"):
        _manager(tmp_path, {**ENTRY, "buffer_size": 100}).setup_experiment()


@pytest.mark.parametrize("key", sorted(COMMAND_LINE_KEYS))
def test_keys_that_the_command_line_sets_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"`{key}` must be set by the option `--.*, got `{key}: 1` in the entry for"):
        _manager(tmp_path, {**ENTRY, key: 1}).setup_experiment()


@pytest.mark.parametrize(("key", "null"), [("policy", False), ("n_timesteps", False), ("n_timesteps", True)])
def test_a_missing_key_is_named(tmp_path: Path, key: str, null: bool) -> None:
    entry = {name: value for name, value in ENTRY.items() if name != key}
    entry |= {key: None} if null else {}
    with pytest.raises(ValueError, match=f"`{key}` must be set for each environment"):
        _manager(tmp_path, entry).setup_experiment()


def test_a_number_that_yaml_reads_as_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`learning_rate` must be a number, got the text '1e-3' .* !!float 1e-3"):
        _manager(tmp_path, {**ENTRY, "learning_rate": "1e-3"}).setup_experiment()
    with pytest.raises(ValueError, match="got the text '64' in `-params`. Write `n_steps:64`."):
        _manager(tmp_path, ENTRY, hyperparams={"n_steps": "64"}).setup_experiment()


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("normalize", "{clip_obs: 1e1}", "`normalize.clip_obs` must be a number, got the text '1e1' in .* !!float 1e1"),
        ("normalize", "{clip_reward: inf}", "`normalize.clip_reward` must be a number, got the text 'inf'"),
        ("policy_kwargs", "{optimizer_kwargs: {eps: 1e-5}}", "`policy_kwargs.optimizer_kwargs.eps` must be a number"),
        (
            "policy_kwargs",
            "{net_arch: [8, 6e1]}",
            r"`policy_kwargs.net_arch\[1\]` must be a number, got the text '6e1'",
        ),
        ("env_kwargs", "{g: 1.0e1}", "`env_kwargs.g` must be a number, got the text '1.0e1'"),
        (
            "env_wrapper",
            "[{gymnasium.wrappers.TimeLimit: {max_episode_steps: 1e2}}]",
            r"`env_wrapper\[0\].gymnasium.wrappers.TimeLimit.max_episode_steps` must be a number",
        ),
        ("clip_range", "None", "`clip_range` must not be the text 'None', got it in .*settings.yml. .* `null`"),
    ],
)
def test_nested_numbers_and_null_that_yaml_reads_as_text_are_refused(
    tmp_path: Path, key: str, value: str, rule: str
) -> None:
    manager = _manager(tmp_path, {**ENTRY, key: yaml.safe_load(value)})
    with pytest.raises(ValueError, match=rule):
        manager.read_hyperparameters()


def test_text_that_looks_like_a_number_is_refused_in_pairs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text '1e1' in `-params`. Write it without quotes."):
        _manager(tmp_path, ENTRY, hyperparams={"normalize": {"clip_obs": "1e1"}}).read_hyperparameters()
    with pytest.raises(ValueError, match="text 'None', got it in `-params`. Write `clip_range:None`."):
        _manager(tmp_path, ENTRY, hyperparams={"clip_range": "None"}).read_hyperparameters()


def test_nested_text_is_accepted(tmp_path: Path) -> None:
    """YAML reads 4 without quotes as a number, so that '4' is meant as text."""
    entry = {**ENTRY, "env_kwargs": {"map_name": "4x4", "level": "4", "frequency": 1e1, "mode": "None"}}
    hyperparams, _ = _manager(tmp_path, entry).read_hyperparameters()
    assert hyperparams == entry


CLASS = "rl_zoo3.wrappers.DelayedRewardWrapper"


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        *[("n_timesteps", value, "must be a whole number, got") for value in (True, [], {})],
        *[("n_timesteps", value, "must be a whole number of at least 1, got") for value in (-1, 0, 0.5, float("nan"))],
        ("n_timesteps", 10**400, r"must be a whole number in \[1, "),
        *[("n_envs", value, "must be a whole number") for value in (0, -1, 2.0, True, [2], "two")],
        *[("frame_stack", value, "must be a whole number") for value in (0, False, 1.5, "two", {})],
        *[("policy", value, "must be text, got") for value in (None, True, 3, ["MlpPolicy"])],
        *[("policy", value, "must name a class with its module, got") for value in ("a.", ".", "a-b.c", "a..b")],
        *[("env_kwargs", value, "must be a dict, got") for value in ("meta", 1e6, [1])],
        ("env_kwargs", {3: 1}, "must have text as keys, got 3"),
        *[("monitor_kwargs", value, "must be a dict, got") for value in ([None], 5)],
        *[
            ("monitor_kwargs", value, "must be a dict, or Python text that evaluates to one, got")
            for value in ("meta", "[3]")
        ],
        ("monitor_kwargs", {"info": ()}, "must hold arguments of Monitor .* got 'info' in it"),
        ("monitor_kwargs", "dict(filename='a')", "must hold arguments of Monitor .* got 'filename' in it"),
        *[
            ("policy_kwargs", value, "must be a dict, or Python text that evaluates to one, got")
            for value in ("dict(", "[1]")
        ],
        ("policy_kwargs", [1], "must be a dict, got"),
        *[
            ("normalize", value, "must be a dict, or Python text that evaluates to one, got")
            for value in ("yes", "True")
        ],
        *[("normalize", value, "must be a dict, got") for value in (1, ["norm_obs"])],
        ("normalize", {"norm_ob": False}, "must hold arguments of VecNormalize .* got 'norm_ob' in it"),
        *[
            (key, value, "must name a class with its module, got")
            for key in ("env_wrapper", "vec_env_wrapper", "callback", "rollout_buffer_class")
            for value in ("lin_", 0.5, "x", ".", {})
            if not (value == {} and key != "rollout_buffer_class")
        ],
        *[
            (key, value, rule)
            for key in ("env_wrapper", "vec_env_wrapper", "callback")
            for value, rule in (
                ([0.9], "must name a class with its module, got 0.9"),
                ({}, "must hold dicts of one class and its arguments, got {}"),
                ({CLASS: {}, "a.b": {}}, "must hold dicts of one class and its arguments, got"),
                ([[CLASS]], "must be a list of classes, got"),
                ([{CLASS: None}], "must hold dicts of arguments, got None for"),
                ([{CLASS: {3: 4}}], "must have text as keys, got 3"),
                ("rl_zoo3.wrappers.Nothing", "must name something that its module holds, got 'rl_zoo3.wrappers.No"),
                ("nothing_here.Wrapper", "must name something that can be imported, got 'nothing_here.Wrapper'"),
                ("rl_zoo3.wrappers.np", "must name a class, got 'rl_zoo3.wrappers.np'"),
            )
        ],
        *[
            (key, {name: {"delays": 2}}, f"must hold arguments of {name.rpartition('.')[2]} .* got 'delays' in it")
            for key, name in (
                ("env_wrapper", CLASS),
                ("vec_env_wrapper", "stable_baselines3.common.vec_env.VecCheckNan"),
                ("callback", "rl_zoo3.callbacks.ParallelTrainCallback"),
            )
        ],
        *[
            (key, "os.path.join", "must name a class, got 'os.path.join' in")
            for key in ("env_wrapper", "vec_env_wrapper", "callback", "policy", "rollout_buffer_class")
        ],
        ("env_wrapper", "rl_zoo3.callbacks.ParallelTrainCallback", "must name a class derived from Env, got"),
        ("vec_env_wrapper", CLASS, "must name a class derived from VecEnv, got"),
        *[
            ("callback", value, "must name a class derived from BaseCallback, got")
            for value in (CLASS, [{"builtins.dict": {}}])
        ],
        ("policy", "nothing_here.Policy", "must name something that can be imported, got"),
        ("rollout_buffer_class", "sb3_clipvf.rollout.Nothing", "must name something that its module holds, got"),
        ("env_kwargs", {"no_such": 1}, "must be arguments of the environment, got 'no_such' in it"),
    ],
)
def test_values_that_the_zoo_reads_are_checked(tmp_path: Path, key: str, value: Any, rule: str) -> None:
    manager = _manager(tmp_path, {**ENTRY, key: value})
    with pytest.raises((ValueError, TypeError, ImportError), match=rf"(?s)^`{key}` {rule}.*\. [A-Z]") as caught:
        manager.setup_experiment()
    assert "settings" in str(caught.value)
    assert not list(tmp_path.glob("logs/*/*"))


def test_a_module_that_fails_as_it_is_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "faulty_wrappers.py").write_text("1 / 0")
    with pytest.raises(ImportError, match="got 'faulty_wrappers.Own' in .*: ZeroDivisionError: division by zero"):
        _manager(tmp_path, {**ENTRY, "env_wrapper": "faulty_wrappers.Own"}).setup_experiment()


def test_a_refused_value_of_the_command_line_names_its_source(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`n_envs` must be a whole number, got 2.5 .* It is in `-params`"):
        _manager(tmp_path, {**ENTRY, "n_envs": 2}, hyperparams={"n_envs": 2.5}).setup_experiment()


@pytest.mark.parametrize(
    "settings",
    [
        {"n_timesteps": 1e2, "frame_stack": None, "env_wrapper": None, "vec_env_wrapper": None, "callback": None},
        {"n_timesteps": 1, "frame_stack": 2, "env_kwargs": None, "monitor_kwargs": None, "normalize": False},
        {"env_kwargs": {"render_mode": None}, "monitor_kwargs": "dict(info_keywords=())", "normalize": "dict()"},
        {"monitor_kwargs": {"allow_early_resets": False}, "policy_kwargs": "dict(net_arch=[8], activation_fn=nn.ReLU)"},
        {"env_wrapper": CLASS, "callback": {"rl_zoo3.callbacks.ParallelTrainCallback": {"gradient_steps": 9}}},
        {"env_wrapper": [{CLASS: {"delay": 3}}, "gymnasium.wrappers.TimeAwareObservation"], "callback": []},
        {"vec_env_wrapper": ["stable_baselines3.common.vec_env.VecCheckNan"], "policy": "MlpPolicy"},
        {"policy": "stable_baselines3.common.policies.ActorCriticPolicy", "policy_kwargs": {"net_arch": [8]}},
    ],
)
def test_values_that_the_zoo_accepts_are_accepted(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert isinstance(_model(_manager(tmp_path, {**ENTRY, **settings})), ClipPPO)
    assert _model(_manager(tmp_path, {**ENTRY, **settings}, algo="ppo")) is not None


def test_null_keys_of_the_zoo_count_as_missing(tmp_path: Path) -> None:
    null: dict[str, Any] = dict.fromkeys(ZOO_KEYS - {"n_timesteps"})
    manager = _manager(tmp_path, {**ENTRY, **null, "clip_range": None, "kl_coef": 1.0})
    model = _model(manager)
    assert (model.n_envs, model.clip_range) == (1, None)
    saved = yaml.unsafe_load(Path(manager.params_path, "config.yml").read_text())
    assert dict(saved) == {**ENTRY, "clip_range": None, "kl_coef": 1.0}


def test_null_on_the_command_line_removes_a_key_of_the_file(tmp_path: Path) -> None:
    manager = _manager(tmp_path, {**ENTRY, "frame_stack": 2, "normalize": True}, hyperparams={"frame_stack": None})
    assert _model(manager).observation_space.shape == (4,)


class Extractor(FlattenExtractor):
    """A class that can be imported, unlike one of a settings file."""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("dict(net_arch=[8])", None),
        ("dict(activation_fn=th.nn.ReLU)", None),
        ("dict(features_extractor_class=Extractor)", None),
        ("dict(features_extractor_class=Own)", "'Own'"),
        ("dict(activation_fn=lambda: th.nn.ReLU())", "cannot find module 'None'"),
        ("dict(optimizer_kwargs=dict(eps=(0.5 for _ in range(2))))", "cannot pickle 'generator' object"),
    ],
)
def test_a_value_that_no_file_can_hold_is_refused_at_the_start(tmp_path: Path, value: str, reason: str | None) -> None:
    config = tmp_path / "settings.py"
    config.write_text(
        "import torch as th\nfrom test_zoo_experiment import Extractor\nclass Own(Extractor):\n    pass\n"
        f"hyperparams = {{'CartPole-v1': dict({ENTRY}, policy_kwargs={value})}}\n"
    )
    manager = _manager(tmp_path, ENTRY)
    manager.config = str(config)
    if reason is None:
        yaml.unsafe_load(Path(_saved(manager), "config.yml").read_text())
        return
    refusal = r"`policy_kwargs` must be a value that YAML files can hold, .* in .*settings\.py: "
    with pytest.raises(ValueError, match=f"{refusal}.*{reason}"):
        manager.setup_experiment()
    assert not (tmp_path / "logs").exists()


def _saved(manager: ExperimentManager) -> str:
    _model(manager)
    return manager.params_path


def test_an_option_that_no_file_can_hold_is_refused_at_the_start(tmp_path: Path) -> None:
    manager = _manager(tmp_path, ENTRY, args=Namespace(eval_env_kwargs={"g": lambda: 1.0}))
    with pytest.raises(ValueError, match="`eval_env_kwargs` must be a value .* in the command line: "):
        manager.setup_experiment()


def test_the_zoos_own_settings_pass_the_checks() -> None:
    entries = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml").read_text())
    for name, entry in entries.items():
        check_hyperparams(entry, (), name)


def test_an_atari_game_without_an_entry_is_refused(tmp_path: Path) -> None:
    manager = _manager(tmp_path, ENTRY)
    manager.env_name = type(manager.env_name)("Game-v0")
    manager._is_atari = True
    with pytest.raises(ValueError, match=r"settings.yml must have an entry for Game-v0 or one named `atari`"):
        manager.read_hyperparameters()


def test_trial_zero_of_a_study_is_loaded(tmp_path: Path) -> None:
    import optuna

    from sb3_clipvf.zoo.tuning import sample_clipppo_params

    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(study_name="s", storage=storage)
    trial = study.ask()
    sampled = sample_clipppo_params(trial, 1, 2, {})
    study.tell(trial, 1.0)
    manager = _manager(
        tmp_path, ENTRY, storage=storage, study_name="s", trial_id=0, hyperparams={"gae_lambda": 0.5}, n_timesteps=1
    )
    hyperparams, _ = manager.read_hyperparameters()
    assert hyperparams == {**ENTRY, **sampled, "n_envs": 2, "gae_lambda": 0.5}


@pytest.mark.parametrize("normalize", [True, "dict(gamma=0.5)", False])
def test_rewards_of_a_trial_are_normalised_with_its_gamma(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalize: Any
) -> None:
    import optuna

    seen = []

    def learn(self: Any, *args: Any, **kwargs: Any) -> None:
        normalizer = self.get_vec_normalize_env()
        seen.append((self.gamma, getattr(normalizer, "gamma", None)))

    monkeypatch.setattr(ClipPPO, "learn", learn)
    entry = {**ENTRY, "n_envs": 2, "gamma": 0.9, "normalize": normalize}
    manager = _manager(tmp_path, entry, optimize_hyperparameters=True)
    assert manager.setup_experiment() is None
    study = optuna.create_study()
    trials = [study.ask() for _ in range(2)]
    for trial in trials:
        manager.objective(trial)
    gammas = [trial.user_attrs["gamma"] for trial in trials]
    assert seen == [(gamma, gamma if normalize else None) for gamma in gammas]
    assert manager.normalize_kwargs["gamma"] == 0.9  # trials may run in several threads


def test_the_packaged_settings_are_the_default_for_clipppo_only(tmp_path: Path) -> None:
    ours = ClipPPOExperimentManager(Namespace(), "clipppo", "CartPole-v1", str(tmp_path))
    assert ours.config == str(hyperparams_path())
    other = ClipPPOExperimentManager(Namespace(), "ppo", "CartPole-v1", str(tmp_path))
    assert other.config == ExperimentManager(Namespace(), "ppo", "CartPole-v1", str(tmp_path)).config


def test_other_algorithms_are_read_as_the_zoo_reads_them(tmp_path: Path) -> None:
    entry = {**ENTRY, "clip_range": "lin_0.2"}
    model = _model(_manager(tmp_path, entry, algo="ppo"))
    assert not isinstance(model, ClipPPO)
    assert isinstance(model.clip_range.value_schedule, SimpleLinearSchedule)
    with pytest.raises(ValueError, match="Invalid value for clip_range_vf: None"):
        _manager(tmp_path, {**entry, "clip_range_vf": None}, algo="ppo").setup_experiment()
    hyperparams, _ = _manager(tmp_path, {**entry, "zzz": 1.0}, algo="ppo").read_hyperparameters()
    assert hyperparams["zzz"] == 1.0


@pytest.mark.parametrize("on_command_line", [False, True])
@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("clip_range", "const_0.2", "must be a number or `lin_0.2` with --algo ppo, got 'const_0.2' in"),
        ("learning_rate", "cos_1e-3", "must be a number or `lin_1e-3` with --algo ppo, got 'cos_1e-3' in"),
        ("ent_coef", "lin_0.01", "must not be a schedule with --algo ppo, got 'lin_0.01' in"),
    ],
)
def test_schedules_that_other_algorithms_do_not_have_are_refused(
    tmp_path: Path, key: str, value: str, rule: str, on_command_line: bool
) -> None:
    given = {key: value}
    entry, where = ({**ENTRY, **given}, ".*settings.yml") if not on_command_line else (ENTRY, "`-params`")
    manager = _manager(tmp_path, entry, algo="ppo", hyperparams=given if on_command_line else None)
    with pytest.raises(ValueError, match=rf"`{key}` {rule} {where}.*\. [A-Z]"):
        manager.setup_experiment()


def test_text_of_other_algorithms_is_no_schedule(tmp_path: Path) -> None:
    entry = {"policy": "MlpPolicy", "n_timesteps": 64, "learning_rate": "lin_7.3e-4", "ent_coef": "auto_0.1"}
    model = _model(_manager(tmp_path, entry, algo="sac", env_id="Pendulum-v1"))
    assert (model.ent_coef, model.lr_schedule(0.5)) == ("auto_0.1", 3.65e-4)


def test_a_users_experiment_manager_remains_the_base() -> None:
    class Own(ExperimentManager):
        pass

    extended = experiment_manager(Own)
    assert issubclass(extended, Own)
    assert issubclass(extended, ClipPPOExperimentManager)
    assert experiment_manager(extended) is extended
    assert experiment_manager(ExperimentManager) is ClipPPOExperimentManager
    assert experiment_manager(ClipPPOExperimentManager) is ClipPPOExperimentManager


def test_legal_keys_are_those_of_the_constructor() -> None:
    assert {"clip_range", "kl_coef", "engine", "policy", "policy_kwargs"} <= constructor_keys()
    assert constructor_keys().isdisjoint({"self", "_init_setup_model", *COMMAND_LINE_KEYS})
    assert constructor_keys().isdisjoint(ZOO_KEYS)


def test_callbacks_of_all_options_read_no_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With others, the native engine does not write its steps into the rollout itself."""
    monkeypatch.setattr(ClipPPOExperimentManager, "checkpoint_freq", 64)
    of_settings = [
        "rl_zoo3.callbacks.RawStatisticsCallback",
        {"sb3_clipvf.SaveBestTrainingReward": {"save_path": str(tmp_path / "best")}},
    ]
    options: dict[str, Any] = {"show_progress": True, "save_freq": 64, "eval_freq": 64, "n_eval_episodes": 1}
    options["tensorboard_log"] = str(tmp_path / "tb")
    manager = _manager(tmp_path, {**ENTRY, "callback": of_settings, "normalize": True}, **options)
    result = manager.setup_experiment()
    assert result is not None
    used = []
    begin = ClipPPO._begin_rollout

    def spy(self: Any, env: Any, callback: Any, *args: Any) -> Any:
        used.append(callback)
        return begin(self, env, callback, *args)

    monkeypatch.setattr(ClipPPO, "_begin_rollout", spy)
    manager.learn(result[0])
    assert {type(callback).__name__ for callback in used[0].callbacks} == {
        "WholeProgressBar", "TrainingCheckpoint", "CheckpointCallback", "IsolatedEvalCallback", "RawStatisticsCallback",
        "SaveBestTrainingReward",
    }  # fmt: skip
    assert not may_read_actions(used[0])


@pytest.mark.parametrize(("algo", "name"), [("clipppo", "runs"), ("ppo", "runs"), ("clipppo", "runs[1]")])
def test_trainings_that_start_together_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str, name: str
) -> None:
    """The Zoo's constructor chooses the number. It finds no run below a folder with brackets."""
    (tmp_path / name).mkdir()
    first, second, failing = (_manager(tmp_path / name, ENTRY, algo=algo) for _ in range(3))
    for manager in (first, second):
        assert Path(_saved(manager), "args.yml").is_file()

    def fail(*args: Any) -> None:
        raise ValueError("the fault")

    monkeypatch.setattr(ExperimentManager, "create_callbacks", fail)
    with pytest.raises(ValueError, match="the fault"):
        failing.setup_experiment()
    folders = {path.name for path in (tmp_path / name / "logs" / algo).iterdir()}
    left = {"CartPole-v1_3"} if algo == "ppo" else set()  # as the Zoo leaves it
    assert folders == {"CartPole-v1_1", "CartPole-v1_2", *left}


# ---------------------------------------------------------------- errors that end a training


def _fails_to_end(self: Any) -> None:
    raise BrokenPipeError("its process has ended, too")


@pytest.mark.parametrize("first", ["checkpoint", "progress bar", "environment"])
def test_an_error_before_callbacks_begin_is_not_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setattr("stable_baselines3.common.utils.SummaryWriter", None)  # as without TensorBoard
    monkeypatch.setattr(ClipPPOExperimentManager, "checkpoint_freq", 64 if first == "checkpoint" else -1)
    manager = _manager(tmp_path, ENTRY, tensorboard_log=str(tmp_path / "tb"), show_progress=first == "progress bar")
    model = _model(manager)
    if first == "environment":
        monkeypatch.setattr(FastDummyVecEnv, "close", _fails_to_end)
    with pytest.raises(ImportError, match="tensorboard is not installed"):
        manager.learn(model)


def test_the_cause_of_an_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(self: Any, *args: Any, **kwargs: Any) -> bool:
        raise ValueError("the fault") from OSError("its cause")

    monkeypatch.setattr(ClipPPO, "collect_rollouts", collect)
    monkeypatch.setattr(ProgressBarCallback, "_on_training_end", _fails_to_end)
    manager = _manager(tmp_path, ENTRY, show_progress=True)
    with pytest.raises(ValueError, match="the fault") as raised:
        manager.learn(_model(manager))
    assert isinstance(raised.value.__cause__, OSError)


def test_an_error_of_the_end_alone_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = _manager(tmp_path, ENTRY, n_timesteps=8)  # no episode ends
    model = _model(manager)
    monkeypatch.setattr(FastDummyVecEnv, "close", _fails_to_end)
    with pytest.raises(BrokenPipeError):
        manager.learn(model)


@pytest.mark.parametrize("name", ["not_there", ".", 5])
def test_packages_that_cannot_be_imported_are_refused(name: object) -> None:
    with pytest.raises(ImportError, match=rf"`args.yml` must name modules that can be imported, got {name!r}"):
        import_packages([name], "args.yml")
