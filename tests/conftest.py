"""Strict dtype and rank promotion for every test; warnings are errors (pyproject.toml)."""

import gc
import importlib.metadata
import os

# Eight virtual devices are for tests of sharding; all others stay on the first. Compiling is most
# of what the tests do: LLVM's optimizations double it, XLA's newer emitters of fusions do so again
# (jaxlib 0.10.2; 0.12 has no others, and stops at an option it does not know), and cutting a
# program into parts for several threads costs a tenth. HINA_OPTIMIZED=1 leaves all that on, as in
# what users run.
os.environ["XLA_FLAGS"] = " ".join([
  os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
  *([] if os.environ.get("HINA_OPTIMIZED") == "1" else [
    "--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1",
    *(["--xla_cpu_use_fusion_emitters=false"]
      if importlib.metadata.version("jaxlib").startswith("0.10.") else []),
  ]),
])

import jax

# JAX makes many objects that live on: looking for garbage among them often takes a tenth.
gc.set_threshold(200_000, 50, 100)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
