"""The page of a report: its numbers, its escaping, its other formats, and the command that writes them."""

import base64
import csv
import errno
import gzip
import io
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sb3_clipvf import zoo
from sb3_clipvf.zoo.comparison import sections
from sb3_clipvf.zoo.comparison.groups import Group, group_records
from sb3_clipvf.zoo.comparison.outputs import write_outputs
from sb3_clipvf.zoo.comparison.page import page
from sb3_clipvf.zoo.comparison.records import find_records
from sb3_clipvf.zoo.comparison.summary import csv_table, number_text
from sb3_clipvf.zoo.report import main
from tests.written_runs import write_evaluations, write_monitor, write_run

PLOTLY = "/* Plotly </script> */"


@pytest.fixture(autouse=True)
def _short_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace Plotly's 4 MB, which tests/test_zoo_comparison_browser.py runs."""
    offline = ModuleType("plotly.offline")
    offline.get_plotlyjs = lambda: PLOTLY  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plotly", ModuleType("plotly"))
    monkeypatch.setitem(sys.modules, "plotly.offline", offline)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Two settings in two environments, with two seeds."""
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        for number, (seed, clip_range) in enumerate([(1, 0.1), (2, 0.1), (1, "lin_0.2"), (2, "lin_0.2")], 1):
            folder = write_run(
                tmp_path / f"logs/clipppo/{env_id}_{number}",
                env_id=env_id,
                seed=seed,
                returns=(1.5 * number, 3.25 * number, 7.125 * number),
                settings={"clip_range": clip_range},
            )
            rows = [{"time/total_timesteps": step, "train/entropy_loss": -step / 100} for step in (100, 200)]
            (folder / "progress.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_evaluations(tmp_path / "logs/clipppo/CartPole-v1_1/evaluations.npz", [100, 300], [[1.0, 2.0], [3.0, 4.0]])
    return tmp_path / "logs"


class Tables(HTMLParser):
    """The cells of a page's tables, by the class of the table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._is_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._rows = self.tables.setdefault(str(dict(attrs)["class"]), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._is_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._is_cell = False

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self._rows[-1][-1] += data


def unpacked(html: str, name: str) -> str:
    found = re.search(rf'<script type="text/plain" id="{name}">([^<]*)</script>', html)
    assert found is not None
    return gzip.decompress(base64.b64decode(found[1])).decode()


def groups_of(folder: Path) -> list[Group]:
    return group_records(find_records([folder])[0])


def test_the_numbers_of_the_page_are_those_of_the_csv(logs: Path) -> None:
    groups = groups_of(logs)
    html = page(groups, [], "command")
    tables = Tables(html).tables
    rows = list(csv.DictReader(io.StringIO(csv_table(groups))))
    assert len(rows) == 8
    keys = {"Seed": "seed", "Last 100 episodes": "last_return", "Whole training": "mean_return"}
    keys |= {
        "Last evaluation": "last_evaluation",
        "Steps": "steps",
        "Seconds": "seconds",
        "Steps/s": "steps_per_second",
    }
    head, *shown = tables["runs"]
    for cells, row in zip(shown, rows, strict=True):
        cell = dict(zip(head, cells, strict=True))
        assert (cell["Folder"], cell["Environment"], cell["Setting"]) == (row["folder"], row["env"], row["setting"])
        for title, key in keys.items():
            assert cell[title] == (number_text(float(row[key])) if row[key] else "–"), title
    # Means and standard deviations of the two seeds.
    for cells in (cells for cells in tables["summary"][1:] if len(cells) > 4):
        env_id = "CartPole-v1" if cells is tables["summary"][2] or cells is tables["summary"][3] else "Pendulum-v1"
        values = [float(row["last_return"]) for row in rows if (row["env"], row["setting"]) == (env_id, cells[0])]
        mean, std = np.mean(values), np.std(values, ddof=1)
        assert cells[1] == "2" and cells[3] == f"{number_text(mean, std)} ± {number_text(std, std)}"
    data = json.loads(unpacked(html, "data"))
    assert data["tables"]["csv"] == csv_table(groups)
    for env in data["envs"]:
        panel = next(panel for panel in env["panels"] if panel["key"] == "return")
        last = {(row["setting"], row["seed"]): float(row["last_return"]) for row in rows if row["env"] == env["id"]}
        for setting, runs in panel["axes"]["steps"]["runs"].items():
            # Five digits.
            assert [run[-1] for run in runs] == [pytest.approx(last[setting, seed], rel=1e-4) for seed in ("1", "2")]


def test_entropy_is_the_negative_of_its_loss(logs: Path) -> None:
    data = json.loads(unpacked(page(groups_of(logs), [], ""), "data"))
    panel = next(panel for panel in data["envs"][0]["panels"] if panel["key"] == "train/entropy_loss")
    assert panel["title"] == "Entropy"
    assert panel["axes"]["steps"]["runs"]["clip_range 0.1"][0][-1] == 2.0


def test_the_page_needs_no_network_and_escapes_names(logs: Path) -> None:
    (logs / "clipppo").rename(logs / "<b>a&b")
    write_run(logs / "other/CartPole-v1_1")
    html = page(groups_of(logs), ["<i>problem</i>"], "report '</script>'")
    assert not re.search(r"(src|href)=.?https?:|@import|url\(", html)
    assert "&lt;i&gt;problem&lt;/i&gt;" in html and "<i>problem" not in html
    assert "report &#x27;&lt;/script&gt;&#x27;" in html
    assert "<b>a" not in html
    assert unpacked(html, "plotly") == PLOTLY


def test_settings_that_differ_are_marked(logs: Path) -> None:
    rows = Tables(page(groups_of(logs), [], "")).tables["settings"]
    assert rows[1] == ["≠ clip_range", "0.1", "lin_0.2"]
    assert rows[2] == ["policy", "MlpPolicy", "MlpPolicy"]


def test_none_and_a_missing_setting_are_shown_apart(tmp_path: Path) -> None:
    for number, settings in enumerate(({}, {"clip_range": None}), 1):
        write_run(tmp_path / f"clipppo/CartPole-v1_{number}", settings=settings)
    assert Tables(page(groups_of(tmp_path), [], "")).tables["settings"][1] == ["≠ clip_range", "–", "None"]


def test_settings_without_a_difference_are_all_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "CartPole-v1_1")
    assert Tables(page(groups_of(tmp_path), [], "")).tables["settings all"][1] == ["policy", "MlpPolicy"]


def test_unknown_settings_are_not_taken_for_others(tmp_path: Path) -> None:
    write_run(tmp_path / "a/CartPole-v1_1")
    write_monitor(tmp_path / "b" / "monitor.csv", [(25.0 + 1e-6, 10, 1.0)], env_id="CartPole-v1")
    html = page(groups_of(tmp_path), [], "")
    assert Tables(html).tables["settings all"] == [["CartPole-v1", "a"], ["policy", "MlpPolicy"]]
    # Their returns are equal but for the precision of a file.
    assert "<circle" not in html


@pytest.mark.parametrize(
    ("with_steps", "with_returns", "head", "n_drawn"),
    [
        (True, True, "Last 100 episodes, each run", 4),
        # An evaluation that some groups lack is no substitute for the returns that others lack.
        (False, True, "Last evaluation, each run", 3),
        (False, False, "", 0),
    ],
)
def test_dots_of_an_environment_are_of_one_quantity(
    with_steps: bool, with_returns: bool, head: str, n_drawn: int, tmp_path: Path
) -> None:
    for number in range(4):
        folder = tmp_path / f"width_{number}"
        folder.mkdir()
        if with_steps:
            write_monitor(folder / "monitor.csv", [(10.0 + number, 10, 1.0)], env_id="E-v0")
        if with_returns and number < 3:
            write_evaluations(folder / "evaluations.npz", [10], [[500.0 + number]])
        row = {"time/total_timesteps": 100 * (number + 1), "train/loss": 1.0}
        (folder / "progress.json").write_text(json.dumps(row) + "\n")
    html = page(groups_of(tmp_path), [], "")
    assert Tables(html).tables["summary"][0][2] == head
    assert html.count("<circle") == n_drawn


def test_a_return_that_is_not_finite_is_not_drawn(tmp_path: Path) -> None:
    for seed, value in enumerate((1.0, 2.0, np.nan, np.inf), 1):
        write_run(tmp_path / f"CartPole-v1_{seed}", seed=seed, returns=(value,))
    html = page(groups_of(tmp_path), [], "")
    assert html.count("<circle") == 2 and not re.search(r'(cx="|d="M)(nan|inf)', html)


def test_videos_are_embedded_up_to_a_size(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, content in ((1, b"12345"), (3, b"123456")):
        folder = logs / f"clipppo/CartPole-v1_{number}/videos"
        folder.mkdir()
        (folder / "best_model.mp4").write_bytes(content)
    monkeypatch.setattr(sections, "MOST_VIDEO_BYTES", 10)
    html = page(groups_of(logs), [], "")
    assert html.count("<video") == 1
    assert f'src="data:video/mp4;base64,{base64.b64encode(b"12345").decode()}"' in html
    assert f"Too large for the page: {logs}/clipppo/CartPole-v1_3/videos/best_model.mp4" in html
    assert html.count("<small>best_model.mp4</small></figcaption>") == 2


def test_runs_without_numbers_in_common_make_a_page(tmp_path: Path) -> None:
    # Only a log: no episodes, evaluations, settings or environment.
    (tmp_path / "progress.json").write_text(json.dumps({"time/total_timesteps": 64, "train/loss": 1.0}) + "\n")
    html = page(groups_of(tmp_path), [], "")
    assert "unknown environment" in html and "The files of the runs name no settings" in html


# --- files and the command


def test_all_formats_are_written(logs: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"report{suffix}" for suffix in (".html", ".csv", ".md", ".tex", ".png", ".svg", ".pdf")]
    write_outputs(groups_of(logs), [], "", paths)
    starts = [path.read_bytes()[:8].lstrip() for path in paths]
    heads = [b"<!doct", b"env,", b"| Env", rb"\begin", b"\x89PNG", b"<?xml", b"%PDF"]
    assert all(start.startswith(head) for start, head in zip(starts, heads, strict=True))


def test_folders_with_names_that_are_not_utf8_are_shown(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    for name in (b"caf\xe9", b"th\xe9"):
        write_run(Path("logs", os.fsdecode(name), "CartPole-v1_1"))
        (Path("logs", os.fsdecode(name), "CartPole-v1_1") / "progress.json").write_text("[")
    log = Path("logs", os.fsdecode(b"n\xe9-v1"), "PPO_1", "progress.json")  # the folder names the environment
    log.parent.mkdir(parents=True)
    log.write_text('{"time/total_timesteps": 100, "rollout/ep_rew_mean": 1.0}')
    names = [f"report{suffix}" for suffix in (".html", ".csv", ".md", ".tex", ".png", ".svg", ".pdf")]
    assert main(["logs", *(word for name in names for word in ("-o", name))]) == 0
    assert all("caf\\udce9" in Path(name).read_text() for name in names[:3])


def test_the_command_writes_the_page_and_names_what_it_left_out(
    logs: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(logs / "clipppo/CartPole-v1_9", returns=())
    assert zoo.main(["report", "logs", "-o", "out.html", "-o", "runs.csv"]) == 0
    printed = capsys.readouterr().out
    assert "CartPole-v1_9 was left out: no training episode ended" in printed
    assert "8 runs, 4 groups, 2 environments\n  out.html\n  runs.csv\n" in printed
    html = (in_empty_folder / "out.html").read_text()
    assert "<pre>sb3-clipvf report logs -o out.html -o runs.csv</pre>" in html
    assert "CartPole-v1_9 was left out" in html


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ("-o report.txt", r"`-o` must end in one of \.html, \.png, .*, got report\.txt\. Change its ending"),
        ("-o none/report.html", r"`-o` must be a file in a folder that exists, got none/report\.html, but there is no"),
        ("-o folder.html", r"`-o` must be a file .*, got folder\.html, which is a folder"),
        (
            "--env CartPole-v1x",
            r"`--env` must be left out with RUNS, got CartPole-v1x: runs are compared by their files",
        ),
        ("--no-video", r"`--no-video` must be left out with RUNS"),
        ("--stochastic", r"`--stochastic` must be left out with RUNS"),
        ("empty", r"`RUNS` must be runs or folders of runs, but empty holds no files of a run"),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(argv: str, match: str, logs: Path, in_empty_folder: Path) -> None:
    (in_empty_folder / "folder.html").mkdir()
    (in_empty_folder / "empty").mkdir()
    before = sorted(in_empty_folder.iterdir())
    with pytest.raises(ValueError, match=match):
        main(["logs", *argv.split()])
    assert sorted(in_empty_folder.iterdir()) == before


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("sb3_clipvf.zoo.comparison.sections.run_table", "planted"),  # while the page is made
        ("sb3_clipvf.files.atomic.os.fsync", r"report\.html could not be written: planted\. What it held before is"),
    ],
)
def test_an_existing_report_stays_whole_if_a_new_one_fails(
    place: str, match: str, logs: Path, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("report.html").write_text("old")

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "planted")

    monkeypatch.setattr(place, fail)
    with pytest.raises(OSError, match=match):
        main(["logs"])
    assert Path("report.html").read_text() == "old"
    assert sorted(path.name for path in in_empty_folder.iterdir()) == ["logs", "report.html"]


def test_the_missing_package_is_named(
    logs: Path, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    monkeypatch.setattr("sb3_clipvf.zoo.errors.importlib.util.find_spec", lambda name: None)
    assert zoo.main(["report", "logs"]) == 2
    assert "the package plotly must be installed for this. Run `pip install plotly`" in capsys.readouterr().err
