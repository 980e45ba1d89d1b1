"""What holds for every test."""

import os

from hypothesis import settings

# Before any test imports jax: without a word from the user, tests run on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Compilation makes the first example of a property far slower than the others.
settings.register_profile("drover", deadline=None)
settings.load_profile("drover")
