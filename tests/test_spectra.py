"""Decompositions of rank x rank matrices: against NumPy's SVD, and many of them at once."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hina_optax.regularizers import _spectra
from tests.cases import OFF

RANK = 4
# Singular values of A: the last a hundredth of the first is near the least pivot.
SPECTRA = {"even": (1.0, 1.0, 1.0, 1.0), "spread": (1.0, 0.6, 0.4, 0.2),
           "narrow": (1.0, 0.1, 0.05, 0.03), "singular": (1.0, 0.5, 0.0, 0.0), "zero": (0.0,) * 4}


def factor(spectrum, size, rng):
  """A factor `(rank, size)` with these singular values."""
  left, _ = np.linalg.qr(rng.normal(size=(RANK, RANK)))
  right, _ = np.linalg.qr(rng.normal(size=(size, RANK)))
  return left * np.asarray(spectrum) @ right.T


def by_svd(a, b, emphasis):
  u, sigma, vt = np.linalg.svd(b @ a, full_matrices=False)
  kept = sigma > 1e-3 * sigma[0]
  relative = sigma / (sigma[0] or 1.0)
  inner = (u * kept * ((1 + 1e-3) / (relative + 1e-3)) ** (emphasis - 1)) @ vt
  return b.T @ inner, inner @ a.T


@pytest.mark.parametrize("emphasis", [1.0, 1.5])
@pytest.mark.parametrize("names", [
  ("even",), ("even", "spread"), ("narrow", "spread"), ("singular", "even"), ("zero", "spread"),
])
def test_kernels_turn_factors_into_gradients(names, emphasis):
  rng = np.random.default_rng(3)
  pairs = [(factor(SPECTRA[name], 9, rng), rng.normal(size=(7, RANK))) for name in names]
  grams = [jnp.asarray(np.stack(x), jnp.float32)
           for x in zip(*((a @ a.T, b.T @ b) for a, b in pairs))]
  for_down, for_up = jax.jit(_spectra.pair_kernels)(*grams, emphasis)
  for (a, b), down, up in zip(pairs, for_down, for_up):
    expected = by_svd(a, b, emphasis)
    np.testing.assert_allclose(down @ a, expected[0], 3e-4, 3e-4)
    np.testing.assert_allclose((up @ b.T).T, expected[1], 3e-4, 3e-4)


@pytest.mark.parametrize(("smallest", "decomposed"), [
  (0.02, False), (0.005, True), (0.0, True),
])
def test_eigenvectors_are_taken_only_where_one_matrix_is_nearly_singular(
  smallest, decomposed, monkeypatch
):
  monkeypatch.setattr(_spectra, "_symmetric_root", lambda gram: (jnp.nan * gram, jnp.nan * gram))
  rng = np.random.default_rng(0)
  tilted = np.eye(2) * (1.0, smallest)
  gram = jnp.asarray(np.stack([np.diag(rng.uniform(0.5, 1, 2)), tilted @ tilted]), jnp.float32)
  for_down, _ = _spectra.pair_kernels(gram, jnp.stack([jnp.eye(2)] * 2), 1.2)
  assert bool(jnp.isnan(for_down).all()) == decomposed


# As many batches at once as there are threads: of factors of several ranks.
MANY = """
import os
if hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp, numpy as np
import hina_optax as ho
rng = np.random.default_rng(0)
make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
params = {f"l{rank}_{i}": {"lora_a": make(64, rank), "lora_b": make(rank, 48)}
          for rank in (12, 16, 20, 24, 28, 32, 40, 48) for i in range(6)}
tx = TX
update, state = jax.jit(tx.update), tx.init(params)
for step in range(8):
  updates, state = update(params, state, params)
assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
"""


@pytest.mark.parametrize("tx", [
  "ho.add_rank_penalty()",
  "ho.with_leaf_batching(ho.add_rank_penalty())",
  # The original's, whose eigenvalues are those of each matrix by itself.
  f"ho.hina_adaptive(sd_scripts_compat=True, lora_rank_penalty=True, leaf_batching=True, **{OFF})",
])
def test_batches_of_several_ranks_do_not_wait_for_each_other(tx):
  done = subprocess.run([sys.executable, "-c", MANY.replace("TX", tx)], timeout=150, text=True,
                        capture_output=True, env={**os.environ, "XLA_FLAGS": ""})
  assert done.returncode == 0, done.stderr
