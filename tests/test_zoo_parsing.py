"""Parsers of the sub-commands: errors in one line, whole numbers as 1e6."""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import pytest

from sb3_clipvf.zoo.parsing import add_trust_option, next_parser, strict


def _parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("-n", "--n-timesteps", type=int, default=-1)
    parser.add_argument("--sampler", choices=["tpe", "random"])
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


def test_an_option_that_must_be_given_is_named() -> None:
    parser = _parser()
    parser.add_argument("-e", "--env", required=True)
    with pytest.raises(ValueError, match=r"^`-e/--env` must be given, got none\. `train --help`"):
        strict(parser, "train").parse_args([])


def test_only_the_next_parser_is_changed(capsys: pytest.CaptureFixture[str]) -> None:
    def prepare(parser: ArgumentParser) -> None:
        parser.set_defaults(sampler="random")

    def finish(parse_args: Callable[..., Namespace], options: Namespace) -> Namespace:
        assert options.sampler == "random"
        return parse_args(["-n", "2e1", "--sampler", "tpe"])

    with next_parser("train", prepare, finish):
        options = _parser().parse_args(["-n", "1e1"])
        with pytest.raises(SystemExit):
            _parser().parse_args(["-n", "1e1"])
    assert (options.n_timesteps, options.sampler) == (20, "tpe")
    assert "invalid int value" in capsys.readouterr().err


def test_the_trust_option_must_be_written_in_full() -> None:
    with next_parser("train", add_trust_option), pytest.raises(ValueError, match="`--trust-pickle` must be written in"):
        _parser().parse_args(["--trust"])
    with next_parser("train", add_trust_option):
        assert not hasattr(_parser().parse_args([]), "trust_pickle")
