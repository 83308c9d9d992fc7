"""Strict dtype and rank promotion for every test; warnings are errors (pyproject.toml)."""

import os

# Compiling is most of what the tests do: LLVM's optimizations would double it. HINA_OPTIMIZED=1
# leaves them on, as in what users run. Eight virtual devices are for tests of sharding; all others
# stay on the first.
os.environ["XLA_FLAGS"] = " ".join([
  os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
  "" if os.environ.get("HINA_OPTIMIZED") == "1" else "--xla_backend_optimization_level=0",
])

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
