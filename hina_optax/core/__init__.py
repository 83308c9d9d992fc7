"""Moments (gradient in, direction out) and weight decay."""

from hina_optax.core._moments import *
from hina_optax.core._weight_decay import *
