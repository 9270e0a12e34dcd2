"""Settings every test shares."""

import os

# Set before torch is imported: more threads than free cores make small tensors many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from unhype.host import vision

# transformers imports torchvision where it finds it, and some builds of that need this first.
vision.declare_when_imported()
