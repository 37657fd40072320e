"""A profile's files and table, and that work is counted to the part of the model that asked for it."""

import contextlib
import gzip
import io
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tests.ranks import run_on_ranks
from tests.train.runs import make_config, write_corpus
from train.config.errors import ConfigError
from train.distributed.engine import PART_PREFIX
from train.logs.profiling import StepProfiler, time_by_part
from train.trainer import train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def profiled(corpus, root, pattern):
    """The run's directory and what it printed."""
    settings = dict(perf__profile=True, perf__profile_after=1, perf__profile_steps=2, model__layer_pattern=pattern)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run = train(make_config(corpus, root, memory__recompute="full", **settings))
    return run.directory, printed.getvalue()


@pytest.mark.parametrize("pattern, own", [
    ("KKKF", ("attention: near and far", "projections (K layers)")),
    ("HPHF", ("attention: H layers", "attention: P layers", "projections (H layers)", "pooling of chunks")),
])  # fmt: skip
def test_a_run_leaves_trace_and_table(pattern, own, corpus, tmp_path):
    ((run, printed),) = run_on_ranks(1, profiled, corpus, tmp_path, pattern)
    events = json.loads(gzip.open(run / "profile/trace-rank0.json.gz").read())["traceEvents"]
    assert sum(e.get("name") == "part: optimizer" for e in events) == 2
    table = (run / "profile/parts.txt").read_text()
    assert table in printed and "mean of 2" in table
    shares = {line[2:54].strip(): float(line.split()[-2]) for line in table.splitlines()[2:]}
    for part in ("MLP", *own, "attention: F layers", "loss", "optimizer", "projections (F layers)", "norms, rotation",
                 "data"):  # fmt: skip
        assert shares[part] > 0, part
    assert shares.get("other", 0) < 25 and 50 < sum(shares.values()) < 250  # two threads work at once in backward


def test_backward_is_counted_where_forward_was():
    weight, x = torch.randn(300, 300, requires_grad=True), torch.randn(4000, 300)
    with profile(activities=[ProfilerActivity.CPU]) as taken:
        with record_function(PART_PREFIX + "large"):
            large = (x @ weight).sin()
        with record_function(PART_PREFIX + "small"):
            small = x[:40] @ weight
        (large.sum() + small.sum()).backward()
    found = time_by_part(taken.events(), on_device=False)
    events = taken.events()
    # The products, forward and backward, and the sine are almost all there is, and almost all of it is the large one's.
    assert found["large"] > 0.7 * sum(found.values()) > 5 * found["small"] > 0
    products = [e.self_cpu_time_total * 1e-6 for e in events if e.name == "aten::mm"]
    assert len(products) == 4 and found["large"] + found["small"] >= sum(products)


def test_without_a_profile_nothing_happens(world, tmp_path):
    from train.config.sections import PerfConfig

    profiler = StepProfiler(PerfConfig(), torch.nn.Linear(2, 2), world, tmp_path)
    for _ in range(6):
        with profiler.step(), profiler.range("data"):
            pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"perf\.profile_steps=0 must be at least 1"):
        PerfConfig(profile_steps=0)
