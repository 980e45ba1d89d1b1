"""What holds for every test."""

import os

# Before jax is imported: without a word from the user, tests run on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from hypothesis import settings

# Meshes are made of virtual devices; programs that tests start have as many as they ask for themselves.
jax.config.update("jax_num_cpu_devices", 8)

# Compilation makes the first example of a property far slower than the others.
settings.register_profile("drover", deadline=None)
settings.load_profile("drover")
