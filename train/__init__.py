"""The trainer. `train/__main__.py` is its command, `train/trainer.py` its loop."""

import os

# Threads that wait for each other sleep instead of spinning. OpenMP spins by default, and on cores that others use as
# well a step then takes ten times as long (docs/log.md). It reads this when torch is imported, so it stands here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A step of a million tokens makes and drops tensors of gigabytes in all sizes. Segments of a fixed size were left with
# holes of 9 GiB (docs/log.md); those that can grow need what the tensors need. Read when CUDA starts; a choice of the
# user's own wins.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
