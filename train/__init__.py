"""The trainer. `train/__main__.py` is its command, `train/trainer.py` its loop."""

import os

# Threads that wait for each other sleep instead of spinning. OpenMP spins by default, and on cores that others use as
# well a step then takes ten times as long (docs/log.md). It reads this when torch is imported, so it stands here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
