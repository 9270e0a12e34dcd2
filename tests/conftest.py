"""Settings every test shares."""

import os

# Set before torch is imported: more threads than free cores make small tensors many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What is compared to the last digit is computed in single precision, which ComfyUI chooses on a CPU. Tests that are marked
# `gpu` need the device: UNHYPE_TEST_GPU=1 pytest -m gpu
if not os.environ.get("UNHYPE_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from unhype.host import vision

# transformers imports torchvision where it finds it, and some builds of that need this first.
vision.declare_when_imported()
