"""Draw docs/two_streams.png, the picture in the README: `python docs/draw_streams.py`.

The picture shows which keys one query token attends to. The colours are computed from the attention rule in
`ksa_model/ops/attention/reference.py`, so the picture shows what the kernels compute.
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import patches, pyplot

from ksa_model.layout.sequence import build_layout
from ksa_model.ops.attention import reference

K, WINDOW = 4, 1
WORDS = "The key is 4812 and the cat naps on a red mat all day long . The key is ?".split()
QUERY = 18  # the last "is": it must predict "4812" next
BLUE, RUST, INK, QUIET, QUIET_INK = "#2f6db3", "#c2532d", "#1f2933", "#eef0f2", "#68737f"
BOX, GAP = 1.0, 0.55  # width of a token's box, and the space between chunks
TEXT_Y, SUMMARY_Y, HEIGHT = 3.0, 0.75, 0.8


def token_x(i: int) -> float:
    """Left edge of text token `i`."""
    return i * BOX + i // K * GAP


QUERY_X = token_x(QUERY) + BOX / 2


def chunk_centre(c: int) -> float:
    return (token_x(c * K) + token_x(c * K + K - 1) + BOX) / 2


def box(axes, x: float, y: float, width: float, text: str, *, fill: str, ink: str, edge: str, **style) -> None:
    axes.add_patch(
        patches.FancyBboxPatch(
            (x + 0.05, y),
            width - 0.1,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=fill,
            edgecolor=edge,
            **style,
        )
    )
    axes.text(x + width / 2, y + HEIGHT / 2 - 0.02, text, ha="center", va="center", color=ink, fontsize=10)


def arrow(axes, points: list[tuple[float, float]], colour: str) -> None:
    """A straight-cornered line through `points` with a head at the last one."""
    x, y = zip(*points)
    axes.plot(x[:-1], y[:-1], color=colour, linewidth=1.6, solid_joinstyle="round", solid_capstyle="butt")
    axes.annotate(
        "", points[-1], points[-2], arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=1.6, shrinkA=0, shrinkB=1)
    )


def draw_text(axes, near: np.ndarray) -> None:
    for i, word in enumerate(WORDS):
        if i == QUERY:
            style = dict(fill=INK, ink="white", edge=INK, linewidth=1.0)
        elif near[i]:
            style = dict(fill=BLUE, ink="white", edge=BLUE, linewidth=1.0)
            x, y = token_x(i) + BOX / 2, TEXT_Y + HEIGHT
            arrow(axes, [(QUERY_X, y), (QUERY_X, y + 0.7), (x, y + 0.7), (x, y)], BLUE)
        elif i > QUERY:
            style = dict(fill="white", ink=QUIET_INK, edge=QUIET_INK, linewidth=1.0, linestyle=(0, (2, 2)))
        else:
            style = dict(fill=QUIET, ink=QUIET_INK, edge="#d5dae0", linewidth=1.0)
        box(axes, token_x(i), TEXT_Y, BOX, word, **style)


def draw_summaries(axes, far: np.ndarray) -> None:
    for c in range(QUERY // K):  # the query's own chunk has no summary yet
        left, right, middle = token_x(c * K) + 0.05, token_x(c * K + K - 1) + BOX - 0.05, chunk_centre(c)
        funnel = [(left, TEXT_Y - 0.1), (right, TEXT_Y - 0.1), (middle + 1.2, SUMMARY_Y + HEIGHT + 0.1),
                  (middle - 1.2, SUMMARY_Y + HEIGHT + 0.1)]  # fmt: skip
        axes.add_patch(patches.Polygon(funnel, facecolor="#f6e3db" if far[c] else QUIET, edgecolor="none"))
        used = dict(fill=RUST, ink="white", edge=RUST) if far[c] else dict(fill=QUIET, ink=QUIET_INK, edge="#d5dae0")
        box(axes, middle - 1.25, SUMMARY_Y, 2.5, f"summary {c + 1}", linewidth=1.0, **used)
        if far[c]:
            bus = SUMMARY_Y - 0.7
            arrow(axes, [(QUERY_X, TEXT_Y), (QUERY_X, bus), (middle, bus), (middle, SUMMARY_Y)], RUST)


def draw_labels(axes, near: np.ndarray, far: np.ndarray) -> None:
    older, recent = int(far.sum()), int(np.flatnonzero(near)[0])
    text = dict(ha="center", va="center", fontsize=12.5)
    top = TEXT_Y + HEIGHT + 1.05
    axes.text(
        (token_x(0) + token_x(older * K - 1) + BOX) / 2, top, f"older chunks of k = {K} tokens", color=QUIET_INK, **text
    )
    axes.text(
        (token_x(recent) + token_x(len(WORDS) - 1) + BOX) / 2, top + 0.35,
        f"near: every token of its own chunk\nand of the W = {WINDOW} chunk before", color=BLUE, **text,
    )  # fmt: skip
    axes.text(chunk_centre(1), SUMMARY_Y - 1.2, "far: one summary key for each older chunk", color=RUST, **text)
    axes.text(QUERY_X + 0.25, TEXT_Y - 0.42, "query", color=INK, ha="left", va="center", fontsize=12.5, weight="bold")
    axes.text(
        QUERY_X + 0.25, SUMMARY_Y + 0.3, f"{int(near.sum())} + {older} keys\ninstead of {QUERY + 1}",
        color=INK, ha="left", va="center", fontsize=12.5,
    )  # fmt: skip


def main() -> None:
    pack = build_layout(np.array([0]), np.array([len(WORDS)]), len(WORDS), K)
    near = reference.text_to_text_mask(pack, "K", WINDOW).numpy()[QUERY]
    far = reference.text_to_summary_mask(pack, WINDOW).numpy()[QUERY]
    figure, axes = pyplot.subplots(figsize=(11.5, 4.6), dpi=150)
    figure.patch.set_facecolor("white")
    draw_summaries(axes, far)
    draw_text(axes, near)
    draw_labels(axes, near, far)
    axes.set_xlim(-0.2, token_x(len(WORDS) - 1) + BOX + 0.2)
    axes.set_ylim(SUMMARY_Y - 1.6, TEXT_Y + HEIGHT + 2.0)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("two_streams.png"), bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
