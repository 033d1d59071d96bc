"""The log that a training keeps in its run's folder."""

import json
from pathlib import Path

import pytest
from stable_baselines3.common import utils

from sb3_clipvf.zoo import main
from sb3_clipvf.zoo.comparison.series import read_logs
from sb3_clipvf.zoo.training_log import LOG_FILE, logged_to

TRAIN = "train --env CartPole-v1 --eval-freq -1 --device cpu --verbose 0 --seed 1 -f logs"


@pytest.mark.parametrize(("algo", "key"), [("clipppo", "train/kl"), ("a2c", "train/value_loss")])
def test_a_training_keeps_its_log(algo: str, key: str, in_empty_folder: Path) -> None:
    params = "-params n_envs:2 n_steps:16" + (" batch_size:16 n_epochs:1" if algo == "clipppo" else "")
    assert main(f"{TRAIN} --algo {algo} -n 96 --log-interval 1 {params}".split()) == 0
    rows = [json.loads(line) for line in Path(f"logs/{algo}/CartPole-v1_1/{LOG_FILE}").read_text().splitlines()]
    assert [row["time/total_timesteps"] for row in rows] == [32, 64, 96]
    # SB3 writes the values of an update with the next rollout.
    assert [key in row for row in rows] == [False, True, True]


def test_a_resumed_training_adds_to_its_log(in_empty_folder: Path) -> None:
    params = "-params n_envs:2 n_steps:16 batch_size:16 n_epochs:1"
    assert main(f"{TRAIN} -n 64 --checkpoint-freq 32 {params}".split()) == 0
    run = Path("logs/clipppo/CartPole-v1_1")
    before = (run / LOG_FILE).read_text()
    assert main(f"train --resume {run} -n 128 --device cpu --verbose 0".split()) == 0
    after = (run / LOG_FILE).read_text()
    assert after.startswith(before) and len(after) > len(before)
    assert read_logs(run)["time/fps"].steps.tolist() == [32, 64, 96, 128]


@pytest.mark.parametrize(("options", "n_rows"), [("", 4), ("-tb tb", 2)])
def test_a_resumed_training_repeats_no_rows(options: str, n_rows: int, in_empty_folder: Path) -> None:
    if options:
        pytest.importorskip("tensorboard")
    params = "-params n_envs:2 n_steps:16 batch_size:16 n_epochs:1"
    assert main(f"{TRAIN} -n 128 --checkpoint-freq 32 --log-interval 1 {options} {params}".split()) == 0
    run = Path("logs/clipppo/CartPole-v1_1")

    def rows() -> list[tuple[int, float | None]]:
        found = map(json.loads, (run / LOG_FILE).read_text().splitlines())
        return [(row["time/total_timesteps"], row.get("train/loss")) for row in found]

    before = rows()
    assert [step for step, _ in before] == [32, 64, 96, 128]
    lines = (run / LOG_FILE).read_text().splitlines(keepends=True)
    (run / LOG_FILE).write_text("".join([*lines[:n_rows], lines[0][:30]]))  # the last row is cut by a kill
    assert main(f"train --resume {run}/checkpoints/checkpoint_64.zip --device cpu --verbose 0".split()) == 0
    assert rows() == before


def test_loggers_are_as_before_after_the_training(tmp_path: Path) -> None:
    configure_logger = utils.configure_logger
    with pytest.raises(RuntimeError, match="fault"), logged_to(tmp_path):
        logger = utils.configure_logger(0)
        logger.record("key", 1)
        logger.dump(10)
        raise RuntimeError("fault")
    assert logger.output_formats == []
    logger.record("key", 2)
    logger.dump(20)
    assert (tmp_path / LOG_FILE).read_text() == '{"key": 1}\n'
    assert utils.configure_logger is configure_logger
