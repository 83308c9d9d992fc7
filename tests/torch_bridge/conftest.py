"""torch's threads wait by spinning: beside those of JAX, one is enough."""

import torch

torch.set_num_threads(1)
