"""Draw docs/two_streams.png, the picture in the README: `python docs/draw_streams.py`.

The picture is computed from the layout itself, so it shows what the kernels do.
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import patches, pyplot

from ksa_model import layout, reference

K, WINDOW, TOKENS = 4, 1, 24
BLUE, RUST, GREY = "#3b6ea5", "#c2532d", "#d9d9d9"


def main() -> None:
    pack = layout.build(np.array([0]), np.array([TOKENS]), TOKENS, K)
    near = reference.text_sees_text(pack, "K", WINDOW).numpy()
    far = reference.text_sees_summary(pack, WINDOW).numpy()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 7.4), dpi=110, gridspec_kw={"width_ratios": [24, 6]})
    for axes, mask, colour, title in (
        (left, near, BLUE, f"text stream: {TOKENS} tokens, chunks of k = {K}"),
        (right, far, RUST, "summaries: one per chunk"),
    ):
        rows, columns = mask.shape
        for i in range(rows):
            for j in range(columns):
                axes.add_patch(
                    patches.Rectangle(
                        (j + 0.06, i + 0.06), 0.88, 0.88, linewidth=0, facecolor=colour if mask[i, j] else "#f3f3f3"
                    )
                )
        axes.set_xlim(-0.1, columns)
        axes.set_ylim(rows + 0.1, -0.1)
        axes.set_aspect("equal", anchor="N")
        axes.set_title(title, fontsize=11, color=colour)
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
    for chunk in range(0, TOKENS + 1, K):
        left.axvline(chunk, color=GREY, linewidth=0.8)
        for axes in (left, right):
            axes.axhline(chunk, color=GREY, linewidth=0.8)
    left.set_ylabel("a text token (row) ...")
    left.set_xlabel(f"... sees its own chunk and W = {WINDOW} before it as text (near)")
    right.set_xlabel("... and every older chunk\nas its summary (far)")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("two_streams.png"), bbox_inches="tight")


if __name__ == "__main__":
    main()
