"""Attention weights of summaries against a dense softmax."""

import pytest
import torch

from ksa_model.layers.attention import Attention
from ksa_model.objectives.insight import summary_weights
from ksa_model.ops.attention import reference
from tests.ksa_model.ops.attention.test_joint import make_layout
from tests.ksa_model.test_model import build, random_text, small_config


@pytest.mark.parametrize("pattern, m", [("KSKF", 1), ("KSKF", 2), ("HSPF", 1)])
def test_weight_of_summaries_is_that_of_a_dense_softmax(world, pattern, m):
    config = small_config(layer_pattern=pattern, window_chunks=2, summary_tokens=m)
    decoder = build(world, config)
    pack = make_layout([150, 3, 391, 17], 4, m, 3)
    tokens, _ = random_text(pack)
    got = summary_weights(decoder, tokens, pack)
    heads_of = {}

    def mix(attention, heads, where):
        heads_of[attention.layer.index] = heads
        return Attention.core(attention, heads, where)

    with torch.no_grad():
        decoder.hidden(tokens, pack, mix)
    assert sorted(got) == [0, 2]
    far = reference.text_to_summary_mask(pack, 2)
    mask = torch.cat([reference.text_to_text_mask(pack, "K", 2), far], dim=1)
    chunk = torch.arange(pack.num_text) // 4
    back = chunk[:, None] - (torch.arange(pack.num_summary) // m)[None, :]
    for index, found in got.items():
        heads = heads_of[index]
        keys = torch.cat([heads.k, heads.k_summary]).repeat_interleave(2, dim=1)
        scores = torch.einsum("nhd,mhd->hnm", heads.q, keys) * 8**-0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num()[:, :, pack.num_text :].mean(0)
        for number in range(found.shape[1]):
            here = far & (back >= 1 << number) & (back < 2 << number)
            assert found[0, number].item() == pytest.approx((weights * here).sum().item(), abs=1e-3)
            assert found[1, number].item() == here.any(1).sum().item()
    assert got[0][1].sum() > 0
