"""The benchmark of minibatches: each engine trains and acts, and the table has a line for each."""

import dataclasses

import pytest

from tests.bench import minibatch


def test_the_table_has_a_line_for_each_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minibatch, "SECONDS", 0.0)
    small = {
        name: dataclasses.replace(work, n_envs=2, n_steps=4, batch_size=4) for name, work in minibatch.WORKS.items()
    }
    monkeypatch.setattr(minibatch, "WORKS", small)
    assert minibatch.main(["--device", "cpu"]) == 0
    lines = [
        line.split(" | ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("| mlp", "| wide", "| cnn", "| la"))
    ]
    engines = {
        "| mlp-64": "native",
        "| mlp-256": "native",
        "| wide-256": "native",
        "| cnn-256": "fused",
        "| large-24576": "native",
    }
    assert [line[:2] for line in lines] == [
        [name, engine] for name, auto in engines.items() for engine in ("sb3", "autograd", auto)
    ]
    assert all(float(number) > 0 for line in lines for number in (line[2], line[3].rstrip(" |")))


def test_a_gpu_adds_graphs_and_the_same_operations_without_them() -> None:
    assert minibatch.engines_on("cuda:0") == ["sb3", "autograd", "static", "cuda_graph", "cuda_graph_bf16"]


def test_a_profile_lists_operations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(minibatch, "SECONDS", 0.0)
    small = {"mlp-256": dataclasses.replace(minibatch.WORKS["mlp-256"], n_envs=2, n_steps=4, batch_size=4)}
    monkeypatch.setattr(minibatch, "WORKS", small)
    assert minibatch.main(["--engines", "autograd", "--profile"]) == 0
    assert "aten::addmm" in capsys.readouterr().out
