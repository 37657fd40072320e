"""The report: from records and configurations alone, whole or torn, to a page whose pictures show something."""

import base64
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
import yaml

from tests.launch.slurm.cluster import install
from train import records, report
from train.records import CONTEXT, ReportError, find_runs, pareto, read_run, smoothed

MODEL = {"hidden_size": 64, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "ffn_size": 128,
         "vocab_size": 512, "layer_pattern": "KKKF", "chunk_size": 8, "window_chunks": 4}  # fmt: skip


def write_run(
    directory: Path, *, steps: int = 40, of: int = 40, held_out: bool = True, extra: str = "", **model
) -> Path:
    """A run directory with records that fall from 6 towards 3 + k/100."""
    directory.mkdir(parents=True)
    config = {"model": {**MODEL, **model}, "seq_len": 512, "run": {"name": directory.name, "root": "x", "steps": of}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for step in range(1, steps + 1):
        loss = 3 + config["model"]["chunk_size"] / 100 + 3 * 0.9**step
        lines.append({"step": step, "tokens": 512 * step, "loss": loss, "tokens_per_second": 1000.0 + step})
        if held_out and step % 20 == 0:
            lines.append({"step": step, "tokens": 512 * step, "validation_loss": loss + 0.5})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + extra)
    return directory


@pytest.fixture
def sweep(tmp_path) -> Path:
    for k in (2, 4, 8, 16):
        write_run(tmp_path / f"k/chunk_size={k}", chunk_size=k)
    return tmp_path / "k"


def test_numbers_are_those_of_the_model(sweep):
    runs, left_out = find_runs([sweep])
    assert [r.model.chunk_size for r in runs] == [2, 4, 8, 16] and left_out == []
    run = runs[2]
    # One full layer keeps every token; three KSA layers keep (4+1) chunks of 8, and a summary of each before.
    rows = CONTEXT + 3 * (5 * 8 + CONTEXT // 8 - 4)
    assert run.cache_bytes == rows * 2 * 2 * 32 * 2  # keys and values, 2 heads of 32, bf16
    assert run.window == 40
    # By hand at 512 tokens: t, in chunk c = t // 8, sees 8*min(c, 4) + t % 8 + 1 as text and max(0, c - 4) summaries.
    ksa = sum(8 * min(t // 8, 4) + t % 8 + 1 + max(0, t // 8 - 4) for t in range(512))
    full = 512 * 513 // 2
    assert run.visible_keys == pytest.approx((3 * ksa + full) / 4 / 512)
    assert run.final_loss == pytest.approx(3 + 0.08 + 3 * 0.9**40 + 0.5)
    assert run.tokens_per_second == pytest.approx(1021.5)  # median of 1003..1040


def test_without_held_out_loss_the_last_tenth_counts(tmp_path):
    run = read_run(write_run(tmp_path / "r", held_out=False), "r")
    assert run.final_loss == pytest.approx(sum(3.08 + 3 * 0.9**s for s in (37, 38, 39, 40)) / 4)


def test_smoothing_and_front():
    assert smoothed([5.0] * 100) == pytest.approx([5.0] * 100)
    assert smoothed([1.0, 2.0]) == [1.0, 2.0]  # too few to smooth
    line = [3.0 - 0.01 * i for i in range(200)]
    assert smoothed(line) == pytest.approx(line)  # no lag behind a falling loss
    noisy = [x + (-1) ** i for i, x in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(smoothed(noisy)[20:180], line[20:180])) < 0.15
    assert pareto([(1, 5), (2, 6), (3, 4), (3, 3), (9, 9)]) == [0, 3]


def test_page_holds_everything_itself(sweep):
    page_path = report.write_report([sweep])
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


def colors(png: bytes) -> int:
    """Distinct pixel values of a PNG, so that a blank one shows."""
    width, height, _, kind = struct.unpack(">IIBB", png[16:26])
    channels, data, at = {2: 3, 6: 4}[kind], b"", 8
    while at < len(png):
        length, name = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += 12 + length
    rows = zlib.decompress(data)
    assert len(rows) == height * (1 + width * channels)
    return len({rows[i : i + 8] for i in range(0, len(rows), 8)})


def test_blank_picture_would_be_seen(tmp_path):
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(9, 4), dpi=130)
    figure.savefig(tmp_path / "blank.png")
    pyplot.close(figure)
    assert colors((tmp_path / "blank.png").read_bytes()) < 50


def test_probes_and_memory_are_shown_where_recorded(tmp_path):
    extra = json.dumps({"step": 40, "tokens": 20480, "peak_gib": 3.5}) + "\n"  # as train.metrics writes it
    evaluated = write_run(tmp_path / "a", extra=extra)
    scores = {"512": {"by_distance": [[64, 1.0, 8], [256, 0.5, 2]]}, "1024": {"by_distance": [[256, 0.0, 2]]}}
    (evaluated / "evaluation.json").write_text(json.dumps({"tasks": {"needle": scores}}))
    path = report.write_report([evaluated, write_run(tmp_path / "b", chunk_size=4)])
    assert (path.parent / "probes.png").is_file()
    assert "most device memory" in path.read_text()
    run = records.read_run(evaluated, "a")
    assert [(p["distance"], p["accuracy"]) for p in run.probes()] == [(64, 1.0), (256, 0.25)]
    assert run.peak_memory == 3.5 * 2**30


def test_torn_unfinished_and_unusable_runs_are_named(sweep):
    write_run(sweep / "torn", steps=10, extra='{"step": 11, "tok')
    write_run(sweep / "empty", steps=0)
    (sweep / "halfway").mkdir()
    (sweep / "halfway/config.yaml").write_text("model: {hidden_size: 64")
    write_run(sweep / "newer", new_setting=1)
    (sweep / "sweep.json").write_text(json.dumps({"points": [{"name": "chunk_size=2"}, {"name": "chunk_size=32"}]}))
    page = report.write_report([sweep]).read_text()
    for words in (
        "torn: a line of metrics.jsonl could not be read", "torn: stands at step 10 of 40", "5 runs", "4 left out",
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
    assert report.main([str(directory)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "run" in said
    with pytest.raises(ReportError):
        find_runs([directory])


def test_names_are_text_not_markup(tmp_path):
    path = report.write_report([write_run(tmp_path / "<script>alert(1)<&script>")], tmp_path / "out")
    assert "<script>" not in path.read_text() and "&lt;script&gt;" in path.read_text()
    assert path.parent == tmp_path / "out"


def test_flops_count_follows_the_length(sweep):
    model = read_run(sweep / "chunk_size=8", "x").model
    short, long = (records.flops_per_sample(model, n) for n in (4096, 8192))
    assert 2 * short < long < 4 * short  # between linear and quadratic


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
    path = report.write_report([sweep])
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
