"""Raw text to packed, exactly resumable training samples.

    prepared = prepare(DataConfig())                                    # text -> tokens on disk
    plan = build_plan(prepared.train, 8192, 8, seed=0, cache_dir=...)   # which document goes into which sample
    loader = Loader(plan, samples_per_step=8, dp_rank=0, dp_size=1)     # the samples of each step

Imports neither torch nor the model; heavy libraries are imported where they are used.
"""

import warnings

# `python -m data_pipeline.prepare` finds its module already imported by this package and hands over to it.
warnings.filterwarnings("ignore", message=r"'data_pipeline\.\w+' found in sys.modules", category=RuntimeWarning)

from data_pipeline.config import DataConfig  # noqa: E402
from data_pipeline.data import TrainingData, open_data  # noqa: E402
from data_pipeline.errors import DataError  # noqa: E402
from data_pipeline.loader import Loader  # noqa: E402
from data_pipeline.packing import Plan, build_plan  # noqa: E402
from data_pipeline.prepare import PreparedData, prepare  # noqa: E402
from data_pipeline.samples import IGNORE_INDEX, PackedSample, Samples  # noqa: E402
from data_pipeline.tokenizer import Tokenizer  # noqa: E402

__all__ = [
    "IGNORE_INDEX",
    "DataConfig",
    "DataError",
    "Loader",
    "PackedSample",
    "Plan",
    "PreparedData",
    "Samples",
    "Tokenizer",
    "TrainingData",
    "build_plan",
    "open_data",
    "prepare",
]
