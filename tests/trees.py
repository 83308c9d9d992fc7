"""Trees of parameters and gradients that several tests share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def mixed(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, Any]:
  """Every kind of leaf: matrix, kernel, vector, LoRA pair, scalar, an empty leaf.

  `dtype` may be a tuple of dtypes, which the leaves then take in turn (both factors of a pair the
  same).
  """
  shapes = {
    "attn": {"lora_a": (6, 2), "lora_b": (2, 5)},
    "bias": (5,),
    "conv": {"kernel": (3, 3, 2, 4)},
    "empty": (0, 3),
    "scale": (),
    "square": (6, 6),
  }
  kinds = dtype if isinstance(dtype, tuple) else (dtype,)
  rng = np.random.default_rng(seed)
  leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  return structure.unflatten([
    jnp.asarray(rng.normal(size=shape), kinds[i // 2 % len(kinds)])
    for i, shape in enumerate(leaves)
  ])


def few() -> dict[str, Any]:
  """A matrix and a LoRA pair, where how a transformation is driven matters and not on what."""
  tree = mixed()
  return {name: tree[name] for name in ("attn", "square")}


def layers(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, Any]:
  """Leaves that are alike, which are stacked, beside others that stand alone."""
  tree = mixed(dtype, seed)
  others = [mixed(dtype, seed + i) for i in (1, 2)]
  return {
    "bias": tree["bias"], "conv": tree["conv"],
    "layers": {str(i): {"attn": t["attn"], "square": t["square"]} for i, t in enumerate(others)},
    "scale": tree["scale"],
  }


def sequence(tree: Any, steps: int, seed: int = 1, scale: float = 1.0) -> list[Any]:
  """Random gradients like `tree`, one tree a step."""
  rng = np.random.default_rng(seed)
  return [
    jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree)
    for _ in range(steps)
  ]


def run(tx: Any, params: Any, gradients: list[Any], apply: bool = True) -> tuple[Any, list, Any]:
  """Steps a transformation through `gradients`; returns parameters, all updates and the state."""
  state, update, collected = tx.init(params), jax.jit(tx.update), []
  for g in gradients:
    updates, state = update(g, state, params)
    collected.append(updates)
    if apply:
      params = jax.tree.map(lambda p, u: (p + u.astype(p.dtype)).astype(p.dtype), params, updates)
  return params, collected, state


def run_optax(tx: Any, params: Any, gradients: list[Any]) -> tuple[Any, list, Any]:
  """`run` for optax's own optimizers, some of which mix dtypes implicitly."""
  with jax.numpy_dtype_promotion("standard"):
    return run(tx, params, gradients)


def assert_close(actual: Any, expected: Any, rtol: float = 1e-6, atol: float = 1e-7) -> None:
  """Compares two trees leaf by leaf and names the leaf that differs."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  flat = jax.tree_util.tree_leaves_with_path(actual)
  for (path, a), e in zip(flat, jax.tree.leaves(expected)):
    np.testing.assert_allclose(
      np.asarray(a, np.float64), np.asarray(e, np.float64), rtol, atol,
      err_msg=jax.tree_util.keystr(path),
    )


def assert_equal(actual: Any, expected: Any) -> None:
  """Compares two trees bit for bit (a zero's sign aside) and names the leaf that differs."""
  assert_close(actual, expected, 0.0, 0.0)


def dtypes(tree: Any) -> list[tuple[Any, Any, bool]]:
  """Shape, dtype and weakness of every leaf."""
  return [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in jax.tree.leaves(tree)]
