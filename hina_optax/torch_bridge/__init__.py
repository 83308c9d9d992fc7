"""optax transformations as PyTorch optimizers. Only this folder imports torch."""

import os

# JAX reads this when it first uses a GPU. Without it JAX would preallocate three quarters of the
# memory, which torch needs. A value that the user has set is kept.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

try:
  import torch  # noqa: F401
except ImportError as error:
  raise ImportError(
    "hina_optax.torch_bridge needs PyTorch: pip install 'hina-optax[torch]', or see "
    "https://pytorch.org for a build that fits your GPU."
  ) from error

from hina_optax.torch_bridge._hina_adaptive import HinaAdaptive
from hina_optax.torch_bridge._optax_optimizer import OptaxOptimizer

__all__ = ["HinaAdaptive", "OptaxOptimizer"]
