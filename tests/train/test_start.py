"""Where a run starts, found without data, process groups or a model."""

import json
import shutil

import pytest
import yaml

from tests.train.runs import make_config
from train.checkpoint.storage import CheckpointPath
from train.config import run_directory
from train.config.conversion import to_mapping
from train.config.errors import ConfigError
from train.hf import import_weights
from train.logs import saved
from train.start import Fresh, Import, Inherit, Resume, changes_of_resumed, find_start


def write_checkpoint(run, step, config=None, place="checkpoints", **facts):
    """What of a checkpoint is looked at here: nothing of it is verified."""
    directory = run / place / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text("{}")
    written = {"model": {}} if config is None else to_mapping(config)
    (directory / "state.json").write_text(json.dumps({"format": 2, "step": step, "config": written, **facts}))
    return directory


@pytest.fixture
def config(corpus, tmp_path):
    return lambda **changes: make_config(corpus, tmp_path, **changes)


def test_a_run_without_checkpoints_starts_afresh(config):
    assert find_start(config()) == Fresh()


def test_the_newest_checkpoint_is_resumed(config, tmp_path):
    write_checkpoint(tmp_path / "default", 5)
    newest = write_checkpoint(tmp_path / "default", 10)
    start = find_start(config(init_from="/no/longer/there"))  # where a resumed run once began may be gone
    assert isinstance(start, Resume) and str(start.checkpoint) == str(newest)
    assert find_start(config(resume="never")) == Fresh()


def test_another_runs_checkpoint_is_resumed_or_inherited(config, tmp_path):
    given = write_checkpoint(tmp_path / "other", 5)
    resumed, inherited = (find_start(config(**{key: str(tmp_path / "other")})) for key in ("resume", "init_from"))
    assert isinstance(resumed, Resume) and str(resumed.checkpoint) == str(given)
    assert isinstance(inherited, Inherit) and str(inherited.checkpoint) == str(given)


def test_a_hugging_face_directory_is_checked_and_imported(config, monkeypatch):
    checked = []
    monkeypatch.setattr(import_weights, "check", checked.append)
    asked = config(init_from="hf:somewhere")
    assert find_start(asked) == Import() and checked == [asked]


def saved_at_20(config, tmp_path, resume="auto"):
    """A run that keeps its checkpoints on a file system of their own, and is at step 20."""
    asked = config(checkpoint__dir=str(tmp_path / "disk"), resume=resume)
    own = write_checkpoint(tmp_path / "disk" / "x", 20).parents[2] / "default"
    (tmp_path / "disk/x/checkpoints").rename(own)
    run = tmp_path / "default"
    run.mkdir()
    lines = [{"step": step, "loss": 2.0} for step in range(1, 21)] + [{"step": 20, "checkpoint_seconds": 0.1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert isinstance(find_start(asked), Resume)
    return asked, own


@pytest.mark.parametrize("remembers", [True, False], ids=["note", "records of an earlier version"])
def test_a_run_whose_checkpoints_are_not_there_does_not_start_afresh(config, tmp_path, remembers):
    asked, own = saved_at_20(config, tmp_path)
    if remembers:
        saved.remember(tmp_path / "default", "auto", print)(CheckpointPath(own / "step-00000020"), 20)
    own.rename(tmp_path / "elsewhere")  # as if the disk were not mounted
    with pytest.raises(ConfigError, match=f"at step 20.*no checkpoint in {own}: mount.*checkpoint.dir.*resume=never"):
        find_start(asked)
    moved = config(checkpoint__dir=str(tmp_path / "new"))
    with pytest.raises(ConfigError, match="saved at step 20"):
        find_start(moved)
    assert find_start(config(resume="never")) == Fresh()
    assert isinstance(find_start(config(resume=str(tmp_path / "elsewhere"))), Resume)
    own.mkdir()  # what an earlier start of the unmounted run leaves behind
    if remembers:
        with pytest.raises(ConfigError, match="saved at step 20"):
            find_start(asked)
        (own / "step-00000020.replaced").mkdir()  # killed while it replaced the only one: the next start restores it
        assert find_start(asked) == Fresh()
    (tmp_path / "new").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "new" / "default")
    assert isinstance(find_start(moved), Resume)


def test_a_first_save_that_was_cut_off_is_nothing_to_look_for(config, tmp_path):
    asked, own = saved_at_20(config, tmp_path)
    (own / "step-00000020").rename(own / "step-00000020.incomplete")
    assert find_start(asked) == Fresh()


def test_the_same_command_with_a_path_does_not_begin_there_again(config, tmp_path):
    given = write_checkpoint(tmp_path / "other", 5)
    asked, own = saved_at_20(config, tmp_path, resume=str(tmp_path / "other"))
    saved.remember(tmp_path / "default", str(tmp_path / "other"), print)(CheckpointPath(own / "step-00000020"), 20)
    own.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="saved at step 20"):
        find_start(asked)
    again = find_start(config(resume=str(given)))  # a decision of now
    assert isinstance(again, Resume) and str(again.checkpoint) == str(given)


def test_a_path_that_is_gone_is_not_missed_by_a_run_that_has_gone_on_from_it(config, tmp_path):
    asked = config(resume=str(tmp_path / "gone"))
    newest = write_checkpoint(tmp_path / "default", 10, asked)
    found = find_start(asked)
    assert isinstance(found, Resume) and str(found.checkpoint) == str(newest)
    with pytest.raises(ConfigError, match="elsewhere: neither a checkpoint"):  # a decision of now
        find_start(config(resume=str(tmp_path / "elsewhere")))


@pytest.mark.parametrize("key", ["resume", "init_from"])
def test_a_wrong_path_is_refused(config, key):
    with pytest.raises(ConfigError, match=f"{key}=nowhere: neither a checkpoint"):
        find_start(config(**{key: "nowhere"}))


OTHER_MODELS = [
    dict(model__rope_base=5e4),
    dict(model__rope_scaling={"kind": "linear", "factor": 2}),
    dict(model__window_chunks=4),
    dict(model__chunk_size=8),
    dict(model__layer_pattern="KSKF"),
]


@pytest.mark.parametrize(
    "changes", [*OTHER_MODELS, dict(optim__lr=0.5), dict(data__seed=3), dict(seq_len=512)], ids=str
)
@pytest.mark.parametrize("resume", ["auto", "never", "PATH"])
def test_checkpoints_of_another_run_are_left_alone(config, tmp_path, changes, resume):
    """Two runs with one name below one checkpoint.dir: the second is refused, however it begins."""
    shared = dict(checkpoint__dir=str(tmp_path / "shared"))
    first = config(**shared, run__root=str(tmp_path / "a"))
    write_checkpoint(tmp_path / "shared", 5, first, "default")
    given = write_checkpoint(tmp_path / "other", 5)
    second = shared | dict(run__root=str(tmp_path / "b"), resume=str(given) if resume == "PATH" else resume)
    find_start(config(**second))  # the same run from another place goes on
    key = next(iter(changes)).replace("__", ".")
    with pytest.raises(ConfigError, match=rf"checkpoint.dir=.*step-00000005 was written by another run: {key}.* was"):
        find_start(config(**second | changes))


@pytest.mark.parametrize("changes", OTHER_MODELS, ids=str)
def test_resume_keeps_the_model_and_lists_the_rest(config, tmp_path, changes):
    given = write_checkpoint(tmp_path / "other", 5, config(run__name="other"))
    key = next(iter(changes)).replace("__", ".")
    with pytest.raises(ConfigError, match=rf"of another model or stage: {key}.*init_from=.* begin a new run"):
        find_start(config(resume=str(given), run__name="new", **changes))
    new = config(resume=str(given), run__name="new", optim__lr=0.5, run__steps=9, parallel__zero=2, run__log_every=7)
    start = find_start(new)
    assert isinstance(start, Resume)
    said = changes_of_resumed(new, start.checkpoint, start.state)
    assert said == "optim.lr 0.01 -> 0.5, parallel.zero 1 -> 2, run.steps 5 -> 9"


def test_an_annealed_checkpoint_is_of_its_run(config, tmp_path):
    write_checkpoint(tmp_path / "default", 5, config(model__independent_qkv=False), own_share=0)
    assert isinstance(find_start(config(model__independent_qkv=True)), Resume)


def test_a_run_that_moved_is_the_same_run(config, tmp_path):
    """Its directory, and the data under another path; what the data are is compared by their fingerprint."""
    corpora = [dict(name="a", source="jsonl", path="x", weight=1.0)]
    mixed = dict(data__source="mixture", data__corpora=corpora, data__path=None)
    for number, (before, after) in enumerate(
        [
            ({}, dict(data__path="/elsewhere/corpus.jsonl")),
            (mixed, mixed | dict(data__corpora=[corpora[0] | dict(path="y")])),
        ]
    ):
        run = tmp_path / f"a{number}"
        write_checkpoint(run, 5, config(run__name=run.name, **before))
        (run / "config.yaml").write_text(yaml.safe_dump(to_mapping(config(run__name=run.name, **before))))
        moved = run.rename(tmp_path / f"b{number}")
        asked = config(run__name=moved.name, **after)
        run_directory.check(moved, asked)
        assert isinstance(find_start(asked), Resume)


def test_advice_about_a_run_directory_destroys_nothing(config, tmp_path):
    (tmp_path / "default").mkdir()
    (tmp_path / "default/config.yaml").write_text(yaml.safe_dump(to_mapping(config())))
    with pytest.raises(ConfigError) as refused:
        run_directory.check(tmp_path / "default", config(optim__lr=0.5))
    assert "optim.lr was 0.01 and is now 0.5; choose another run.name" in str(refused.value)
    assert not any(word in str(refused.value) for word in ("remove", "delete"))


@pytest.mark.parametrize("now", [dict(checkpoint__dir="{}/new"), dict(run__name="moved", checkpoint__dir="{}/old")])
def test_checkpoints_in_another_place_are_not_forgotten(config, tmp_path, now):
    """A new checkpoint.dir, or a run directory that was moved: the run must not begin again in silence."""
    before = config(checkpoint__dir=str(tmp_path / "old"))
    write_checkpoint(tmp_path / "old", 5, before, "default")
    (tmp_path / "default").mkdir()
    (tmp_path / "default/config.yaml").write_text(yaml.safe_dump(to_mapping(before)))
    now = {key: value.format(tmp_path) for key, value in now.items()}
    if "run__name" in now:
        (tmp_path / "default").rename(tmp_path / "moved")
    with pytest.raises(
        ConfigError, match=r"holds no checkpoint, but .* has its checkpoints in .*/old/default .*000005"
    ):
        find_start(config(**now))
    assert find_start(config(resume="never", **now)) == Fresh()
    assert isinstance(find_start(config(resume=str(tmp_path / "old/default"), **now)), Resume)
    if "run__name" in now:
        shutil.move(tmp_path / "old/default", tmp_path / "old/moved")
        assert isinstance(find_start(config(**now)), Resume)
