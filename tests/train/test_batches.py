"""What MFU counts, against counts by hand: torchtitan's users met counts with another head dimension or window."""

import numpy as np
import pytest

from ksa_model.layout.sequence import build_layout
from tests.ksa_model.test_model import small_config
from train.batches import model_flops

LENGTH, VOCAB = 24, 64


@pytest.mark.parametrize(
    "pattern, pairs",
    [("F", LENGTH * (LENGTH + 1) // 2), ("S", sum(min(i + 1, 7) for i in range(LENGTH)))],
    ids=["full", "window"],
)
def test_flops_of_text_layers(pattern, pairs):
    """One causal document. The head dimension is not the hidden size over the heads."""
    h, heads, kv_heads, d, ffn, layers = 40, 4, 2, 6, 56, 2
    config = small_config(
        hidden_size=h, num_heads=heads, num_kv_heads=kv_heads, head_dim=d, ffn_size=ffn, num_layers=layers,
        layer_pattern=pattern, window_tokens=7, vocab_size=VOCAB, tie_embeddings=True,
    )  # fmt: skip
    pack = build_layout(np.array([0]), np.array([LENGTH]), LENGTH, config.chunk_size, config.summary_tokens)
    projections = h * heads * d + 2 * h * kv_heads * d + heads * d * h + 3 * h * ffn
    multiplications = LENGTH * (layers * projections + h * VOCAB) + layers * 2 * pairs * heads * d
    assert model_flops(config, pack) == 3 * 2 * multiplications  # backward takes twice the forward; a multiply-add is 2


def test_padding_and_other_documents_count_nothing():
    config = small_config(layer_pattern="F", vocab_size=VOCAB)
    k, m = config.chunk_size, config.summary_tokens
    alone = [model_flops(config, build_layout(np.array([0]), np.array([n]), 2 * k, k, m)) for n in (k, 3)]
    both = build_layout(np.array([0, k]), np.array([k, 3]), 8 * k, k, m)
    assert model_flops(config, both) == sum(alone)
