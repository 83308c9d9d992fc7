"""Regularizers: transformations from gradient to gradient, before any learning rate."""

from hina_optax.regularizers._agr import *
from hina_optax.regularizers._background import *
from hina_optax.regularizers._detail import *
from hina_optax.regularizers._edges import *
from hina_optax.regularizers._high_frequency import *
from hina_optax.regularizers._orthogonal import *
from hina_optax.regularizers._rank import *
