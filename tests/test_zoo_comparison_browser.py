"""The page of a report in headless Chromium: its figures, its switches, and a console without errors."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sb3_clipvf.zoo.comparison import sections
from sb3_clipvf.zoo.comparison.curves import mean_and_std, panels
from sb3_clipvf.zoo.comparison.groups import Group, group_records
from sb3_clipvf.zoo.comparison.page import page
from sb3_clipvf.zoo.comparison.records import find_records
from tests import chromium
from tests.chromium import Tab
from tests.written_runs import write_evaluations, write_run

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium")

# Uses the switches of the page, and returns what its figures then hold.
USE = """
(async () => {
  const plots = (part) => [...document.querySelectorAll(`#${part} .plot`)].map((plot) => ({
    key: plot.parentElement.dataset.key,
    title: plot.parentElement.querySelector("figcaption").textContent,
    x: plot.layout.xaxis.title.text,
    range: plot._fullLayout.yaxis.range,
    traces: plot.data.map((trace) => ({ role: trace.role, name: trace.name, x: [...trace.x], y: [...trace.y] })),
  }));
  // A user's clicks come one after the other, too.
  const click = async (what) => {
    document.querySelector(what).click();
    await new Promise((done) => setTimeout(done));
  };
  const choose = (name, value) => click(`input[name=${name}][value="${value}"]`);
  const colors = () => [
    getComputedStyle(document.body).backgroundColor, document.querySelector(".plot").layout.font.color,
  ];
  const seen = { first: plots("returns"), metrics: plots("metrics") };
  await choose("curve", "return/evaluation");
  seen.evaluations = plots("returns");
  await choose("curve", "return");
  await choose("axis", "seconds");
  seen.seconds = plots("returns");
  await choose("axis", "steps");
  await choose("spread", "range");
  seen.range = plots("returns");
  await choose("spread", "each");
  seen.each = plots("returns");
  await choose("spread", "std");
  await click("#legend button");
  seen.hidden = plots("returns");
  seen.pressed = [...document.querySelectorAll("#legend button")].map((chip) => chip.getAttribute("aria-pressed"));
  await click("#legend button");
  seen.again = plots("returns");
  seen.colors = [colors()];
  await click("#theme");
  seen.colors.push(colors());
  const select = document.querySelector("#env select");
  select.value = 1;
  select.dispatchEvent(new Event("change"));
  seen.others = plots("metrics");
  const same = document.querySelector(".settings .same");
  seen.settings = [same.checkVisibility()];
  await click("#all");
  seen.settings.push(same.checkVisibility());
  return JSON.stringify(seen);
})()
"""


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    """Two settings with two seeds in two environments, with logs, and evaluations of one run."""
    folder = tmp_path_factory.mktemp("logs")
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        for number, (seed, clip_range) in enumerate([(1, 0.1), (2, 0.1), (1, 0.2), (2, 0.2)], 1):
            sign = -1 if env_id == "Pendulum-v1" else 1
            returns = tuple(sign * np.random.default_rng(number).normal(10 * number, 1, 20).cumsum())
            path = folder / f"clipppo/{env_id}_{number}"
            run = write_run(path, env_id=env_id, seed=seed, returns=returns, settings={"clip_range": clip_range})
            keys = ["train/kl", "train/value_loss"] + (["train/std"] if env_id == "Pendulum-v1" else [])
            rows = [{"time/total_timesteps": step, **dict.fromkeys(keys, step / 100)} for step in range(100, 2001, 100)]
            (run / "progress.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_evaluations(folder / "clipppo/CartPole-v1_1/evaluations.npz", [100, 2000], [[1.0, 3.0], [5.0, 5.0]])
    return group_records(find_records([folder])[0])


@pytest.fixture(scope="module")
def tab(groups: list[Group], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A browser, and the page as ``report.html`` in its folder."""
    pytest.importorskip("plotly")
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(page(groups, ["a problem"], "sb3-clipvf report logs"))
    with chromium.tab(folder / "profile") as opened:
        opened.page = folder / "report.html"
        yield opened


@pytest.fixture(scope="module")
def seen(tab: Tab) -> dict[str, Any]:
    """What the figures held while the switches were used."""
    tab.open(tab.page, 1280)
    found: dict[str, Any] = json.loads(tab.evaluate(USE))
    return found


@pytest.mark.usefixtures("seen")
def test_the_console_has_no_error(tab: Tab) -> None:
    assert tab.console == []


def test_figures_have_mean_and_std_of_the_runs(seen: dict[str, Any], groups: list[Group]) -> None:
    shown = seen["first"]
    assert [one["title"] for one in shown] == ["CartPole-v1mean of the last 100", "Pendulum-v1mean of the last 100"]
    for one, env_id in zip(shown, ("CartPole-v1", "Pendulum-v1"), strict=True):
        assert one["x"] == "steps"
        (panel, *_) = panels([group for group in groups if group.env_id == env_id])
        assert panel.key == "return"
        for name, (band, line) in zip(panel.lines["steps"], np.reshape(one["traces"], (2, 2)), strict=True):
            mean, std, _ = mean_and_std(panel.lines["steps"][name])
            assert (band["role"], line["role"], line["name"]) == ("band", "mean", name)
            # The page holds five digits.
            np.testing.assert_allclose(np.array(line["y"], dtype=float), mean, rtol=1e-4)
            known = np.isfinite(mean)
            upper, lower = np.split(np.array(band["y"], dtype=float), 2)
            np.testing.assert_allclose(upper, (mean + std)[known], rtol=1e-3)
            np.testing.assert_allclose(lower[::-1], (mean - std)[known], rtol=1e-3)


def test_axes_hold_all_that_is_drawn(seen: dict[str, Any]) -> None:
    for one in (*seen["first"], *seen["each"], *seen["evaluations"]):
        values = [value for trace in one["traces"] for value in trace["y"] if value is not None]
        assert one["range"][0] <= min(values) and max(values) <= one["range"][1]


def test_switches_change_the_figures(seen: dict[str, Any]) -> None:
    (evaluations,) = seen["evaluations"]
    # One run has no band.
    assert {trace["role"] for trace in evaluations["traces"]} == {"mean"}
    assert evaluations["traces"][0]["y"][-1] == 5.0
    assert seen["seconds"][0]["x"] == "seconds"
    assert max(seen["seconds"][0]["traces"][1]["x"]) == 20.0
    first, ranged = seen["first"][0]["traces"], seen["range"][0]["traces"]
    assert ranged[1]["y"] == first[1]["y"] and ranged[0]["y"] != first[0]["y"]
    assert [trace["name"] for trace in seen["each"][0]["traces"]] == [
        f"clip_range {value}, run {run}" for value in (0.1, 0.2) for run in (1, 2)
    ]
    each = [np.array(trace["y"][-50:], dtype=float) for trace in seen["each"][0]["traces"][:2]]
    band = np.array(ranged[0]["y"], dtype=float)
    assert band.max() == max(map(np.max, each))
    assert seen["pressed"] == ["false", "true"]
    assert [trace["name"] for trace in seen["hidden"][0]["traces"] if trace["role"] == "mean"] == ["clip_range 0.2"]
    assert seen["again"] == seen["first"]


def test_the_log_is_that_of_the_chosen_environment(seen: dict[str, Any]) -> None:
    assert [one["key"] for one in seen["metrics"]] == ["train/kl", "train/value_loss"]
    assert [one["key"] for one in seen["others"]] == ["train/kl", "train/value_loss", "train/std"]


def test_the_theme_and_the_settings_can_be_switched(seen: dict[str, Any]) -> None:
    (light, dark), settings = seen["colors"], seen["settings"]
    assert light[0] == "rgb(255, 255, 255)" and light[0] != dark[0] and light[1] != dark[1]
    assert settings == [False, True]


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_its_window_in_both_themes(tab: Tab, width: int) -> None:
    for scheme, color in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 24, 27)")):
        tab.open(tab.page, width, scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == color
        # No figure lies over another.
        plots = "[...document.querySelectorAll('.js-plotly-plot .main-svg')]"
        boxes = tab.evaluate(f"{plots}.map((one) => one.getBoundingClientRect().right)")
        assert len(boxes) > 4 and max(boxes) <= width
    assert tab.console == []


def test_texts_have_the_contrast_of_the_accessibility_guidelines(tab: Tab) -> None:
    """Text needs 4.5 : 1 and lines need 3 : 1 (WCAG 2.2, 1.4.3 and 1.4.11)."""
    for scheme in ("light", "dark"):
        tab.open(tab.page, 1280, scheme=scheme)
        names = ["paper", "panel", "mark", "ink", "muted", *(f"c{place}" for place in range(sections.N_COLORS))]
        style = "getComputedStyle(document.documentElement).getPropertyValue"
        colors = {name: luminance(tab.evaluate(f"{style}('--{name}').trim()")) for name in names}
        for back in ("paper", "panel", "mark"):
            assert contrast(colors["ink"], colors[back]) >= 4.5, (scheme, back)
        assert contrast(colors["muted"], colors["paper"]) >= 4.5, scheme
        for place in range(sections.N_COLORS):
            assert contrast(colors[f"c{place}"], colors["paper"]) >= 3, (scheme, place)


def luminance(color: str) -> float:
    """Relative luminance of a colour such as ``#1f6fb4``, as the guidelines define it."""
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(first: float, second: float) -> float:
    return (max(first, second) + 0.05) / (min(first, second) + 0.05)
