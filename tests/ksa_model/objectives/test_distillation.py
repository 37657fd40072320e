"""Distillation and annealing against plain computations of the same losses."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ksa_model.config import MemoryConfig
from ksa_model.layers.attention import Attention
from ksa_model.loss import IGNORE_INDEX
from ksa_model.objectives.distillation import Distillation
from tests.ksa_model.ops.attention.test_joint import make_layout
from tests.ksa_model.test_model import build, random_text, small_config
from tests.ranks import run_on_ranks

PACK = ([50, 3, 41, 17], 4, 2, 2)


def changed_config(**changes):
    return small_config(**(dict(num_kv_heads=4, summary_tokens=2, vocab_multiple=32, layer_pattern="KSKF") | changes))


def assert_near(got, want, name):
    """Equal up to fp32 rounding, which a row with a small root mean square magnifies in single elements."""
    assert (got - want).norm() <= 1e-4 * want.norm() + 1e-6, (name, (got - want).norm(), want.norm())


def with_outputs(decoder, tokens, pack):
    """The logits of every row, and the output of each attention sub-layer."""
    outputs = []
    modules = [m for m in decoder.modules() if isinstance(m, Attention)]
    handles = [
        m.register_forward_hook(lambda module, given, mixed: outputs.append(mixed @ module.output.weight.t()))
        for m in modules
    ]
    logits = decoder.logits(tokens, pack)
    for handle in handles:
        handle.remove()
    return logits, outputs


def plain_loss(student, weights, tokens, labels, pack):
    """The three losses written out, with a separate full-attention model as the teacher."""
    config = student.config
    settings = {name: getattr(config, name) for name in type(config).__dataclass_fields__} | {"layer_pattern": "F"}
    from ksa_model.model import Decoder

    teacher = Decoder(type(config)(**settings), student.tp)
    own = dict(student.named_parameters())
    teacher.load_state_dict({name: own[name].detach() for name, _ in teacher.named_parameters()})
    with torch.no_grad():
        taught, taught_outputs = with_outputs(teacher, tokens, pack)
    logits, outputs = with_outputs(student, tokens, pack)
    kept = labels != IGNORE_INDEX
    lm = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    p, log_p = taught[kept].softmax(-1), logits[kept].log_softmax(-1)
    kl = (p * (p.log() - log_p)).sum()
    gaps = []
    for mine, theirs in zip(outputs, taught_outputs, strict=True):
        mine, theirs = mine[: pack.num_text][kept], theirs[kept]
        mine, theirs = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (mine, theirs))
        gaps.append((mine - theirs).square().mean(-1).sum())
    parts = torch.stack([lm, kl, sum(gaps) / len(gaps)])
    return parts @ torch.tensor(weights), parts.detach()


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True, independent_qkv=False)], ids=str)
@pytest.mark.parametrize("weights", [(1.0, 5.0, 5.0), (0.0, 2.0, 0.0), (0.0, 0.0, 3.0)], ids=str)
def test_losses_and_gradients_are_those_of_a_plain_computation(world, weights, changes):
    student = build(world, changed_config(**changes))
    pack = make_layout(*PACK)
    tokens, labels = random_text(pack)
    want, parts = plain_loss(student, weights, tokens, labels, pack)
    want.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    objective = Distillation(*weights)
    loss = student(tokens, labels, pack, objective)
    loss.backward()
    torch.testing.assert_close(loss, want)
    measured = objective.take().float()
    torch.testing.assert_close(measured[:2], parts[:2])
    assert weights[2] == 0 or measured[2] == pytest.approx(parts[2].item(), rel=1e-4)
    assert objective.take() is None
    for name, p in student.named_parameters():
        assert_near(p.grad, gradients[name], name)
    assert gradients["blocks.0.attention.summary_key.weight" if not changes else "summary_embedding"].abs().max() > 0


def test_the_teacher_gets_no_gradient_and_an_equal_student_has_nothing_to_learn(world):
    """Without K layers student and teacher are one function."""
    student = build(world, changed_config(layer_pattern="F"))
    pack = make_layout(*PACK)
    objective = Distillation(0.0, 1.0, 1.0)
    student(*random_text(pack), pack, objective).backward()
    assert objective.take()[1:].abs().max() < 1e-4
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-4


def on_a_rank(tensor: int, sequence: bool) -> dict:
    from ksa_model.layers.tensor_parallel import TensorParallel
    from ksa_model.model import Decoder
    from train.distributed import groups

    world = groups.initialize(groups.ParallelConfig(tensor=tensor, sequence=sequence), torch.device("cpu"))
    torch.manual_seed(0)
    decoder = Decoder(changed_config(), TensorParallel(world.tensor_group, sequence), memory=MemoryConfig("full"))
    pack = make_layout(*PACK)
    objective = Distillation()
    loss = decoder(*random_text(pack), pack, objective)
    loss.backward()
    shards = {
        name: (p.partition_dim if getattr(p, "tensor_model_parallel", False) else None, p.grad)
        for name, p in decoder.named_parameters()
    }
    return {"loss": loss.detach(), "parts": objective.take(), "gradients": shards}


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks_compute_the_same(sequence):
    (one,) = run_on_ranks(1, on_a_rank, 1, False)
    ranks = run_on_ranks(2, on_a_rank, 2, sequence)
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], one["loss"])
        torch.testing.assert_close(rank["parts"], one["parts"], rtol=1e-5, atol=1e-5)
    for name, (dim, want) in one["gradients"].items():
        shares = [rank["gradients"][name][1] for rank in ranks]
        got = shares[0] if ranks[0]["gradients"][name][0] is None else torch.cat(shares, dim=dim or 0)
        assert_near(got, want, name)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_annealing_goes_from_own_projections_to_those_of_text(world, qk_norm):
    config = changed_config(qk_norm=qk_norm)
    decoder, base = build(world, config), build(world, replace(config, independent_qkv=False), seed=1)
    own = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, p in base.named_parameters():
            p.copy_(own[name])
    pack = make_layout(*PACK)
    tokens, labels = random_text(pack)
    independent = decoder.logits(tokens, pack)
    decoder.anneal(1.0)
    assert torch.equal(decoder.logits(tokens, pack), independent)
    decoder.anneal(0.0)
    torch.testing.assert_close(decoder.logits(tokens, pack), base.logits(tokens, pack))
    assert not torch.allclose(decoder.logits(tokens, pack), independent, atol=1e-4)
    decoder(tokens, labels, pack).backward()
    assert own["blocks.0.attention.summary_key.weight"].grad.abs().max() == 0
    # Projections are linear, so a blend of outputs is a blend of weights, unless a norm comes before the blend.
    decoder.anneal(0.25)
    blended = decoder.logits(tokens, pack)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if ".summary_" in name:
                p.mul_(0.25).add_(own[name.replace(".summary_", ".")], alpha=0.75)
    decoder.anneal(1.0)
    folded = torch.allclose(decoder.logits(tokens, pack), blended, rtol=1e-4, atol=1e-5)
    assert folded == (not qk_norm)
