import random

from data_pipeline.text import cut
from data_pipeline.text.cut import cut_text
from tests.data_pipeline.conftest import blocks_of


def test_text_is_cut_alike_however_it_comes(monkeypatch):
    monkeypatch.setattr(cut, "PIECE_CHARACTERS", 50)
    rng = random.Random(1)
    for alphabet in ("ab \n", "abcdefgh ", "x"):
        for _ in range(50):
            text = "".join(rng.choices(alphabet, k=rng.randrange(400)))
            pieces = list(cut_text([text]))
            assert "".join(pieces) == text
            assert all(50 < len(piece) <= 100 for piece in pieces[:-1])
            sizes = iter(lambda: rng.randrange(1, 90), None)
            assert list(cut_text(blocks_of(text, sizes))) == pieces
