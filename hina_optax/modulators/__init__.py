"""Modulators: wrappers that change the direction of the core, or scale its learning rate."""

from hina_optax.modulators._alignment import *
from hina_optax.modulators._importance import *
from hina_optax.modulators._projection import *
from hina_optax.modulators._rates import *
from hina_optax.modulators._sign_agreement import *
