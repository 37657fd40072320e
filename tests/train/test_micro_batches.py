"""How a step is divided into micro-batches changes nothing, and what they leave is added up in fp32."""

import dataclasses

import pytest
import torch

from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.model import Decoder
from tests.ranks import run_on_ranks
from tests.train.runs import make_config, write_corpus
from train import build
from train.batches import batch_maker
from train.logs.metrics import read_records
from train.trainer import train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def train_all(corpus, root, numbers):
    """Loss, gradient norm and tokens of every step, for each number of samples in a micro-batch."""
    found = {}
    for joined in numbers:
        config = make_config(corpus, root / str(joined), run__samples_per_micro_batch=joined)
        records = read_records(train(config).directory / "metrics.jsonl")
        found[joined] = [(r["loss"], r["grad_norm"], r["tokens"]) for r in records if "loss" in r]
    return found


def test_joined_samples_train_the_same_model(corpus, tmp_path):
    (found,) = run_on_ranks(1, train_all, corpus, tmp_path, (1, 2, 4))
    for joined in (1, 2, 4):
        assert len(found[joined]) == 5
    for joined in (2, 4):
        for one, other in zip(found[1], found[joined]):
            assert one == pytest.approx(other, rel=1e-5)


def test_bf16_gradients_add_up_in_fp32(corpus, tmp_path, world):
    """Three micro-batches through the engine, against plain gradients of each, which autograd makes in bf16."""
    from data_pipeline import open_data

    config = make_config(corpus, tmp_path, run__precision="bf16", run__samples_per_step=4)
    data = open_data(config.data)
    config = dataclasses.replace(config, model=build.with_vocabulary(config.model, data.vocab_size))
    engine = build.build_engine(config, world)
    samples, make = data.samples("train", config.seq_len, config.alignment), batch_maker(config.model)
    batches = [make(samples.at(i)) for i in range(3)]
    plain = Decoder(config.model, TensorParallel(world.tensor_group, dtype=torch.bfloat16))
    plain.load_state_dict(engine.module.state_dict())
    parameters = dict(plain.named_parameters())
    want = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    for batch in batches:
        loss = plain(batch.tokens, batch.labels, batch.layout)
        for name, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values()))):
            want[name] += grad
        engine.backward(engine(batch.tokens, batch.labels, batch.layout) * 1.0)
    for name, parameter in engine.named_parameters():
        assert parameter.grad is None, name
        scale = want[name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(parameter.main_grad / scale, want[name] / scale, rtol=0, atol=1e-6)
    before = {name: parameter.detach().clone() for name, parameter in engine.named_parameters()}
    engine.backward(engine(batches[0].tokens, batches[0].labels, batches[0].layout) * 1.0)
    engine.step(lr=1e-2)
    assert all(not torch.equal(before[name], p) for name, p in engine.named_parameters())
    assert all(not p.main_grad.any() for _, p in engine.named_parameters()), "sums are cleared by a step"
