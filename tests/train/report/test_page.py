"""The page of a report, and its command: from whole and damaged run directories."""

import base64
import json
import os
import re
import shutil
import subprocess

import pytest

from tests.launch.slurm.cluster import install
from tests.train.report.runs import colors, write_run
from train.report.__main__ import main
from train.report.page import write_report
from train.report.records import ReportError, find_runs, read_run


def test_page_holds_everything_itself(sweep):
    page_path = write_report([sweep])
    page = page_path.read_text()
    inside = [base64.b64decode(x) for x in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    beside = sorted(p.name for p in page_path.parent.glob("*.png"))
    assert beside == ["cost.png", "final_loss.png", "loss.png", "pareto.png", "speed.png"] and len(inside) == 5
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)
    assert "Lowest final loss: chunk_size=2" in page and "Smallest cache: chunk_size=16" in page
    assert page.count("<tr") == 5 + 5  # four runs and a head, twice
    assert "model.chunk_size" in page and "run.name" not in page
    for picture in inside:
        assert colors(picture) > 50


def test_probes_and_memory_are_shown_where_recorded(tmp_path):
    extra = json.dumps({"step": 40, "tokens": 20480, "peak_gib": 3.5}) + "\n"  # as train.logs.run_log writes it
    evaluated = write_run(tmp_path / "a", extra=extra)
    scores = {"512": {"by_distance": [[64, 1.0, 8], [256, 0.5, 2]]}, "1024": {"by_distance": [[256, 0.0, 2]]}}
    (evaluated / "evaluation.json").write_text(json.dumps({"tasks": {"needle": scores}}))
    path = write_report([evaluated, write_run(tmp_path / "b", chunk_size=4)])
    assert (path.parent / "probes.png").is_file()
    assert "peak device memory" in path.read_text()
    run = read_run(evaluated, "a")
    assert [(p["distance"], p["accuracy"]) for p in run.probes()] == [(64, 1.0), (256, 0.25)]
    assert run.peak_memory == 3.5 * 2**30


def test_torn_unfinished_and_unusable_runs_are_named(sweep):
    write_run(sweep / "torn", steps=10, extra='{"step": 11, "tok')
    write_run(sweep / "empty", steps=0)
    (sweep / "halfway").mkdir()
    (sweep / "halfway/config.yaml").write_text("model: {hidden_size: 64")
    write_run(sweep / "newer", new_setting=1)
    (sweep / "sweep.json").write_text(json.dumps({"points": [{"name": "chunk_size=2"}, {"name": "chunk_size=32"}]}))
    page = write_report([sweep]).read_text()
    for words in (
        "torn: a line of metrics.jsonl is damaged and left out", "torn: is at step 10 of 40", "5 runs", "4 left out",
        "empty has no record of a loss", "halfway has no record of a loss", "new_setting",
        "chunk_size=32 has not been started",
    ):  # fmt: skip
        assert words in page, words


@pytest.mark.parametrize("what", ["nothing there", "empty folder", "no losses", "no configuration", "torn first line"])
def test_nothing_to_report_is_one_line(what, tmp_path, capsys):
    directory = tmp_path / "run"
    if what != "nothing there":
        directory.mkdir()
    if what == "no losses":
        (directory / "config.yaml").write_text("model: {}\n")
        (directory / "metrics.jsonl").write_text("")
    if what == "no configuration":
        (directory / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss": 2.0}\n')
    if what == "torn first line":
        (directory / "metrics.jsonl").write_text('{"step": 1, "tok')
    assert main([str(directory)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "run" in said
    with pytest.raises(ReportError):
        find_runs([directory])


def test_names_are_text_not_markup(tmp_path):
    path = write_report([write_run(tmp_path / "<script>alert(1)<&script>")], tmp_path / "out")
    assert "<script>" not in path.read_text() and "&lt;script&gt;" in path.read_text()
    assert path.parent == tmp_path / "out"


# -- in a browser -----------------------------------------------------------------------------------------------------


def browser() -> str | None:
    """Chromium or Chrome; Debian's package is installed where root may do that."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if not any(map(shutil.which, names)):
        install(["chromium"])
    return next((p for n in names if (p := shutil.which(n))), None)


@pytest.mark.browser
def test_page_in_chromium_shows_its_pictures(sweep, tmp_path):
    """The page lays out, every picture has its size, and a canvas in the page sees that it is not blank."""
    program = browser()
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no Chromium, and it cannot be installed here")
    path = write_report([sweep])
    probe = """<script>addEventListener("load", () => { const said = [...document.images].map(image => {
      const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
      canvas.width = image.naturalWidth; canvas.height = image.naturalHeight; pen.drawImage(image, 0, 0);
      const dots = new Uint32Array(pen.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
      return [image.alt, image.clientWidth, image.clientHeight, new Set(dots).size]; });
      document.body.dataset.said = JSON.stringify(said); });</script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(path.read_text().replace("</body>", probe + "</body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,1400",
    ]
    done = subprocess.run(
        [program, *options, "--dump-dom", f"file://{probed}"], capture_output=True, text=True, timeout=120
    )
    said = re.search(r'data-said="([^"]+)"', done.stdout)
    assert said, done.stderr[-2000:]
    pictures = json.loads(said[1].replace("&quot;", '"'))
    assert len(pictures) == 5
    for name, width, height, distinct in pictures:
        assert width > 600 and height > 100 and distinct > 50, (name, width, height, distinct)
