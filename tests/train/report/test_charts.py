"""The pictures show something."""

from tests.train.report.runs import colors, write_run
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
