"""`open_data(config)`: the training data of any configuration.

Raw text is prepared first. Shards and Megatron files are used where they are, local or remote.
"""

from __future__ import annotations

from data_pipeline.config import DataConfig
from data_pipeline.corpora.mixture import Mixture
from data_pipeline.corpora.stream import Stream
from data_pipeline.corpora.synthetic import Synthetic
from data_pipeline.corpora.tokens import open_corpus
from data_pipeline.packing.samples import TrainingData


def open_data(config: DataConfig, *, progress: bool = False) -> TrainingData:
    """Open the data of a configuration, and prepare it first where necessary. Several processes may call this at once.

    Args:
        config: what to train on.
        progress: show progress bars on stderr.

    Raises:
        DataError: the data are missing, damaged, or do not fit the configuration.
    """
    if config.source == "mixture":
        return Mixture(config, progress=progress)
    if config.source == "synthetic":
        return Synthetic(config)
    if config.stream:
        return Stream(config, progress=progress)
    return open_corpus(config, progress=progress)
