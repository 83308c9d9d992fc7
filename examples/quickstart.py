"""Trains a linen model and an nnx model with parts of the library in one optax chain."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState

import hina_optax

images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
optimizer = optax.chain(
  hina_optax.suppress_edges(strength=0.1),
  hina_optax.suppress_high_frequency(0.05),
  hina_optax.cautious(hina_optax.scale_by_hina()),
  optax.scale_by_learning_rate(1e-2),
)

# flax.linen
model = nn.Conv(3, (3, 3))
variables = model.init(jax.random.key(1), images)
state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optimizer)


@jax.jit
def linen_step(state):
  def loss(params):
    return jnp.mean((state.apply_fn({"params": params}, images) - images) ** 2)

  value, grads = jax.value_and_grad(loss)(state.params)
  return state.apply_gradients(grads=grads), value


for _ in range(100):
  state, value = linen_step(state)
print(f"linen: loss {value:.4f}")

# flax.nnx
model = nnx.Conv(3, 3, (3, 3), rngs=nnx.Rngs(1))
trainer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)


@nnx.jit
def nnx_step(model, trainer):
  value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(images) - images) ** 2))(model)
  trainer.update(model, grads)
  return value


for _ in range(100):
  value = nnx_step(model, trainer)
print(f"nnx: loss {value:.4f}")
