"""`python -m train` as people type it: bad input, help, signals, torchrun, multirun.

Help, torchrun and multirun start a new interpreter, as a user would; the others are forked: see tests/commands.py.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data_pipeline import DataConfig
from tests import commands
from tests.train.runs import BASE, losses
from train.__main__ import main
from train.config.conversion import from_mapping
from train.config.errors import ConfigError
from train.config.quoting import quoted
from train.config.schema import TrainConfig
from train.distributed.signals import BAD_INPUT, DIVERGED, FAILED, NOT_SAVED, REQUEUE
from train.logs.metrics import SUPERSEDED, read_records

ROOT = Path(__file__).resolve().parent.parent.parent


def small_overrides(corpus, root, **changes):
    """Command-line overrides of the tests' small run."""
    values = {
        f"{section}.{key}": value
        for section, keys in BASE.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }
    values |= {
        "seq_len": BASE["seq_len"],
        "data.path": corpus,
        "data.cache_dir": corpus.parent / "cache",
        "run.root": root,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in values.items()]


def start(arguments, launcher=("-m", "train"), **kwargs):
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def refused(monkeypatch, capsys, *arguments):
    """Run the command in this process; returns the one line it leaves with."""
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == BAD_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model.chnk_size=4"], "model.chnk_size is not a configuration key; did you mean model.chunk_size?"),
        (["+model.chnk_size=4"], "model.chnk_size is not a configuration key; did you mean model.chunk_size?"),
        (["run.recompute=true"], "run.recompute is not a configuration key; did you mean memory.recompute?"),
        (["memory.offload=true"], "memory.recompute=none recomputes nothing; use memory.recompute=selective or full"),
        (["memory=some"], "Could not find 'memory/some' Available options in 'memory'"),
        (["sequence_length=4096"], "sequence_length is not a configuration key"),
        (["model=tinny"], "Could not find 'model/tinny' Available options in 'model'"),
        (["model.layer_pattern=KKXF"], "model.layer_pattern='KKXF' contains 'X'"),
        (["model.layer_pattern=KKF"], "has 3 letters and does not divide model.num_layers=4"),
        (["parallel.tensor=3"], "the world of 1 ranks is not a multiple of parallel.tensor=3"),
        (["run.samples_per_step=0"], "run.samples_per_step=0 must be at least 1"),
        (
            ["seq_len=4100"],
            "seq_len=4100 is not a multiple of 8 (document alignment 8); the nearest that fit are 4096 and 4104",
        ),
        (["document_alignment=12"], "document_alignment=12 is not a multiple of model.chunk_size=8"),
        (["model.chunk_size=eight"], "model.chunk_size='eight' must be a whole number"),
        (["optim.betas=[0.9]"], "optim.betas=[0.9] must be a list of 2 values"),
        (["data=jsonl"], "data.source=jsonl needs data.path"),
        (["data=jsonl", "data.path=/no/such/corpus.jsonl"], "data.path=/no/such/corpus.jsonl"),
        (["run.device=cuda"], "run.device=cuda, but this process sees no CUDA device"),
        (["model.attention_backend=fused"], "attention_backend=fused computes in 16 bits, and run.precision=fp32"),
        (["model.attention_backend=fused", "run.precision=bf16", "run.device=cpu"], "needs a CUDA device"),
        (["run.precision=bf16", "parallel.zero=0"], "needs parallel.zero=1"),
        (["run.samples_per_step=4", "run.samples_per_micro_batch=3"], "samples_per_micro_batch=3 does not divide"),
        (["run.name=../elsewhere"], "run.name='../elsewhere' must be a relative path"),
        (["resume=/no/such/run"], "resume=/no/such/run: neither a checkpoint"),
        (["run.stop_at_step=0"], "run.stop_at_step=0 must be at least 1"),
        (["dry_run=true", "dry_run_ranks=-2"], "dry_run_ranks=-2 must be at least 1"),
        (["optim.betas=[0.9,1.0]"], "optim.betas=[0.9, 1.0] must each be at least 0 and below 1"),
        (["checkpoint.dir=foo://bucket"], "foo://bucket cannot be opened"),
        (["init_from=README.md"], "init_from=README.md: neither a checkpoint"),
        (["run.root=README.md"], "README.md is not a directory that can be written"),
        (
            ["run.name=20240601"],
            """run.name=20240601 must be a string; as text it is written with two pairs of quotes""",
        ),
        (["resume=true"], """'resume="true"'"""),
        (["run.name=1E2"], """as text it is written with two pairs of quotes: 'run.name="1E2"'"""),
        (["data.path=${oc.env:NO_SUCH_VARIABLE}"], "data.path: KeyError raised while resolving interpolation"),
        (["run.name=${no_such_key}"], "run.name: Interpolation key 'no_such_key' not found; set it"),
        (["run.name=${run.name}"], "run.name: Recursive interpolation detected"),
        (["run.name=" + "x" * 300], "has 300 bytes between slashes, and a directory's name at most 240"),
        (["run.root=/tmp/" + "x" * 300], "the directory cannot be reached (File name too long)"),
        (["checkpoint.dir=/tmp/" + "x" * 300], "File name too long"),
        (["checkpoint.dir=/proc/nowhere"], "checkpoint.dir=/proc/nowhere: rank 0 on "),
        (["optim.lr=nan"], "optim.lr=nan must be a number, and finite"),
        (["run.spike_factor=inf"], "run.spike_factor=inf must be a number, and finite"),
        (["logging.wandb=perhaps"], "logging.wandb='perhaps' is not one of online, offline, off"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    if arguments == ["run.device=cuda"]:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    assert message in refused(monkeypatch, capsys, f"run.root={tmp_path}", *arguments)
    assert not (tmp_path / "default").exists()


def test_layout_against_a_pretended_world(monkeypatch, capsys, tmp_path):
    for world, arguments, message in [
        (
            2,
            ["parallel.tensor=2", "model.num_kv_heads=1"],
            "model.num_kv_heads=1 is not divisible by parallel.tensor=2",
        ),
        (3, [], "run.samples_per_step=1 is not a multiple of the 3 data-parallel ranks"),
        (2, ["parallel.tensor=2", "parallel.sequence=true", "seq_len=4104"], "seq_len=4104 is not a multiple of 16"),
    ]:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert message in refused(monkeypatch, capsys, f"run.root={tmp_path}", *arguments)


def test_bad_jsonl_names_file_and_line(monkeypatch, capsys, tmp_path):
    path = tmp_path / "bad.jsonl"
    for line, message in [('{"text": 3}', "text"), ("[1, 2]", "object"), ('{"body": "x"}', "text"), ("{nope", "JSON")]:
        path.write_text(json.dumps({"text": "fine " * 50}) + "\n" + line + "\n")
        said = refused(
            monkeypatch,
            capsys,
            f"run.root={tmp_path}",
            "data=jsonl",
            f"data.path={path}",
            f"data.cache_dir={tmp_path}/cache",
            "data.vocab_size=300",
            "logging.progress=false",
        )
        assert f"{path}:2" in said and message in said


def test_a_run_directory_of_another_configuration(monkeypatch, capsys, tmp_path, corpus):
    directory = tmp_path / "default"
    directory.mkdir()
    from tests.train.runs import make_config
    from train.config.conversion import to_mapping

    before = to_mapping(make_config(corpus, tmp_path))
    (directory / "config.yaml").write_text(yaml.safe_dump(before))
    said = refused(monkeypatch, capsys, *small_overrides(corpus, tmp_path, model__chunk_size=8))
    assert "model.chunk_size was 4 and is now 8; choose another run.name" in said


def test_a_run_of_an_earlier_version_goes_on(tmp_path, corpus):
    """Its configuration says run.recompute, which has become memory.recompute."""
    from tests.train.runs import make_config
    from train.config import run_directory
    from train.config.conversion import to_mapping
    from train.config.schema import from_saved

    config = make_config(corpus, tmp_path, memory__recompute="full")
    before = to_mapping(config)
    del before["memory"]
    before["run"]["recompute"] = True
    del before["init_summary_from"]  # a key that is newer than the run
    assert from_saved(before) == config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    run_directory.check(tmp_path, config)


def test_a_start_that_is_refused_leaves_the_run_as_it_was(corpus, tmp_path):
    """Its only copy of the tokenizer above all."""
    own = tmp_path / "corpus.jsonl"
    own.write_bytes(corpus.read_bytes())
    arguments = small_overrides(own, tmp_path)
    code, _, err = commands.run("train", *arguments)
    assert code == 0, err
    kept = [tmp_path / "default" / name for name in ("tokenizer.model", "config.yaml")]
    before = [path.read_bytes() for path in kept]
    with open(own, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "zebra quagga okapi " * 400}) + "\n")
    code, _, err = commands.run("train", *arguments, "run.steps=9")
    assert code == BAD_INPUT and "was trained with the tokenizer of sha256" in err
    assert [path.read_bytes() for path in kept] == before
    tokenizer = f"data.tokenizer={kept[0]}"  # as the message says, with the data of now
    code, _, err = commands.run("train", *arguments, "run.steps=9", tokenizer, "data.accept_changes=true")
    assert code == 0, err


def test_a_config_that_was_torn_is_one_line(monkeypatch, capsys, tmp_path, corpus):
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "config.yaml").write_text("")
    said = refused(monkeypatch, capsys, *small_overrides(corpus, tmp_path))
    assert "config.yaml does not hold the configuration of a run" in said


def test_closing_words_are_commands_that_go_on(corpus, tmp_path):
    from dataclasses import replace

    from tests.train.runs import make_config
    from train.__main__ import closing_words
    from train.trainer import RunResult

    config = make_config(corpus, tmp_path, run__name="mr/model.chunk_size=4")
    result = RunResult(tmp_path / config.run.name, 5, 100, None, 1.0, False)
    words = closing_words(config, result, ["+run.steps=5", "resume=never", "run.name=mr", "model.chunk_size=4"])
    assert """python -m train model.chunk_size=4 run.steps=10 'run.name='"'"'mr/model.chunk_size=4'"'"''""" in words
    stages = ({"name": "a", "run.steps": 6}, {"name": "b", "run.steps": 4})
    chained, first = replace(config, stages=stages), tmp_path / config.run.name / "0-a"
    assert "Stage 1 of 2 is at step 3 of 6" in closing_words(chained, replace(result, directory=first, step=3), [])
    last = replace(result, directory=first.with_name("1-b"), step=4)
    assert "All 2 stages are done" in closing_words(chained, last, [])
    anneal = replace(config, stage=replace(config.stage, kind="anneal"))
    assert "for more steps" in words and "for more steps" not in closing_words(anneal, result, [])


NAMES = [
    "probe-1", "a,b", "it's", 'say "hi"', "прогон", "日本", "20240601", "1e5", "1_000", "-5", "+5", ".5", "true",
    "Null", "nan", "back\\slash", "end\\", "\\", "\\'", "a b", "x=y", "{a}", "[a]", "${run.seed}", "$HOME", "`ls`", "~",
    "!x", "a:b", "#x", "a/b", "runs/2024", "*", "(a)", "a|b;c&d<e>",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_command_to_go_on_means_the_same_run_whatever_its_name(name, corpus, tmp_path):
    """Through a shell, Hydra's grammar and OmegaConf, each as it is."""
    from tests.train.runs import make_config
    from train.__main__ import closing_words
    from train.config.compose import compose
    from train.trainer import RunResult

    config = make_config(corpus, tmp_path, run__name=name, run__root="runs/of,me")
    result = RunResult(config.run.directory, 5, 100, None, 1.0, False)
    typed = [f"run.name={quoted(name)}", "run.root='runs/of,me'", "run.stop_at_step=5", "optim.lr=1e-3"]
    words = closing_words(config, result, typed)
    line = next(line for line in words.splitlines() if "train for more steps" in line)
    command = line.removeprefix("  train for more steps     python -m train ")
    show = f"{shlex.quote(sys.executable)} -c 'import sys, json; print(json.dumps(sys.argv[1:]))' {command}"
    said = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True).stdout
    composed = compose(json.loads(said))
    assert composed["run"]["name"] == name and composed["run"]["root"] == "runs/of,me"
    assert composed["run"]["steps"] == 10 and composed["run"]["stop_at_step"] is None  # else it would end at once


def test_a_run_that_is_longer_than_it_is_told_says_so(corpus, tmp_path):
    from tests.train.runs import make_config
    from train.__main__ import closing_words
    from train.trainer import RunResult

    config = make_config(corpus, tmp_path, run__steps=10)
    words = closing_words(config, RunResult(tmp_path, 20, 100, None, 1.0, False), [])
    assert (
        "Step 20 of 10" not in words
        and "The run is at step 20, beyond run.steps=10: 100 tokens" in words
        and "run.steps=40" in words
    )


def test_a_last_save_that_fails_is_one_line_and_an_exit_code(corpus, tmp_path):
    """A file takes the place of the directory of checkpoints while the run trains."""
    metrics, steps = tmp_path / "default" / "metrics.jsonl", 300
    elsewhere = dict(run__steps=steps, checkpoint__every_steps=1000, checkpoint__dir=tmp_path / "disk")
    command = commands.Command("train", *small_overrides(corpus, tmp_path, **elsewhere))
    while command.is_running and not (metrics.is_file() and metrics.read_bytes()):
        time.sleep(0.01)
    shutil.rmtree(tmp_path / "disk", ignore_errors=True)
    (tmp_path / "disk").write_text("in the way")
    code = command.wait()
    err = command.stderr
    assert code == NOT_SAVED, err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"step {steps} could not be saved" in error and "continues from its beginning" in error
    assert "Traceback" not in err and len(read_records(tmp_path / "default" / "metrics.jsonl")) >= 2


def test_data_that_a_run_loses_while_it_trains_are_no_bad_input(corpus, tmp_path):
    """A launcher starts it again: the store may be back. Where nothing has been trained, the input is bad."""
    from data_pipeline import DataConfig, open_data

    data = open_data(DataConfig(source="jsonl", path=str(corpus), vocab_size=400, cache_dir=str(tmp_path / "cache")))
    lines, torn = corpus.read_text(encoding="utf-8").splitlines()[:20], tmp_path / "torn.jsonl"
    torn.write_text("\n".join([*lines, '{"text": ']))
    stream = dict(data__stream="true", data__validation_fraction=0.0, data__tokenizer=data.tokenizer_path)
    stream |= dict(data__slab_mb=0.01, run__steps=1000, checkpoint__every_steps=2)
    arguments = small_overrides(torn, tmp_path, **stream)
    code, _, err = commands.run("train", *arguments)
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == FAILED and "Traceback" not in err, err
    assert error.startswith("error: rank 0: ") and "torn.jsonl:21: " in error and "from the newest checkpoint" in error
    code, _, err = commands.run("train", *arguments)  # it has read the data before
    assert code == FAILED and "resumed from" in err and "torn.jsonl:21: " in err
    torn.write_text('{"text": ')
    code, _, err = commands.run("train", *arguments, "run.name=new")
    assert code == BAD_INPUT and "torn.jsonl:1: " in err, err


def test_a_later_stage_that_cannot_start_is_no_bad_input_of_the_chain(corpus, tmp_path):
    stages = "[{name: a, run.steps: 2}, {name: b, run.steps: 2, data.path: /no/such/corpus}]"
    arguments = [*small_overrides(corpus, tmp_path), f"stages={stages}"]
    code, _, err = commands.run("train", *arguments)
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == FAILED and "stage 2 of 2 (default/1-b) cannot start: data.path=/no/such/corpus" in error
    code, _, err = commands.run("train", *arguments)  # nothing has been trained by this call
    assert code == BAD_INPUT and "data.path=/no/such/corpus" in err


def test_a_second_run_in_a_directory_without_checkpoints_is_refused_at_its_start(corpus, tmp_path):
    shared = dict(run__steps=100_000, checkpoint__every_steps=100_000, checkpoint__dir=tmp_path / "disk")
    first = commands.Command("train", *small_overrides(corpus, tmp_path / "a", **shared))
    metrics = tmp_path / "a/default/metrics.jsonl"
    while first.is_running and not (metrics.is_file() and metrics.read_bytes()):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    code, _, err = commands.run("train", *small_overrides(corpus, tmp_path / "b", **shared), "run.stop_at_step=1")
    assert code == BAD_INPUT and f"belongs to the run in {tmp_path}/a/default" in err, err
    assert not (tmp_path / "b/default").exists()
    code, _, err = commands.run("train", *small_overrides(corpus, tmp_path / "a", **shared), "run.stop_at_step=2")
    assert code == 0 and "afresh" in err, err


def test_data_that_vanish_in_training_end_the_run_with_the_code_of_another_try(corpus, tmp_path):
    """The configuration was accepted, so a launcher starts the run again; with `BAD_INPUT` it would not."""
    (tmp_path / "corpus").mkdir()
    shutil.copy(corpus, tmp_path / "corpus")
    code, _, err = commands.run("train", *small_overrides(corpus, tmp_path, run__steps=1, run__name="first"))
    assert code == 0, err
    streamed = dict(
        data__path=tmp_path / "corpus", data__stream="true", data__slab_mb=0.005, data__validation_fraction=0,
        data__tokenizer=tmp_path / "first" / "tokenizer.model", data__cache_dir=tmp_path / "slabs", run__steps=500,
    )  # fmt: skip
    metrics = tmp_path / "default" / "metrics.jsonl"
    command = commands.Command("train", *small_overrides(corpus, tmp_path, **streamed))
    while command.is_running and not (metrics.is_file() and metrics.read_bytes()):
        time.sleep(0.01)
    (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    code, err = command.wait(), command.stderr
    assert code == FAILED, err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "from the newest checkpoint" in error and str(tmp_path / "corpus") in error and "Traceback" not in err


def test_a_second_start_of_a_run_is_refused(corpus, tmp_path):
    arguments = small_overrides(corpus, tmp_path, run__steps=10_000)
    first = commands.Command("train", *arguments)
    while first.is_running and not (tmp_path / "default" / "metrics.jsonl").is_file():
        time.sleep(0.01)
    code, _, err = commands.run("train", *arguments)
    assert code == BAD_INPUT and err.count("\n") == 1 and "default is in use: process " in err, err
    # Another run directory, the same place for checkpoints.
    elsewhere = dict(run__steps=10_000, checkpoint__dir=tmp_path)
    code, _, err = commands.run("train", *small_overrides(corpus, tmp_path / "b", **elsewhere))
    assert code == BAD_INPUT and f"checkpoint.dir={tmp_path}: {tmp_path / 'default'} is in use" in err, err
    first.send_signal(signal.SIGTERM)
    assert first.wait() == REQUEUE


def test_checkpoints_that_are_not_mounted_stop_a_run_and_cost_no_history(corpus, tmp_path):
    arguments = small_overrides(corpus, tmp_path, run__steps=4, checkpoint__dir=tmp_path / "disk")
    code, _, err = commands.run("train", *arguments, "run.stop_at_step=3")
    assert code == 0, err
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    before = (tmp_path / "default" / "metrics.jsonl").read_bytes()
    code, _, err = commands.run("train", *arguments)
    assert code == BAD_INPUT and "has been saved at step 3" in err and "resume=never" in err
    assert (tmp_path / "default" / "metrics.jsonl").read_bytes() == before and not (tmp_path / "disk").exists()
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    code, _, err = commands.run("train", *arguments)
    assert code == 0 and "at step 3" in err
    assert (tmp_path / "default" / "metrics.jsonl").read_bytes().startswith(before)
    code, _, err = commands.run("train", *arguments, "resume=never")
    assert code == 0 and "afresh" in err
    aside = read_records(tmp_path / "default" / SUPERSEDED)
    assert {r["step"] for r in aside if "loss" in r} == {1, 2, 3, 4}


def test_help_and_cfg_are_useful():
    for flag, wanted in (
        ("--help", ["Pretrain a decoder", "model: ", "torchrun", "seq_len: 2048"]),
        ("--cfg=job", ["chunk_size: 8", "every_steps: 60"]),
    ):
        shown = subprocess.run(
            [sys.executable, "-m", "train", *flag.split("=")], cwd=ROOT, text=True, capture_output=True
        )
        assert shown.returncode == 0, shown.stderr
        for text in wanted:
            assert text in shown.stdout


STEPS = 24


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    code, out, err = commands.run("train", *small_overrides(corpus, root, run__steps=STEPS, logging__wandb="offline"))
    assert code == 0, err
    return out, root / "default"


def test_what_a_run_leaves_behind(undisturbed):
    out, directory = undisturbed
    records = read_records(directory / "metrics.jsonl")
    assert {"step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "step_seconds"} <= records[0].keys()
    for name in ("config.yaml", "loss.png", "tokenizer.model", "checkpoints/step-00000024/manifest.json"):
        assert (directory / name).stat().st_size > 0
    assert list((directory / "wandb").glob("offline-run-*/*.wandb"))
    assert yaml.safe_load((directory / "config.yaml").read_text())["model"]["vocab_size"] > 256
    for text in ("Step 24 of 24", "metrics.jsonl", "run.steps=48", "model.chunk_size=8", "python -m train.generate"):
        assert text in out


def test_loss_picture_is_not_blank(undisturbed):
    from matplotlib import pyplot

    pixels = pyplot.imread(undisturbed[1] / "loss.png")[..., :3]
    assert len({tuple(p) for p in pixels.reshape(-1, 3)[::7].round(2).tolist()}) > 20


def test_a_signal_saves_and_asks_to_be_requeued(corpus, tmp_path, undisturbed):
    arguments = small_overrides(corpus, tmp_path, run__steps=STEPS, logging__wandb="off")
    command = commands.Command("train", *arguments)
    metrics = tmp_path / "default" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while len(read_records(metrics)) < 3 and time.monotonic() < deadline and command.is_running:
        time.sleep(0.01)
    command.send_signal(signal.SIGUSR1)
    assert command.wait() == REQUEUE, command.stderr
    assert "asked to stop (SIGUSR1)" in command.stderr
    stopped_at = read_records(metrics)[-1]["step"]
    assert 3 <= stopped_at < STEPS
    assert (tmp_path / "default" / "checkpoints" / f"step-{stopped_at:08d}" / "manifest.json").is_file()
    code, _, err = commands.run("train", *arguments)
    assert code == 0, err
    assert f"at step {stopped_at}" in err
    assert losses(read_records(metrics)) == losses(read_records(undisturbed[1] / "metrics.jsonl"))


def test_ctrl_c_while_it_trains_is_one_line(corpus, tmp_path):
    changes = dict(run__steps=100_000, checkpoint__every_steps=1)
    command = commands.Command("train", *small_overrides(corpus, tmp_path, **changes))
    metrics = tmp_path / "default/metrics.jsonl"
    while command.is_running and len(read_records(metrics)) < 3:
        time.sleep(0.01)
    command.send_signal(signal.SIGINT)
    assert command.wait() == 128 + signal.SIGINT
    assert "Traceback" not in command.stderr
    assert command.stderr.rstrip().endswith("stopped by SIGINT; the same command goes on from the newest checkpoint")


def test_time_limit_does_the_same(corpus, tmp_path):
    code, _, err = commands.run("train", *small_overrides(corpus, tmp_path, run__steps=100000, run__max_minutes=0.01))
    assert code == REQUEUE and "asked to stop (run.max_minutes)" in err


def test_a_run_that_diverges_has_an_exit_code_of_its_own(corpus, tmp_path):
    """It was started, so it is not bad input; its checkpoints are kept, and the error is one line."""
    arguments = small_overrides(
        corpus,
        tmp_path,
        run__steps=20,
        optim__lr=1e30,
        run__max_bad_steps=2,
        checkpoint__every_steps=1,
        checkpoint__keep_last=9,
    )
    code, _, err = commands.run("train", *arguments)
    assert code == DIVERGED, err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "was not finite in each of the steps" in error and "run.skip_samples=[[" in error
    assert (tmp_path / "default" / "checkpoints" / "step-00000001" / "manifest.json").is_file()


def test_torchrun(corpus, tmp_path, undisturbed):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        "-m",
        "train",
    )
    process = start(
        small_overrides(corpus, tmp_path, run__steps=5, parallel__tensor=2, parallel__sequence="true"),
        launcher,
        env=environment,
    )
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.count("Step 5 of 5") == 1
    options = "--nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0"
    assert f"train for more steps     torchrun {options} -m train " in out
    # The schedule depends on the number of steps, so compare the first, before any update.
    mine, want = (read_records(d / "metrics.jsonl")[0]["loss"] for d in (tmp_path / "default", undisturbed[1]))
    assert mine == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    "variables, message",
    [
        (dict(SLURM_NTASKS="2", SLURM_PROCID="1"), "srun has started 2 tasks"),
        (dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0"), "without RANK and WORLD_SIZE each would train"),
        (dict(RANK="x", WORLD_SIZE="2"), "RANK='x' in the environment must be a whole number"),
    ],
    ids=str,
)
def test_tasks_that_do_not_know_each_other(monkeypatch, capsys, tmp_path, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert message in refused(monkeypatch, capsys, f"run.root={tmp_path}")
    assert not (tmp_path / "default").exists()


def test_a_signal_during_preparation_is_answered(corpus, tmp_path):
    slow = tmp_path / "slow.jsonl"
    slow.write_text(json.dumps({"text": "some words of a document " * 300_000}) + "\n")
    arguments = small_overrides(slow, tmp_path / "runs", data__cache_dir=tmp_path / "cache", data__vocab_size=8000)
    command = commands.Command("train", *arguments)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*")) and time.monotonic() < deadline and command.is_running:
        time.sleep(0.01)
    command.send_signal(signal.SIGTERM)
    assert command.wait() == REQUEUE, command.stderr
    assert "asked to stop (SIGTERM) before the first step: nothing to save; start again" in command.stderr


def test_a_schedule_that_does_not_fit_is_said(corpus, tmp_path):
    code, _, err = commands.run(
        "train", *small_overrides(corpus, tmp_path, optim__warmup_steps=20, optim__decay_steps=80)
    )
    assert code == 0, err
    assert "optim.warmup_steps=20 and optim.decay_steps=80 do not fit into run.steps=5" in err
    assert "warms up and decays over 1 and 4 steps" in err
    rates = [r["lr"] for r in read_records(tmp_path / "default/metrics.jsonl") if "lr" in r]
    assert rates == pytest.approx([0.01, 0.00775, 0.0055, 0.00325, 0.001])


@pytest.mark.parametrize(
    "word, advice",
    [
        ("run.root=~/runs", """as text it is written 'run.root="~/runs"'"""),
        ("data.path=a(b", """as text it is written 'data.path="a(b"'"""),
        ('data.path=it"s', """as text it is written 'data.path='"'"'it"s'"'"''"""),
        ("data.path=a,b.jsonl", """as one text it is written 'data.path="a,b.jsonl"'; to run each of them, add -m"""),
        ("data.path=\udcc3\udca9", "no text in the encoding of this locale; set LC_ALL=C.UTF-8"),
        ("optim.betas=[0.9,0.95", "optim.betas=[0.9,0.95 cannot be read"),
    ],
)
def test_a_value_that_the_grammar_does_not_take_is_quoted_for_the_user(monkeypatch, capsys, word, advice):
    said = refused(monkeypatch, capsys, word)
    assert advice in said and "Exception" not in said


def test_points_of_a_multirun_with_one_name_are_refused(monkeypatch, capsys, corpus, tmp_path):
    """The second would go on in the directory of the first."""
    words = small_overrides(corpus, tmp_path, data__text_key="a/b,a_b", run__steps=2)
    said = refused(monkeypatch, capsys, "-m", *words)
    assert "data.text_key=a/b and data.text_key=a_b would both be run data.text_key=a_b" in said
    assert not list(tmp_path.iterdir())


def test_a_home_directory_is_meant_by_a_tilde(monkeypatch, corpus, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"run": {"root": "~/runs"}, "checkpoint": {"dir": "~/saved"}, "resume": "~/one", "init_from": "hf:~/two"}
    data = {name: f"~/{name}" for name in ("path", "validation_path", "tokenizer", "cache_dir")}
    values |= {"data": {"source": "jsonl", **data}, "seq_len": 64, "model": BASE["model"]}
    config = from_mapping(TrainConfig, values)
    assert config.run.directory == tmp_path / "runs" / "default"
    assert (config.checkpoint.dir, config.resume) == (f"{tmp_path}/saved", f"{tmp_path}/one")
    assert config.init_from == f"hf:{tmp_path}/two"
    assert {name: getattr(config.data, name) for name in data} == {name: f"{tmp_path}/{name}" for name in data}
    corpora = [{"name": "a", "source": "jsonl", "path": "~/a", "validation_path": "~/b"}]
    mixture = from_mapping(DataConfig, {"source": "mixture", "tokenizer": "t", "corpora": corpora})
    assert (mixture.corpora[0].path, mixture.corpora[0].validation_path) == (f"{tmp_path}/a", f"{tmp_path}/b")


def test_a_reader_of_the_output_that_leaves_ends_no_run(corpus, tmp_path):
    """`python -m train ... | head -1`"""
    reading, writing = os.pipe()
    os.close(reading)
    arguments = small_overrides(corpus, tmp_path, run__steps=2, logging__wandb="off")
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *arguments], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err


def test_all_points_of_a_multirun_are_checked_before_the_first(corpus, tmp_path):
    process = start(["-m", *small_overrides(corpus, tmp_path, run__steps=2, model__chunk_size="4,7")])
    _, err = process.communicate(timeout=180)
    assert process.returncode == BAD_INPUT
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "model.chunk_size=7" in line and "is not a multiple of 7" in line and "no point was started" in line
    assert not (tmp_path / "default").exists()


def test_a_point_that_diverges_leaves_the_others(corpus, tmp_path):
    swept = small_overrides(corpus, tmp_path, run__steps=4, run__max_bad_steps=2, optim__lr="1e30,1e-2")
    process = start(["-m", *swept])
    _, err = process.communicate(timeout=180)
    assert process.returncode == DIVERGED, err
    assert "error: optim.lr=1e+30: loss or gradient was not finite" in err
    assert "error: 1 point(s) of the multirun failed" in err
    assert len(losses(read_records(tmp_path / "default/optim.lr=0.01/metrics.jsonl"))) == 4


def test_names_of_points_fit_into_a_directory():
    from train.__main__ import short_name

    assert short_name("model.chunk_size=4") == "model.chunk_size=4"
    one, other = (short_name("a=" + "é" * 200 + end) for end in "xy")
    assert len(one.encode()) <= 240 and one != other and one.startswith("a=éé")


def test_multirun_gives_every_point_its_own_directory(corpus, tmp_path):
    process = start(["-m", *small_overrides(corpus, tmp_path, run__steps=2, model__chunk_size="4,8")])
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert {p.name for p in (tmp_path / "default").iterdir()} == {"model.chunk_size=4", "model.chunk_size=8"}
    configs = sorted(tmp_path.rglob("config.yaml"))
    assert [yaml.safe_load(c.read_text())["model"]["chunk_size"] for c in configs] == [4, 8]
    assert all(len(losses(read_records(c.parent / "metrics.jsonl"))) == 2 for c in configs)


def generate(*arguments, stdin=""):
    code, out, err = commands.run("train.generate", *arguments, stdin=stdin)
    assert code == 0, err
    return out, err


def test_generate(undisturbed):
    out, err = generate(undisturbed[1], "prompt=def f(", "max_tokens=12", "seed=3")
    assert out.startswith("def f(") and "tokens/s" in err
    # The stream shows what decoding all at once gives, and a batch of two the same text for the same prompt.
    greedy, _ = generate(undisturbed[1], "prompt=def f(", "max_tokens=12", "temperature=0")
    both, _ = generate(undisturbed[1], "prompt=def f(", "prompt=class Point", "max_tokens=12", "temperature=0")
    assert both.startswith(greedy.rstrip("\n"))
    assert generate(undisturbed[1], "max_tokens=12", "temperature=0", stdin="def f(\n")[0] == greedy


def test_generate_refuses_bad_input(undisturbed, tmp_path):
    for arguments, message in [
        ([undisturbed[1], "promt=x"], "promt is not a configuration key; did you mean prompt?"),
        ([tmp_path, "prompt=x"], "is not the directory of a run"),
        ([undisturbed[1], "prompt=x", "top_p=0"], "top_p=0.0 above 0"),
        ([undisturbed[1], "prompt=x", "temperature=["], "temperature='[' must be a number"),
        ([undisturbed[1], "prompt=x", "seed=99999999999999999999"], "below 2^63"),
        ([undisturbed[1], "prompt=\udcff"], "holds bytes that are not UTF-8"),
    ]:
        code, _, err = commands.run("train.generate", *arguments)
        assert code == BAD_INPUT and message in err


def test_a_run_with_an_equals_sign_in_its_name_is_a_run(tmp_path, monkeypatch):
    """As every point of a multirun has: default/model.chunk_size=4."""
    from train import generate

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.chunk_size=4").mkdir()
    assert generate._parse(["model.chunk_size=4", "prompt=a=b"])[:2] == (Path("model.chunk_size=4"), ["a=b"])
    with pytest.raises(ConfigError, match="usage"):
        generate._parse(["prompt=a"])
