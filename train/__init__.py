"""The trainer. `train/__main__.py` is its command, `train/trainer.py` its loop."""

import os

from train.distributed.torch_patches import silence_missing_cuda_runtime

# A thread that waits for another spins for some microseconds, then sleeps. OpenMP lets it spin for ever by default, and
# on cores that others use as well a step then takes ten times as long; without any spinning it takes a tenth longer on
# quiet ones (docs/log.md). Read when torch is imported, so it stands here; a user's own choice wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# A step of a million tokens makes and drops tensors of gigabytes in all sizes. Segments of a fixed size were left with
# holes of 9 GiB (docs/log.md); those that can grow need what the tensors need. Read when CUDA starts; a choice of the
# user's own wins.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

silence_missing_cuda_runtime()  # before anything imports torch.utils.cpp_extension
