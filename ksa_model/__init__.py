"""Decoder language models with interleaved Kwai Summary Attention (arXiv 2604.24432) and full-attention layers."""
