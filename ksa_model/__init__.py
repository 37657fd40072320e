"""Decoder language models with interleaved Kwai Summary Attention (arXiv 2604.24432) and full-attention layers."""

import warnings

# megatron-core says this four times on import; nothing here uses either library.
warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*", category=UserWarning)
# Its row-parallel layer calls its own helper without a group although it was given one.
warnings.filterwarnings("ignore", message=".*tp_group is None, using default tp group.*", category=DeprecationWarning)
# It still calls collectives by the names that newer torch renames.
warnings.filterwarnings("ignore", message=r".*`torch\.distributed\.\w+` is deprecated.*", category=FutureWarning)
