"""The loss kernels against plain torch: by Triton's interpreter on the CPU, for real on a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[test]'")

from ksa_model import loss
from ksa_model.ops import triton_loss

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def draw(rows, columns, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=generator) * 4).to(DEVICE)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::5] = loss.IGNORE_INDEX
    return logits, labels.to(DEVICE)


@pytest.mark.parametrize("rows, columns, valid", [(7, 96, 90), (3, 40, 40), (5, 9000, 8999)])
def test_whole_vocabulary(rows, columns, valid):
    logits, labels = draw(rows, columns, valid)
    exact = logits[:, :valid].double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, labels, ignore_index=loss.IGNORE_INDEX, reduction="sum")
    (want_grad,) = torch.autograd.grad(want, exact)
    logits[:, valid:] = float("nan")  # padding of the vocabulary may hold anything
    top, total, picked = triton_loss.statistics(logits, labels, valid, 0)
    log_total = top + total.log()
    got = ((log_total - picked) * (labels != loss.IGNORE_INDEX)).sum()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    triton_loss.gradient_(logits, labels, log_total, valid, 0, loss.IGNORE_INDEX)
    torch.testing.assert_close(logits[:, :valid].double(), want_grad, rtol=1e-4, atol=1e-5)
    assert (logits[:, valid:] == 0).all()


def test_a_vocabulary_in_shares():
    """Statistics of shares join to those of the whole, and each share's gradient is its columns of the whole's."""
    logits, labels = draw(6, 96, 90)
    whole = logits.clone()
    top, total, _ = triton_loss.statistics(whole, labels, 90, 0)
    triton_loss.gradient_(whole, labels, top + total.log(), 90, 0, loss.IGNORE_INDEX)
    shares = [logits[:, i : i + 48].contiguous() for i in (0, 48)]
    found = [triton_loss.statistics(x, labels, valid, first) for x, valid, first in zip(shares, (48, 42), (0, 48))]
    highest = torch.maximum(found[0][0], found[1][0])
    log_total = highest + sum(total * (top - highest).exp() for top, total, _ in found).log()
    picked = found[0][2] + found[1][2]
    kept = labels != loss.IGNORE_INDEX
    torch.testing.assert_close(picked[kept], logits.gather(1, labels.clamp(min=0)[:, None])[:, 0][kept])
    for share, valid, first in zip(shares, (48, 42), (0, 48)):
        triton_loss.gradient_(share, labels, log_total, valid, first, loss.IGNORE_INDEX)
        torch.testing.assert_close(share, whole[:, first : first + 48], rtol=1e-5, atol=1e-6)
