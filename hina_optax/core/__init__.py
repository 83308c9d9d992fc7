"""The adaptive core: moments, which turn a gradient into a direction, and weight decay."""

from hina_optax.core._moments import *
from hina_optax.core._weight_decay import *
