"""Settings every test shares."""

import os

# Set before torch is imported: more threads than free cores make small tensors many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
