"""fp8: the quantization kernel against its twin, GEMMs and gradients against bf16, which GEMMs run in fp8, training,
and wrong settings."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

from ksa_model.config import MemoryConfig, ModelConfigError
from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.model import Decoder
from ksa_model.ops import fp8, linear
from ksa_model.ops.backend import Backend
from ksa_model.ops.fp8 import Fp8Kernels
from ksa_model.ops.linear import Norm, Target, Weight
from tests.ksa_model.ops.attention.test_joint import make_layout
from tests.ksa_model.test_model import random_text, small_config
from tests.ranks import run_on_ranks
from tests.train.runs import losses, make_config, run_training, write_corpus
from train import dry_run
from train.config.errors import ConfigError
from train.config.schema import validate

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PACK = ([50, 3, 41, 17], 4, 1, 2)  # 32 chunks, so that two ranks share them


def draw(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


def error(got, want):
    """Relative, in the Frobenius norm."""
    return float((got.detach().float() - want.detach().float()).norm() / want.detach().float().norm())


def gradients(outputs, inputs):
    weights = [draw(*o.shape, seed=5 + i).detach() for i, o in enumerate(outputs)]
    return torch.autograd.grad(sum((o.float() * w.float()).sum() for o, w in zip(outputs, weights)), inputs)


def bf16_backend() -> Backend:
    return Backend(device=torch.empty(0, device=DEVICE).device, dtype=torch.bfloat16)


@pytest.fixture(params=[False, True], ids=["keeps rows", "recomputes them"])
def backend(request):
    """Keeps rows for backward, or recomputes them as on a GPU."""
    backend = bf16_backend()
    backend.recompute_in_backward = request.param or ON_GPU
    return backend


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rounds_right(monkeypatch):
    """Triton's interpreter loses the carry of a mantissa that rounds up to the next power of two."""
    if ON_GPU:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, before, after, mode):
        if after != tl.float8e4nv:
            return convert(values, before, after, mode)
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinity / infinity
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, size", [(1, 16), (6, 48), (37, 100), (8, 2000), (0, 8)])
def test_kernel_quantizes_as_its_twin(rounds_right, rows, size, dtype):
    triton_rows = pytest.importorskip("ksa_model.ops.triton_rows", reason="Triton is not installed")
    x = draw(rows, size, dtype=dtype).detach()
    factors = torch.tensor([1, 0, 1e37, 1e-38, 1e-5, 300], dtype=dtype, device=DEVICE)
    x *= factors[torch.arange(rows, device=DEVICE) % len(factors)][:, None]
    if rows > 7:
        x[6, 3], x[7, 0] = float("nan"), float("inf")
    values, scales = triton_rows.quantize_rows(x)
    want = fp8.plain_quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (rows, 1)
    torch.testing.assert_close(scales, want.scales, rtol=1e-6, atol=0, equal_nan=True)
    found, wanted = (v.float() * scales for v in (values, want.values))
    # A GPU divides to the last bit or two, which may tip a value over to its neighbour.
    torch.testing.assert_close(found, wanted, rtol=0.13 if ON_GPU else 0, atol=0, equal_nan=True)


def test_a_row_uses_the_whole_range():
    x = torch.stack([draw(64).detach(), draw(64).detach() * 1e30, torch.zeros(64, device=DEVICE).bfloat16()])
    values, scales = bf16_backend().fp8.quantize_rows(x)
    assert values.float().abs().amax(1).tolist() == [448, 448, 0]
    assert torch.isfinite(scales).all() and (scales > 0).all()
    torch.testing.assert_close(values.float() * scales, x.float(), rtol=2**-4, atol=1e-3 * float(x[0].abs().max()))


@pytest.mark.parametrize("rows", [1, 37, 256])
def test_gemm_has_the_error_of_e4m3(rows):
    x, weight = draw(rows, 512).detach(), draw(96, 512, seed=1).detach()
    x *= torch.logspace(-6, 6, rows, device=DEVICE)[:, None]  # a scale for each row makes this free
    quantize_rows, gemm = bf16_backend().fp8
    got = gemm(quantize_rows(x), quantize_rows(weight), False)
    assert got.dtype == torch.bfloat16
    each = [error(a, b) for a, b in zip(got, x.float() @ weight.float().t())]
    assert 1e-2 < sum(each) / rows <= 4e-2


@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="torch is older than 2.10")
@pytest.mark.parametrize("fast_accumulation", [False, True])
def test_torchs_gemm_is_the_twins(fast_accumulation):
    quantize_rows = bf16_backend().fp8.quantize_rows
    x, weight = quantize_rows(draw(37, 64).detach()), quantize_rows(draw(48, 64, seed=1).detach())
    got, want = fp8.scaled_gemm(x, weight, fast_accumulation), fp8.plain_gemm(x, weight)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-2)


SPANS = [[(0, 70), (0, 70), (70, 100), (0, 70), (70, 100)], [(0, 100), (0, 100)], [(20, 50)]]


@pytest.mark.parametrize("spans", SPANS, ids=["both streams", "all rows", "rows that nobody asks for"])
def test_project(backend, spans):
    x, gain = draw(100, 64), draw(64, seed=1)
    weights = [draw(32, 64, seed=2 + i) for i in range(len(spans))]
    found, wanted = (
        linear.project(
            backend, x, Norm(gain, 1e-6), [Target(*span, Weight(w, in_fp8)) for span, w in zip(spans, weights)]
        )
        for in_fp8 in (True, False)
    )
    for a, b in zip(found, wanted, strict=True):
        assert 1e-2 < error(a, b) < 5e-2
    got, want = gradients(found, [x, *weights]), gradients(wanted, [x, *weights])
    assert 1e-2 < error(got[0], want[0]) < 5e-2
    for a, b in zip(got[1:], want[1:]):
        assert torch.equal(a, b), "the gradient of a weight is a 16-bit GEMM"


def test_biases_stay_in_16_bits(backend):
    x, weight, bias = draw(40, 64), draw(32, 64, seed=1), (100 * draw(32, seed=2)).detach().requires_grad_()
    (found,) = linear.project(backend, x, None, [Target(0, 40, Weight(weight, True, bias))])
    (plain,) = linear.project(backend, x, None, [Target(0, 40, Weight(weight, True))])
    torch.testing.assert_close(found, plain + bias)
    given = draw(40, 32, seed=3).detach()
    found.backward(given)
    assert bias.grad is not None and torch.equal(bias.grad, given.sum(0))


def test_one_target_in_fp8_and_another_in_bf16(backend):
    x, wide, narrow = draw(20, 64), draw(32, 64, seed=1), draw(3, 64, seed=2)
    targets = [Target(0, 20, Weight(wide, True)), Target(0, 20, Weight(narrow))]
    first, second = linear.project(backend, x, None, targets)
    assert torch.equal(second, x @ narrow.t()) and 1e-2 < error(first, x @ wide.t()) < 5e-2
    (got,) = gradients([first, second], [x])
    (want,) = gradients([x @ wide.t(), x @ narrow.t()], [x])
    assert 5e-3 < error(got, want) < 5e-2


@pytest.mark.parametrize("residual", [False, True])
def test_gated_mlp(backend, residual):
    x, gain = draw(90, 64), draw(64, seed=1)
    shapes = (96, 64), (96, 64), (64, 96)
    gate, up, down = ((draw(*shape, seed=2 + i) / 8).detach().requires_grad_() for i, shape in enumerate(shapes))
    inputs, outs = [x, gain, gate, up, down], []
    for in_fp8 in (True, False):
        parts = linear.gated(backend, x, Norm(gain, 1e-6), Weight(gate, in_fp8), Weight(up, in_fp8))
        outs.append(linear.add_gated_gemm(backend, x if residual else None, parts, Weight(down, in_fp8)))
    assert 1e-2 < error(*outs) < 8e-2
    for got, want in zip(gradients(outs[:1], inputs), gradients(outs[1:], inputs)):
        assert 1e-2 < error(got, want) < 0.1  # through three GEMMs each


def test_frozen_weights_and_fp32_sums(backend):
    """`main_grad` accumulates the same values as in bf16."""
    x, frozen, weight = draw(50, 32), draw(16, 32, seed=1), draw(16, 32, seed=2)
    frozen.requires_grad_(False)
    weight.main_grad = torch.ones(16, 32, device=DEVICE)
    for in_fp8, shift in ((True, 1), (False, -1)):  # the second takes back what the first adds
        targets = [Target(0, 50, Weight(matrix, in_fp8)) for matrix in (frozen, weight)]
        outs = linear.project(backend, x, None, targets)
        torch.autograd.backward(outs, [shift * draw(50, 16, seed=5 + i).detach() for i in range(2)])
        assert weight.grad_added_to_main_grad and (weight.main_grad != 1).any() == (shift == 1)
    assert frozen.grad is None and weight.grad is None


# -- the model --------------------------------------------------------------------------------------------------------


def decoder(world, in_fp8, pattern="KSCF", memory=None, seed=0):
    torch.manual_seed(seed)
    tp = TensorParallel(world.tensor_group, dtype=torch.bfloat16)
    return Decoder(small_config(layer_pattern=pattern), tp, memory=memory, fp8=in_fp8)


@contextlib.contextmanager
def quantized(model):
    """The names of the parameters that are quantized meanwhile, one for each time."""
    model.backend.select_for(model.embedding.weight)
    names = {p.data_ptr(): name for name, p in model.named_parameters()}
    quantize_rows, gemm = kernels = model.backend.fp8
    seen: list[str] = []

    def watched(x):
        seen.extend([names[x.data_ptr()]] if x.data_ptr() in names else [])
        return quantize_rows(x)

    model.backend.fp8 = Fp8Kernels(watched, gemm)
    yield seen
    model.backend.fp8 = kernels


@pytest.mark.parametrize("pattern", ["KKSC", "KGKF", "HPSF"])
def test_what_runs_in_fp8(world, pattern):
    """Every matrix of the blocks, in both directions, except the small ones: beta and decay of gated delta nets, and
    the scores of learned pooling; nothing else."""
    model, pack = decoder(world, True, pattern), make_layout(*PACK)
    with quantized(model) as seen:
        loss = model(*random_text(pack), pack)
        forward = list(seen)
        loss.backward()
    matrices = {
        name
        for name, p in model.named_parameters()
        if name.startswith("blocks.")
        and p.dim() == 2
        and not name.endswith(("beta.weight", "decay.weight", "pool_score.weight"))
    }
    assert sorted(forward) == sorted(matrices) and sorted(seen) == sorted(2 * list(matrices))
    assert any("summary_query" in name for name in matrices) == ("K" in pattern)


def test_shared_rows_are_quantized_once():
    sizes: list[int] = []
    backend = bf16_backend()
    quantize, gemm = backend.fp8
    backend.fp8 = Fp8Kernels(lambda x: sizes.append(len(x)) or quantize(x), gemm)
    x, weights = draw(50, 32), [Weight(draw(16, 32, seed=i), True) for i in range(3)]
    linear.project(backend, x, None, [*(Target(0, 40, weight) for weight in weights), Target(40, 50, weights[0])])
    assert sizes.count(40) == 1 and sizes.count(10) == 1 and sizes.count(16) == 4 and len(sizes) == 6


def test_without_gradients_nothing_runs_in_fp8(world):
    pack = make_layout(*PACK)
    in_fp8, plain = decoder(world, True), decoder(world, False)
    text = random_text(pack)
    with torch.no_grad():
        assert torch.equal(in_fp8(*text, pack), plain(*text, pack))
        assert torch.equal(in_fp8.logits(text[0], pack), plain.logits(text[0], pack))
    found, want = (float(model(*text, pack).detach()) for model in (in_fp8, plain))
    assert found != want and found == pytest.approx(want, rel=1e-2)
    assert in_fp8.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    "memory", [MemoryConfig("full"), MemoryConfig("selective"), MemoryConfig(mlp_rows=24)], ids=str
)
def test_what_is_recomputed_is_the_same(world, memory):
    pack, found = make_layout(*PACK), []
    for kept in (MemoryConfig(), memory):
        model = decoder(world, True, memory=kept)
        loss = model(*random_text(pack), pack)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (want, wanted), (got, grads) = found
    assert torch.equal(got, want)
    for name, grad in grads.items():  # a slice's weight gradients are rounded before they are added up
        assert error(grad, wanted[name]) <= (1e-2 if memory.mlp_rows else 0), name


def on_a_rank(tensor: int, sequence: bool, in_fp8: bool) -> dict:
    from train.distributed import groups

    config = small_config(num_kv_heads=4, vocab_multiple=32)
    world = groups.initialize(groups.ParallelConfig(tensor=tensor, sequence=sequence), torch.device("cpu"))
    torch.manual_seed(0)
    model = Decoder(config, TensorParallel(world.tensor_group, sequence, torch.bfloat16), fp8=in_fp8)
    pack = make_layout(*PACK)
    with quantized(model) as seen:
        loss = model(*random_text(pack), pack)
        loss.backward()
    dims = {
        name: p.partition_dim if getattr(p, "tensor_model_parallel", False) else None
        for name, p in model.named_parameters()
    }
    return {
        "loss": float(loss.detach()),
        "quantized": sorted(seen),
        "gradients": {name: (dims[name], p.grad) for name, p in model.named_parameters()},
    }


def test_tensor_parallelism_stays_within_the_error_of_fp8():
    (plain,), (one,) = (run_on_ranks(1, on_a_rank, 1, False, in_fp8) for in_fp8 in (False, True))
    ranks = run_on_ranks(2, on_a_rank, 2, True, True)
    assert one["loss"] != plain["loss"] and one["quantized"] and not plain["quantized"]
    for rank in ranks:
        assert rank["quantized"] == one["quantized"]
        assert rank["loss"] == pytest.approx(one["loss"], rel=1e-3)
    for name, (_, want) in one["gradients"].items():
        dim, shares = ranks[0]["gradients"][name][0], [rank["gradients"][name][1] for rank in ranks]
        for got in shares if dim is None else [torch.cat(shares, dim)]:
            assert error(got, want) < 0.15, name


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


RUN = dict(run__precision="bf16", run__steps=24, optim__decay_steps=8, run__eval_every=24)


def test_losses_stay_within_two_percent(corpus, tmp_path):
    found = {
        precision: run_on_ranks(1, run_training, corpus, tmp_path / precision, RUN | dict(perf__precision=precision))[0]
        for precision in ("fp8", "bf16")
    }
    in_fp8, plain = losses(found["fp8"]), losses(found["bf16"])
    assert len(in_fp8) == 24 and in_fp8 != plain
    assert in_fp8 == pytest.approx(plain, rel=0.02)
    assert plain[-1] < 0.9 * plain[0]
    assert any("validation_loss" in record for record in found["fp8"])


def test_precision_may_change_on_resume(corpus, tmp_path):
    for stop, precision in ((3, "bf16"), (6, "fp8"), (9, "bf16")):
        changes = RUN | dict(run__stop_at_step=stop, perf__precision=precision)
        (records,) = run_on_ranks(1, run_training, corpus, tmp_path, changes)
        assert [r["step"] for r in records if "loss" in r] == list(range(1, stop + 1))
    (plain,) = run_on_ranks(1, run_training, corpus, tmp_path / "plain", RUN | dict(run__stop_at_step=9))
    found, want = losses(records), losses(plain)
    assert found[:3] == want[:3] and found[3:] != want[3:] and found == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("changes, message", [
    (dict(perf__precision="int4"), r"perf.precision='int4' is not one of bf16, fp8"),
    (dict(run__precision="fp32"), r"perf.precision=fp8 .* run.precision=fp32 .* use run.precision=bf16"),
    (dict(model__ffn_size=72), r"model.ffn_size=72 gives 72; .* or perf.precision=bf16"),
    (dict(model__hidden_size=40), r"model.hidden_size=40 gives 40"),
    (dict(model__num_kv_heads=1), r"model.num_kv_heads=1 x model.head_dim=8 gives 8"),
    (dict(parallel__tensor=4), r"model.num_heads=4 x model.head_dim=8 over parallel.tensor=4 gives 8"),
], ids=str)  # fmt: skip
def test_wrong_settings(corpus, tmp_path, changes, message):
    changes = dict(run__precision="bf16", perf__precision="fp8") | changes
    with pytest.raises((ConfigError, ConfigError, ModelConfigError), match=message):
        validate(make_config(corpus, tmp_path, **changes), changes.get("parallel__tensor", 1))


def test_wrong_devices(monkeypatch, corpus, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ModelConfigError, match=r"needs a CUDA device of capability 8.9 .* A100 has 8.0; use perf"):
        fp8.check_device(torch.device("cuda"))
    fp8.check_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delattr(F, "scaled_mm", raising=False)
    with pytest.raises(ModelConfigError, match=r"needs torch 2.10 or newer, and this is"):
        fp8.check_device(torch.device("cuda"))
    config = make_config(
        corpus, tmp_path, run__precision="bf16", perf__precision="fp8", model__vocab_size=400, parallel__zero=1
    )
    with pytest.raises(ConfigError, match=r"dry_run_gpu=a100-80gb has no FP8 GEMMs for perf.precision=fp8; use"):
        dry_run.describe(config, 1, "a100-80gb")
    assert "bf16, GEMMs in fp8" in dry_run.describe(config, 1, "h100-80gb")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [5, 1000, 18_432])
def test_gemms_on_a_gpu(rows):
    quantize_rows, gemm = bf16_backend().fp8
    x, weight = draw(rows, 2048).detach(), draw(6144, 2048, seed=1).detach()
    x8, weight8 = quantize_rows(x), quantize_rows(weight)
    want = fp8.plain_gemm(x8, weight8)
    for fast_accumulation in (False, True):
        assert error(gemm(x8, weight8, fast_accumulation), want) < 5e-3
    assert 1e-2 < error(want, x.float() @ weight.float().t()) < 4e-2
    grad = draw(rows, 6144, seed=2).detach()
    got = gemm(quantize_rows(grad), quantize_rows(weight.t()), False)
    assert 1e-2 < error(got, grad.float() @ weight.float()) < 4e-2
