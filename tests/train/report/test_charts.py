"""The pictures show something."""

import numpy as np
import pytest

from tests.train.report.runs import colors, probe_record, report_record, write_records, write_run
from train.report.charts import draw, pictures
from train.report.records import find_runs


def test_blank_picture_would_be_seen(tmp_path):
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(9, 4), dpi=130)
    figure.savefig(tmp_path / "blank.png")
    pyplot.close(figure)
    assert colors((tmp_path / "blank.png").read_bytes()) < 50


def test_each_picture_is_drawn(tmp_path, sweep):
    runs, _ = find_runs([sweep])
    chosen = pictures(runs)
    assert [p.file for p in chosen] == ["loss.png", "final_loss.png", "cost.png", "speed.png", "pareto.png"]
    draw(chosen, runs, tmp_path)
    for picture in chosen:
        assert colors((tmp_path / picture.file).read_bytes()) > 50, picture.file


def test_one_run_has_only_the_pictures_that_need_no_other(tmp_path):
    write_run(tmp_path / "alone")
    runs, _ = find_runs([tmp_path])
    assert [p.file for p in pictures(runs)] == ["loss.png", "speed.png"]


RECALL = ["recall_length_tokens.png", "recall_length_seconds.png", "recall_distance_tokens.png",
          "recall_distance_seconds.png"]  # fmt: skip


def probed_run(directory, *lengths, tasks=("needle",), records=6):
    lines = []
    for i in range(1, records):
        record = probe_record(10 * i, 0.15 * i, *lengths, task=tasks[0])
        record["probes"] = {task: record["probes"][tasks[0]] for task in tasks}
        lines += [report_record(10 * i, 1.0 + 0.1 * len(lengths)), record]
    return write_records(directory, lines)


def drawn(picture, runs, check):
    """Draw a picture as `draw` does, and call `check(figure, renderer)` before it is closed."""
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=picture.size, dpi=130, layout="constrained")
    try:
        picture.draw(figure, runs)
        figure.canvas.draw()
        return check(figure, figure.canvas.get_renderer())
    finally:
        pyplot.close(figure)


def lines_of(figure, _):
    return {
        axes.get_title(): [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
        for axes in figure.axes
    }


def legend_of(figure, _):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_recall_of_one_run_has_a_line_for_each_length_and_distance(tmp_path):
    runs, _ = find_runs([probed_run(tmp_path / "a", 1024, 512, tasks=("needle", "chain"))])
    chosen = {p.file: p for p in pictures(runs)}
    assert [name for name in chosen if name.startswith("recall")] == RECALL
    tokens = drawn(chosen["recall_length_tokens.png"], runs, lines_of)
    assert set(tokens) == {"needle", "chain"}
    recall = [0.15, 0.3, 0.45, 0.6, 0.75]
    assert np.allclose(tokens["chain"], [([5120, 10240, 15360, 20480, 25600], recall)] * 2)
    seconds = drawn(chosen["recall_length_seconds.png"], runs, lines_of)
    assert np.allclose(seconds["needle"], [([12, 24, 36, 48, 60], recall)] * 2)
    assert drawn(chosen["recall_length_tokens.png"], runs, legend_of) == ["512 tokens", "1,024 tokens"]
    near, far = drawn(chosen["recall_distance_tokens.png"], runs, lines_of)["needle"]
    assert np.allclose(near[1], recall) and np.allclose(far[1], np.array(recall) / 2)
    assert drawn(chosen["recall_distance_tokens.png"], runs, legend_of) == ["64 tokens", "256 tokens"]


def test_recall_of_several_runs_is_compared_in_the_same_charts(tmp_path):
    plain = write_run(tmp_path / "without probes")
    runs, _ = find_runs([probed_run(tmp_path / "a", 512), probed_run(tmp_path / "b", 512, 1024), plain])
    chosen = {p.file: p for p in pictures(runs)}
    panels = drawn(chosen["recall_length_tokens.png"], runs, lines_of)
    assert {title: len(lines) for title, lines in panels.items()} == {
        "needle, 512 tokens": 2,
        "needle, 1,024 tokens": 1,
    }
    assert drawn(chosen["recall_length_tokens.png"], runs, legend_of) == ["a", "b"]
    assert set(drawn(chosen["recall_distance_tokens.png"], runs, lines_of)) == {"needle\na", "needle\nb"}


def test_one_distance_has_no_picture_of_distances(tmp_path):
    record = probe_record(10, 0.5)
    record["probes"]["needle"]["512"]["by_distance"] = [[64, 0.5, 8]]
    runs, _ = find_runs([write_records(tmp_path / "a", [report_record(10), record])])
    assert [p.file for p in pictures(runs) if p.file.startswith("recall")] == RECALL[:2]


def overlaps(figure, renderer):
    """Pairs of texts, or texts and charts, that lie on each other, and texts that stick out of the picture."""
    texts = [t for axes in figure.axes for t in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts += [t for legend in figure.legends for t in legend.get_texts()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text() and t.get_visible()]
    found = [a for a, box in boxes if not figure.bbox.contains(*box.min) or not figure.bbox.contains(*box.max)]
    charts = [("a chart", axes.get_window_extent(renderer)) for axes in figure.axes]
    for i, (a, box) in enumerate(boxes):
        for b, other in boxes[i + 1 :] + charts:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            if width > 1 and height > 1:
                found.append((a, b))
    return found


@pytest.mark.parametrize("number", [1, 4])
def test_long_names_stay_readable(tmp_path, number):
    for i in range(number):
        probed_run(tmp_path / f"{i}{'long_name=' * 20}{i}", 512, 131072, tasks=("multiquery", "variables"), records=3)
    runs, _ = find_runs([tmp_path])
    for picture in pictures(runs):
        if picture.file not in RECALL:
            width, height = drawn(picture, runs, lambda figure, _: figure.axes[0].get_window_extent().size)
            assert width > 300 and height > 100, picture.file  # else no layout was found
        else:
            found, names = drawn(picture, runs, lambda *a: (overlaps(*a), legend_of(*a)))
            assert found == [], picture.file
            assert len(names) == len(set(names)) == (number if "length" in picture.file and number > 1 else 2)
