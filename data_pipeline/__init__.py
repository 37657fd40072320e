"""Raw text to packed training samples, in an order that resumes exactly.

    data = open_data(DataConfig())                                      # text -> tokens on disk
    samples = data.samples("train", seq_len=8192, alignment=8)          # which documents share a sample
    loader = Loader(samples, samples_per_step=8, dp_rank=0, dp_size=1)  # the samples of each step

Imports neither torch nor the model; heavy libraries are imported where they are used.
"""

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.open import open_data
from data_pipeline.packing.loader import Loader
from data_pipeline.packing.plan import Plan, build_plan
from data_pipeline.packing.samples import IGNORE_INDEX, PackedSample, Samples, TrainingData
from data_pipeline.text.tokenizer import Tokenizer

__all__ = [
    "IGNORE_INDEX",
    "DataConfig",
    "DataError",
    "Loader",
    "PackedSample",
    "Plan",
    "Samples",
    "Tokenizer",
    "TrainingData",
    "build_plan",
    "open_data",
]
