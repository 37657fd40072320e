"""Ranks that were started differently, that cannot write, or that fail alone: all end with one line about it."""

import os
import re
import time
from pathlib import Path

import pytest

from tests.ranks import free_port, run_on_ranks
from tests.train.runs import make_config, run_training
from train.config.errors import StartError
from train.config.schema import USER_ERRORS
from train.distributed import groups, same_start
from train.distributed.ranks import difference

RANK = "RANK"


def outcome(action):
    try:
        return action()
    except (*USER_ERRORS, StartError) as error:
        return f"{type(error).__name__}: {error}"


def train_differently(corpus, root, changes, of_rank_1):
    """Rank 1 is started with changes of its own."""
    if os.environ[RANK] == "1":
        changes = changes | of_rank_1
    return outcome(lambda: run_training(corpus, root, changes) and "trained")


@pytest.mark.parametrize(
    "own, said",
    [
        (dict(optim__lr=0.5), "optim.lr is 0.5 there and 0.01 on rank 0"),
        (dict(model__rope_base=5e4), "model.rope_base is 50000.0 there and 10000.0 on rank 0"),
        (dict(data__seed=3), "data.seed is 3 there and 0 on rank 0"),
        (dict(parallel__tensor=2), "parallel.tensor is 2 there and 1 on rank 0"),
        (dict(run__steps=9), "run.steps is 9 there and 5 on rank 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_ranks_with_other_settings_are_refused(corpus, tmp_path, own, said):
    got = run_on_ranks(2, train_differently, str(corpus), str(tmp_path), {}, own, timeout=60)
    for words in got:
        assert words.startswith("ConfigError: rank 1 on ") and said in words and "the same command" in words
    assert not (tmp_path / "default").exists()


def test_what_lies_elsewhere_on_a_host_is_the_same(corpus, tmp_path):
    """Each host has its copy of the data and its cache; what the data are decides."""
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    own = dict(data__path=str(copy), data__cache_dir=str(tmp_path / "cache"), run__max_minutes=9.0)
    changes = dict(run__steps=1)
    assert run_on_ranks(2, train_differently, str(corpus), str(tmp_path), changes, own) == ["trained"] * 2
    copy.write_bytes(b"\n".join(corpus.read_bytes().splitlines()[:50]))
    own["data__tokenizer"] = changes["data__tokenizer"] = str(tmp_path / "default/tokenizer.model")
    changes["run__name"] = "another"
    for words in run_on_ranks(2, train_differently, str(corpus), str(tmp_path), changes, own):
        assert "rank 1 on " in words and "data.fingerprint is" in words and "give every rank the same data" in words


def test_code_is_compared():
    config = make_config(Path("x"), Path("y"))
    facts = same_start.settings(config)
    assert len(facts["code"]) == 12 and "version of torch" in facts and "logging.wandb" not in facts
    assert facts["code"] == same_start.code_version()
    there = '["rank 1 on b", {"code": "older", "x": 1}]'
    assert difference(['["rank 0 on a", {"code": "newer", "x": 1}]', there], "advice") == (
        "rank 1 on b differs from rank 0: code is older there and newer on rank 0; advice"
    )


def slow_preparation(corpus, root, changes):
    """Rank 1 prepares its data longer than ranks wait for each other once they train."""
    import data_pipeline

    if os.environ[RANK] == "1":
        whole = data_pipeline.open_data
        data_pipeline.open_data = lambda *given, **named: (time.sleep(8), whole(*given, **named))[1]
    return outcome(lambda: run_training(corpus, root, changes) and "trained")


def test_preparation_is_waited_for_without_a_limit(corpus, tmp_path):
    changes = dict(run__steps=1, parallel__timeout_minutes=0.05)
    assert run_on_ranks(2, slow_preparation, str(corpus), str(tmp_path), changes) == ["trained"] * 2


def test_a_rank_that_fails_alone_ends_all_with_its_message(corpus, tmp_path):
    """Its data are missing on its host."""
    began = time.monotonic()
    own = dict(data__path=str(tmp_path / "missing.jsonl"))
    here, there = run_on_ranks(2, train_differently, str(corpus), str(tmp_path), {}, own, timeout=60)
    assert here.startswith("ConfigError: rank 1 on ") and "missing.jsonl" in here
    assert "missing.jsonl" in there and time.monotonic() - began < 40


def test_every_rank_must_write_to_one_place(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "one").mkdir()
    for name, dirs, said in (
        ("nobody", [tmp_path / "file/below"] * 2, r"rank 0 on .* cannot write below"),
        (
            "unmounted",
            [Path("/proc/nowhere")] * 2,
            r"checkpoint.dir=/proc/nowhere: rank 0 on .* cannot write below /proc",
        ),
    ):
        changes, own = (dict(checkpoint__dir=str(d), run__name=name) for d in dirs)
        for words in run_on_ranks(2, train_differently, str(corpus), str(tmp_path), changes, own, timeout=60):
            assert re.search(said, words), words
        assert not (tmp_path / name).exists()


def meet(timeout_minutes, size=None, wait=True):
    if os.environ[RANK] != "0" and not wait:
        return "absent"
    config = groups.ParallelConfig(timeout_minutes=timeout_minutes)
    return outcome(lambda: groups.rendezvous(config).size)


def test_ranks_that_do_not_come_are_counted():
    here, _ = run_on_ranks(2, meet, 0.02, None, False)
    assert here.startswith("StartError: MASTER_ADDR=127.0.0.1 MASTER_PORT=")
    assert "not all of WORLD_SIZE=2 ranks came within parallel.timeout_minutes=0.02" in here and "1/2" in here


def meet_at(port):
    os.environ["MASTER_PORT"] = str(port)
    return meet(0.1) if os.environ[RANK] == "0" else "absent"


def test_a_port_in_use_is_named():
    import socket

    with socket.socket() as taken:
        port = free_port()
        taken.bind(("", port))
        taken.listen()
        here, _ = run_on_ranks(2, meet_at, port)
    assert here.startswith(f"ConfigError: MASTER_PORT={port} is in use on 127.0.0.1") and "python -m launch" in here
