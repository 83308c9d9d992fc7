"""optax transformations as PyTorch optimizers: the only folder that imports torch."""

import os

# Read when JAX first touches a GPU: without it JAX would take three quarters of the memory that
# torch needs. Whoever set it has decided.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

try:
  import torch  # noqa: F401
except ImportError as error:
  raise ImportError(
    "hina_optax.torch_bridge needs PyTorch: pip install 'hina-optax[torch]', or see "
    "https://pytorch.org for a build that fits your GPU."
  ) from error

from hina_optax.torch_bridge._hina import HinaAdaptive
from hina_optax.torch_bridge._optax import OptaxOptimizer

__all__ = ["HinaAdaptive", "OptaxOptimizer"]
