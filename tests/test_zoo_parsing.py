"""Options: found and completed; errors in one line, whole numbers as 1e6, pairs of key and value."""

import re
from argparse import ArgumentParser, Namespace

import pytest
from rl_zoo3.utils import StoreDict

from sb3_clipvf.zoo.checks import checked_options
from sb3_clipvf.zoo.parsing import Default, checked_parsing, option_value, quote_schedules, strict, with_defaults

ALGO = Default(None, "--algo", "clipppo")
FOLDER = Default("-f", "--folder", "logs")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-f", "here"], "here"),
        (["-fhere"], "here"),
        (["-f=here"], "here"),
        (["--folder", "here"], "here"),
        (["--folder=here"], "here"),
        (["--fold", "here"], "here"),
        (["--env", "X", "--fol=here"], "here"),
        (["--folder"], ""),
        (["--env", "X"], None),
        (["--folders", "here"], None),
        (["--", "here"], None),
    ],
)
def test_an_option_is_found_in_every_form_that_argparse_takes(arguments: list[str], expected: str | None) -> None:
    assert option_value(arguments, "-f", "--folder") == expected


def test_defaults_are_put_in_only_where_the_user_gave_none() -> None:
    assert with_defaults(["--env", "X"], (ALGO, FOLDER)) == ["--algo", "clipppo", "--folder", "logs", "--env", "X"]
    assert with_defaults(["--algo=ppo"], (ALGO, FOLDER)) == ["--folder", "logs", "--algo=ppo"]
    assert with_defaults(["-f", "runs", "--alg", "ppo"], (ALGO, FOLDER)) == ["-f", "runs", "--alg", "ppo"]


def test_an_option_without_a_value_can_be_put_in() -> None:
    no_render = Default(None, "--no-render", None)
    assert with_defaults(["-n", "5"], (no_render,)) == ["--no-render", "-n", "5"]
    assert with_defaults(["--no-r"], (no_render,)) == ["--no-r"]


def test_bare_schedules_are_quoted_for_the_zoo_and_nothing_else_is() -> None:
    given = ["-params", "clip_range:lin_0.2", "learning_rate:exp_3e-4", "ent_coef:0.1", "policy:'MlpPolicy'", "lin_0.2"]
    quoted = quote_schedules(given)
    assert quoted == [
        "-params",
        "clip_range:'lin_0.2'",
        "learning_rate:'exp_3e-4'",
        "ent_coef:0.1",
        "policy:'MlpPolicy'",
        "lin_0.2",
    ]
    assert quote_schedules(quoted) == quoted


def _parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("-n", "--n-timesteps", type=int, default=-1)
    parser.add_argument("--sampler", choices=["tpe", "random"])
    parser.add_argument("-params", "--hyperparams", nargs="+", action=StoreDict)
    return parser


@pytest.mark.parametrize(("text", "number"), [("64", 64), ("1e4", 10_000), ("-1", -1), ("2.0", 2), ("1.5e3", 1500)])
def test_whole_numbers_may_be_floats(text: str, number: int) -> None:
    assert strict(_parser(), "train").parse_args(["-n", text]).n_timesteps == number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "1.5"], "`-n/--n-timesteps` must be a whole number, got '1.5'"),
        (["-n", "1e400"], "`-n/--n-timesteps` must be a whole number, got '1e400'"),
        (["-n", "nan"], "`-n/--n-timesteps` must be a whole number, got 'nan'"),
        (["-n", "many"], "`-n/--n-timesteps` must be a whole number, got 'many'"),
        (["-n"], "`-n/--n-timesteps` must have a value, got none"),
        (["--sampler", "best"], "`--sampler` must be one of 'tpe', 'random', got 'best'"),
        (["--samplers", "tpe"], "unrecognized arguments: --samplers tpe (did you mean `--sampler`?)"),
        (["--zzz"], "unrecognized arguments: --zzz"),
    ],
)
def test_errors_of_argparse_are_one_line(arguments: list[str], message: str) -> None:
    expected = re.escape(f"{message}. `sb3-clipvf train --help` lists the options.")
    with pytest.raises(ValueError, match=f"^{expected}$"):
        strict(_parser(), "sb3-clipvf train").parse_args(arguments)


def test_only_the_next_parser_is_changed(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Namespace] = []
    with checked_parsing("train", seen.append):
        options = _parser().parse_args(["-n", "1e1"])
        with pytest.raises(SystemExit):
            _parser().parse_args(["-n", "1e1"])
    assert (seen, options.n_timesteps) == ([options], 10)
    assert "invalid int value" in capsys.readouterr().err


def _pairs(*texts: str) -> object:
    with checked_options("sb3-clipvf train", "train"):
        return _parser().parse_args([part for text in texts for part in ("-params", *text.split(" "))]).hyperparams


def test_pairs_are_those_of_the_zoo() -> None:
    text = "n_steps:64 policy:'a:b' policy_kwargs:dict(activation_fn=nn.ReLU)"
    assert _pairs(text) == _parser().parse_args(["-params", *text.split(" ")]).hyperparams


def test_pairs_of_a_repeated_option_add_up() -> None:
    assert _pairs("n_steps:64 gamma:0.9", "gamma:0.8") == {"n_steps": 64, "gamma": 0.8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_steps=64", r"a colon, got 'n_steps=64'. Write `n_steps:64`."),
        ("clip_range", r"a colon, got 'clip_range'. Write `key:value`."),
        ("clip_range:", r"a colon, got 'clip_range:'. Write `key:value`."),
        (":3", r"a colon, got ':3'"),
        ("policy:MlpPolicy", r"NameError.* Text needs quotes of its own, .*: \"policy:'MlpPolicy'\"."),
        ("clip_range_vf:null", r"NameError.* Write `clip_range_vf:None`."),
        ("use_sde:true", r"NameError.* Write `use_sde:True`."),
        ("gamma:1/0", "ZeroDivisionError"),
        ("net:dict(a=1", "SyntaxError"),
    ],
)
def test_what_is_no_pair_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"`-params` must .*{message}"):
        _pairs(text)
