"""Wrappers that compare the direction that comes out with the gradient that went in."""

from hina_optax.modulators._alignment import *
from hina_optax.modulators._importance import *
from hina_optax.modulators._projection import *
from hina_optax.modulators._rates import *
from hina_optax.modulators._sign_agreement import *
