"""Annealing against a computation of the published rule that uses torch alone, in fp64, with masks from loops.

Legend: T text rows, S summary rows, R = T + S. The rule (arXiv 2604.24432): own and base projections of a summary are
each normed, then mixed with weight a, then rotated; values are mixed without a norm.
"""

import pytest
import torch

from ksa_model.config import MemoryConfig
from ksa_model.loss import IGNORE_INDEX
from tests.ksa_model.ops.attention.test_joint import make_layout
from tests.ksa_model.test_model import build, random_text, small_config

LENGTHS, CHUNK, WINDOW = [11, 4, 1, 13], 4, 1


class Rows:
    """Every row of documents that are padded to whole chunks: document, chunk in it, position, and which row may
    attend to which. Text comes first, then summaries, `m` for each chunk that has a token."""

    def __init__(self, m: int):
        text, summaries, number = [], [], 0
        for document, length in enumerate(LENGTHS):
            for start in range(0, length, CHUNK):
                tokens = min(CHUNK, length - start)
                for position in range(start, start + tokens):
                    text.append((number + position - start, document, start // CHUNK, position))
                for a in range(m):
                    position = max(start, start + ((a + 1) * tokens) // m - 1)
                    summaries.append((a, document, start // CHUNK, position))
                number += CHUNK
        self.row_in_pack = [row for row, *_ in text]
        self.summary_index = [a for a, *_ in summaries]
        self.positions = torch.tensor([row[3] for row in text + summaries])
        self.num_text, count = len(text), len(text) + len(summaries)
        self.windowed, self.full = torch.zeros(2, count, count, dtype=torch.bool)
        for i, (_, document, chunk, position) in enumerate(text):
            for j, (_, of, other, earlier) in enumerate(text):
                causal = of == document and earlier <= position
                self.full[i, j] = causal
                self.windowed[i, j] = causal and other >= chunk - WINDOW
            for j, (_, of, other, _) in enumerate(summaries, self.num_text):
                self.windowed[i, j] = of == document and other < chunk - WINDOW
        for i, (a, document, chunk, _) in enumerate(summaries, self.num_text):
            for j, (_, of, other, _) in enumerate(text):
                self.windowed[i, j] = self.full[i, j] = (of, other) == (document, chunk)
            for j, (b, of, other, _) in enumerate(summaries, self.num_text):
                self.windowed[i, j] = self.full[i, j] = (of, other) == (document, chunk) and b <= a


def normed(x, gain, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain


def rotated(x, positions, base):
    """x [R, heads, d]: pairs of features as complex numbers, turned by position times frequency."""
    half = x.shape[-1] // 2
    turn = torch.exp(1j * positions[:, None, None] * base ** (-torch.arange(half, dtype=torch.float64) / half))
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def published_logits(p, config, tokens, a):
    """Logits of every token of the documents [T, vocabulary], from fp64 parameters `p` by name."""
    rows, eps, d = Rows(config.summary_tokens), config.norm_eps, config.head_dim
    text = slice(0, rows.num_text)
    x = torch.cat([p["embedding.weight"][tokens[rows.row_in_pack]], p["summary_embedding"][rows.summary_index]])
    for number, letter in enumerate(config.layer_pattern * (config.num_layers // len(config.layer_pattern))):
        w = {name.removeprefix(f"blocks.{number}."): value for name, value in p.items()}
        y = normed(x, w["attention_norm.weight"], eps)

        def projected(name, y=y, w=w):
            def of(weight):
                heads = (y @ w[f"attention.{weight}.weight"].T).unflatten(-1, (-1, d))
                if config.qk_norm and name != "value":
                    heads = normed(heads, w[f"attention.{name}_norm.weight"], eps)
                return heads

            base = of(name)
            if f"attention.summary_{name}.weight" not in w:
                return base
            own = of(f"summary_{name}")
            return torch.cat([base[text], (a * own + (1 - a) * base)[rows.num_text :]])

        q, k, v = projected("query"), projected("key"), projected("value")
        q, k = (rotated(heads, rows.positions, config.rope_base) for heads in (q, k))
        k, v = (heads.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for heads in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / d**0.5
        allowed = rows.windowed if letter == "K" else rows.full
        attention = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        x = x + torch.einsum("hij,jhd->ihd", attention, v).flatten(1) @ w["attention.output.weight"].T
        y = normed(x, w["mlp_norm.weight"], eps)
        gate, up = y @ w["mlp.gate.weight"].T, y @ w["mlp.up.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down.weight"].T
    logits = normed(x[text], p["norm.weight"], eps) @ p["head.weight"].T
    return logits[:, : config.vocab_size]


def uneven(decoder):
    """Norm gains that differ, and attention that depends on its keys: with gains of one, or equal scores, a wrong order
    of norm and mixture would hardly show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif "embedding" not in name:
                parameter.mul_(6)
    return decoder


def close(got, want, name):
    assert (got - want).norm() <= 2e-4 * want.norm() + 1e-6, (name, (got - want).norm(), want.norm())


CASES = [
    (pattern, m, qk_norm, a)
    for pattern, m in [("KKKF", 1), ("KFKK", 2)]
    for qk_norm in (True, False)
    for a in (0.0, 0.3, 1.0)
]


@pytest.mark.parametrize("pattern, m, qk_norm, a", CASES)
def test_logits_and_gradients_are_those_of_the_published_rule(world, pattern, m, qk_norm, a):
    config = small_config(layer_pattern=pattern, summary_tokens=m, qk_norm=qk_norm)
    decoder = uneven(build(world, config, memory=MemoryConfig("selective")))
    decoder.anneal(a)
    compare_with_the_published_rule(decoder, a)


@pytest.mark.parametrize("a", [0.3, 1.0])
def test_the_kernels_of_a_gpu_compute_the_published_rule(world, a):
    """Norms, rotation, and the launch for all heads of few rows, where no gradients are computed."""
    if torch.cuda.is_available():
        pytest.skip("runs on the CPU, in Triton's interpreter; tests/ksa_model/ops has the kernels on a GPU")
    triton_rows = pytest.importorskip("ksa_model.ops.triton_rows", reason="Triton is not installed")
    triton_gemv = pytest.importorskip("ksa_model.ops.triton_gemv", reason="Triton is not installed")
    decoder = uneven(build(world, small_config(summary_tokens=2)))
    decoder.backend.rows, decoder.backend.gemv = triton_rows, triton_gemv
    decoder.anneal(a)
    compare_with_the_published_rule(decoder, a)


def compare_with_the_published_rule(decoder, a):
    config, m = decoder.config, decoder.config.summary_tokens
    pack = make_layout(LENGTHS, CHUNK, m, 1)
    tokens, labels = random_text(pack)
    real = labels != IGNORE_INDEX

    p = {name: value.detach().double().requires_grad_() for name, value in decoder.named_parameters()}
    want = published_logits(p, config, tokens, a)
    torch.nn.functional.cross_entropy(want, labels[real], reduction="sum").backward()

    close(decoder.logits(tokens, pack)[real], want, "logits")
    with torch.no_grad():
        close(decoder.logits(tokens, pack)[real], want, "logits without gradients")
    decoder(tokens, labels, pack).backward()
    for name, parameter in decoder.named_parameters():
        of_rule = p[name].grad
        close(parameter.grad, torch.zeros_like(parameter) if of_rule is None else of_rule, name)
    own = p["blocks.0.attention.summary_key.weight"].grad
    assert (own.abs().max() > 1e-3) == (a > 0)
