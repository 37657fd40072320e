"""Show training data: `python -m data_pipeline.inspect source=jsonl path=... seq_len=8192 sample=3 picture=pack.png`.

Prints the corpus (documents, tokens, lengths), the packing at `seq_len` (fill, documents cut) and the documents of one
sample of the global order with their first and last characters. `picture=FILE.png` draws how `rows` samples from
`sample` on are filled. `part` is the split, train or validation. Keys with their defaults, besides those of the data:

    seq_len=4096 alignment=8 part=train sample=0 rows=32 picture=
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_pipeline import cli
from data_pipeline.config import SPLITS
from data_pipeline.corpora.mixture import Mixture, MixtureSamples
from data_pipeline.errors import DataError
from data_pipeline.open import open_data
from data_pipeline.packing.plan import Plan
from data_pipeline.packing.samples import IGNORE_INDEX, PackedSample, Samples, TrainingData
from data_pipeline.store.remote import is_remote
from data_pipeline.text.tokenizer import Tokenizer

_EXTRA = {"seq_len": 4096, "alignment": 8, "sample": 0, "rows": 32, "picture": "", "part": "train"}
_END_TOKENS = 24
_END_CHARACTERS = 48


def describe_packing(data: TrainingData, samples: Samples) -> list[str]:
    """Lines of text about the packing: how documents fill samples."""
    if isinstance(samples, Plan):
        counts = samples.statistics
        return [
            f"packed into {samples.num_samples:,} samples of {samples.seq_len:,} tokens at multiples of "
            f"{samples.alignment}: {counts['fill']:.3%} real tokens",
            f"  {counts['documents']:,} documents; {counts['documents_split']:,} longer than a sample are split, "
            f"all others are whole; {counts['documents_left_out']:,} without a token to predict are left out",
        ]
    if isinstance(samples, MixtureSamples) and isinstance(data, Mixture):
        return data.report_stages(samples)
    return [f"endless samples of {samples.seq_len:,} tokens"]


def describe_sample(sample: PackedSample, tokenizer: Tokenizer) -> list[str]:
    """Lines of text about one sample: its padding and its documents, with their position and their ends."""
    seq_len, num_real = sample.tokens.size, int(sample.doc_lengths.sum())
    num_labels = int((sample.labels != IGNORE_INDEX).sum())
    lines = [
        f"sample {sample.index}: {sample.doc_starts.size} documents, {num_real:,} real tokens of {seq_len:,} "
        f"({num_real / seq_len:.2%}), {seq_len - num_real:,} padding, {num_labels:,} with loss"
    ]
    for number, (start, length, continues) in enumerate(_documents(sample)):
        tokens = sample.tokens[start : start + length]
        mark = "  continues an earlier sample" if continues else ""
        lines.append(f"  {number:>4}  at {start:>9,}  {length:>9,} tokens{mark}")
        head = tokenizer.decode(tokens[:_END_TOKENS])[:_END_CHARACTERS]
        tail = tokenizer.decode(tokens[-_END_TOKENS:])[-_END_CHARACTERS:]
        lines.append(f"        {head!r} ... {tail!r}")
    return lines


def _documents(sample: PackedSample) -> list[tuple[int, int, bool]]:
    """(start, length, whether it continues an earlier sample) of each document."""
    return list(zip(sample.doc_starts.tolist(), sample.doc_lengths.tolist(), sample.continuation.tolist()))


def draw(samples: Sequence[PackedSample], path: str) -> None:
    """Draw samples to a PNG file: a row per sample, a bar per document (hatched: continues), white for padding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    seq_len = samples[0].tokens.size
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.28 * len(samples)), layout="constrained")
    colors = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for row, sample in enumerate(samples):
        for number, (start, length, continues) in enumerate(_documents(sample)):
            color = colors[(7 * row + number) % len(colors)]
            axes.barh(
                row, length, left=start, height=0.8, color=color, edgecolor="black", linewidth=0.3,
                hatch="///" if continues else None,
            )  # fmt: skip
    fill = sum(int(sample.doc_lengths.sum()) for sample in samples) / (seq_len * len(samples))
    axes.set(xlim=(0, seq_len), ylim=(len(samples) - 0.4, -0.6), xlabel="token", ylabel="sample")
    axes.set_title(f"{len(samples)} samples of {seq_len:,} tokens, {fill:.2%} filled")
    axes.set_yticks(range(len(samples)), [str(sample.index) for sample in samples], fontsize=7)
    legend = [Patch(facecolor="lightgray", edgecolor="black", label="a document")]
    legend.append(Patch(facecolor="lightgray", edgecolor="black", hatch="///", label="continues an earlier sample"))
    legend.append(Patch(facecolor="white", edgecolor="black", label="padding"))
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise DataError(f"picture={path}: cannot be written ({error})") from error
    finally:
        pyplot.close(figure)


def _command(arguments: Sequence[str]) -> None:
    config, extra = cli.parse(arguments, _EXTRA)
    if extra["part"] not in SPLITS:
        raise DataError(f"part={extra['part']!r} must be one of {', '.join(SPLITS)}")
    if is_remote(extra["picture"]):
        raise DataError(f"picture={extra['picture']}: is written to a local file; copy it from there")
    for key, least in (("rows", 1), ("sample", 0), ("seq_len", 1), ("alignment", 1)):
        if extra[key] < least:
            raise DataError(f"{key}={extra[key]} must be at least {least}")
    data = open_data(config, progress=True)
    samples = data.samples(extra["part"], extra["seq_len"], extra["alignment"])
    if samples is None:
        raise DataError(f"part={extra['part']}: no documents are held out")
    lines = [*data.report(), *describe_packing(data, samples)]
    lines += describe_sample(samples.at(extra["sample"]), Tokenizer(data.tokenizer_path, data.config.end_token))
    print("\n".join(lines))
    if extra["picture"]:
        rows = range(extra["sample"], min(extra["sample"] + extra["rows"], max(samples.num_samples, 1)))
        draw([samples.at(index) for index in rows] or [samples.at(extra["sample"])], extra["picture"])
        print(f"wrote {extra['picture']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.run(__doc__ or "", _command, arguments)


if __name__ == "__main__":
    sys.exit(main())
