"""What every optax transformation is expected to do, over the whole registry."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from tests import trees
from tests.cases import (
  ALIASES,
  CASES,
  OFF,
  as_optimizer,
  every_case,
  every_driven_case,
  is_costly,
  some,
)

DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)


def parabola(dtype=jnp.float32):
  target = {"w": jnp.asarray([[3.0, -2.0], [1.0, 4.0]], dtype), "b": jnp.asarray([-1.0, 10.0, 1.0],
            dtype)}
  start = jax.tree.map(jnp.ones_like, target)

  def loss(p):
    differences = jax.tree.map(jnp.subtract, p, target)
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(differences))

  return start, target, loss


@pytest.mark.parametrize("case", [c for c in CASES if c.converges], ids=str)
def test_converges_on_a_parabola(case):
  params, target, loss = parabola()
  cosine = optax.cosine_decay_schedule(0.05, 4000)
  schedule = lambda step: cosine(step.astype(jnp.float32))  # noqa: E731
  if case.kind == "alias":
    changed = {"learning_rate": schedule, "reference_lr": 0.05}
    tx = case.factory(**{**case.kwargs, **changed})
  else:
    tx = as_optimizer(case, schedule if not case.steps else 0.05)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.jit(
    lambda p: jax.lax.scan(step, (p, tx.init(p)), length=4000)
  )(params)
  trees.assert_close(params, target, 3e-2, 3e-2)


@pytest.mark.parametrize("case", [*(c for c in CASES if c.kind == "moments"), ALIASES[0]], ids=str)
def test_converges_on_rosenbrock(case):
  def loss(p):
    return jnp.square(1 - p[0]) + 100 * jnp.square(p[1] - jnp.square(p[0]))

  tx = as_optimizer(case, 2e-3)
  if case.kind == "alias":
    tx = case.factory(**{**case.kwargs, "learning_rate": 2e-3})

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  start = jnp.zeros(2)
  (params, _), _ = jax.jit(
    lambda p: jax.lax.scan(step, (p, tx.init(p)), length=30_000)
  )(start)
  np.testing.assert_allclose(params, [1.0, 1.0], 3e-2, 3e-2)


@every_case
def test_extra_args_one_compilation_and_a_stable_state(case):
  tx, params = case.make(), trees.mixed()
  compiled = []

  @jax.jit
  def step(g, state, params, extra):
    compiled.append(1)
    return tx.update(g, state, params, nobody_expects_this=extra)

  first = state = tx.init(params)
  for g in trees.sequence(params, 3):
    updates, state = step(g, state, params, jnp.float32(1))
  assert len(compiled) == 1
  assert jax.tree.structure(first) == jax.tree.structure(state)
  assert trees.dtypes(first) == trees.dtypes(state)
  assert not any(weak for *_, weak in trees.dtypes(state))
  assert jax.tree.structure(updates) == jax.tree.structure(params)


@every_case
def test_map_params_finds_the_state_that_is_like_the_parameters(case):
  tx, params = case.make(), trees.mixed()
  state = tx.init(params)
  shapes = []

  def note(value, param):
    shapes.append((value.shape, param.shape))
    return value

  same = optax.tree.map_params(tx, note, state, params)
  trees.assert_equal(same, state)
  assert all(value == param for value, param in shapes)
  big = [x for x in jax.tree.leaves(state) if x.ndim == 4]
  assert len(big) * len(jax.tree.leaves(params)) == len(shapes)


@some([c for c in CASES if c.factory], is_costly)
def test_inject_hyperparams_changes_nothing(case):
  params = trees.mixed()
  plain = case.factory(**case.kwargs)
  injected = optax.inject_hyperparams(case.factory)(**case.kwargs)
  gradients = trees.sequence(params, 3)
  _, expected, _ = trees.run(plain, params, gradients, apply=False)
  _, actual, state = trees.run(injected, params, gradients, apply=False)
  trees.assert_close(actual, expected, 2e-5, 1e-6)
  assert all(isinstance(v, jax.Array) for v in state.hyperparams.values())


@some(ALIASES, is_costly)
def test_a_constant_schedule_is_the_constant(case):
  rate = case.kwargs["learning_rate"]
  scheduled = case.factory(**{**case.kwargs, "learning_rate": optax.constant_schedule(rate)})
  params = trees.mixed()
  gradients = trees.sequence(params, 4)
  trees.assert_close(
    trees.run(scheduled, params, gradients)[1], trees.run(case.make(), params, gradients)[1],
    1e-6, 1e-7,
  )


def test_a_schedule_reaches_every_learning_rate():
  """With a rate of zero nothing may move, whatever is on."""
  rate = lambda step: jnp.where(step < 2, 0.0, 0.1)  # noqa: E731
  params = trees.mixed()
  for compat in (False, True):
    tx = ho.hina_adaptive(rate, reference_lr=0.1, sd_scripts_compat=compat, edge_suppression=True)
    still, _, _ = trees.run(tx, params, trees.sequence(params, 2))
    trees.assert_equal(still, params)
    moved, _, _ = trees.run(tx, params, trees.sequence(params, 4))
    assert float(jnp.abs(moved["square"] - params["square"]).max()) > 1e-3


@every_driven_case
def test_multi_steps_holds_back_the_updates(case):
  tx, params = case.make(), trees.few()
  wrapped = optax.MultiSteps(tx, every_k_schedule=2)
  g = trees.sequence(params, 1)[0]
  with jax.numpy_dtype_promotion("standard"):  # MultiSteps mixes dtypes itself
    state, update = wrapped.init(params), jax.jit(wrapped.update)
    first, state = update(g, state, params)
    trees.assert_equal(first, jax.tree.map(jnp.zeros_like, params))
    second, _ = update(g, state, params)
  expected, _ = jax.jit(tx.update)(g, tx.init(params), params)
  trees.assert_close(second, expected, 1e-5, 1e-6)


@every_case
def test_masked_leaves_pass_and_cost_nothing(case):
  params = trees.mixed()
  mask = jax.tree.map(lambda p: p.ndim != 2, params)
  tx = optax.masked(case.make(), mask)
  g = trees.sequence(params, 1)[0]
  state = tx.init(params)
  updates, new_state = jax.jit(tx.update)(g, state, params)
  trees.assert_equal(updates["square"], g["square"])
  assert jax.tree.structure(state) == jax.tree.structure(new_state)
  assert not any(x.shape == params["square"].shape for x in jax.tree.leaves(state))


@every_driven_case
def test_partition_and_none_leaves(case):
  params = trees.mixed()
  labels = jax.tree.map(lambda p: "ours" if p.ndim != 1 else "frozen", params)
  tx = optax.partition({"ours": case.make(), "frozen": optax.set_to_zero()}, labels)
  state = tx.init(params)
  updates, _ = jax.jit(tx.update)(trees.sequence(params, 1)[0], state, params)
  trees.assert_equal(updates["bias"], jnp.zeros(5))

  alone = case.make()
  with_none = {**params, "square": None}
  g = trees.sequence(with_none, 1)[0]
  updates, _ = jax.jit(alone.update)(g, alone.init(with_none), with_none)
  assert updates["square"] is None


@every_driven_case
def test_a_missing_gradient_leaves_its_leaf_and_state_alone(case):
  tx, params = case.make(), trees.mixed()
  gradients = trees.sequence(params, 2)
  gradients[1]["square"] = None
  _, updates, state = trees.run(tx, params, gradients, apply=False)
  assert updates[1]["square"] is None
  assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


@every_case
def test_updates_have_the_dtype_of_the_parameters(case):
  tx, params = as_optimizer(case), trees.mixed(DTYPES)
  g = trees.sequence(params, 1)[0]
  state = tx.init(params)

  @jax.jit
  def step(state, g, which):
    # Both branches of a cond must agree in every dtype.
    return jax.lax.cond(which, lambda: tx.update(g, state, params), lambda: (params, state))

  updates, new_state = step(state, g, True)
  wanted = [x.dtype for x in jax.tree.leaves(params)]
  assert set(wanted) == {jnp.dtype(d) for d in DTYPES}
  assert [x.dtype for x in jax.tree.leaves(updates)] == wanted
  assert trees.dtypes(state) == trees.dtypes(new_state)
  assert all(x.dtype in (jnp.float32, jnp.int32, jnp.int16) for x in jax.tree.leaves(state))


@every_case
def test_x64(case):
  with jax.enable_x64(True):
    tx, params = as_optimizer(case), trees.mixed(jnp.float64)
    gradients = trees.sequence(params, 2)
    state = tx.init(params)
    for g in gradients:
      updates, new_state = jax.jit(tx.update)(g, state, params)
      assert trees.dtypes(state) == trees.dtypes(new_state)
      state = new_state
    assert all(u.dtype == jnp.float64 for u in jax.tree.leaves(updates))


@every_driven_case
def test_vmap_is_a_loop(case):
  tx = case.make()
  runs = [trees.mixed(seed=s) for s in (0, 1)]
  gradients = [trees.sequence(runs[i], 1, seed=5 + i)[0] for i in (0, 1)]
  stack = lambda *ts: jax.tree.map(lambda *xs: jnp.stack(xs), *ts)  # noqa: E731
  params, g = stack(*runs), stack(*gradients)
  state = jax.vmap(tx.init)(params)
  updates, state = jax.jit(jax.vmap(tx.update))(g, state, params)
  alone = jax.jit(tx.update)
  for i in (0, 1):
    expected = alone(gradients[i], tx.init(runs[i]), runs[i])
    actual = jax.tree.map(lambda x: x[i], (updates, state))
    trees.assert_close(actual, expected, 2e-5, 2e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c.kind != "alias"], ids=str)
def test_jit_changes_nothing(case):
  tx, params = case.make(), trees.mixed()
  g = trees.sequence(params, 1)[0]
  expected = tx.update(g, tx.init(params), params)
  actual = jax.jit(tx.update)(g, jax.jit(tx.init)(params), params)
  trees.assert_close(actual, expected, 2e-5, 2e-6)


def test_the_alias_is_the_chain_of_its_parts():
  params = trees.mixed()
  gradients = trees.sequence(params, 6)
  # No visit of importance, which in the alias looks at the gradient as it enters the chain.
  alias = ho.hina_adaptive(
    1e-2, edge_suppression=True, spatial_awareness=True, lora_rank_penalty=True,
    use_orthogonal_grad=True,
  )
  core = ho.scale_by_hina(0.9, 0.999, 1e-8, torque="average", stability="adopt")
  direction = ho.scale_by_importance(
    ho.scale_by_sign_agreement(ho.cautious(core), 0.03, 1e-3, 10.0, 500), 1.0)
  chain = optax.chain(
    ho.adaptive_gradient_regularization(),
    ho.suppress_edges(0.1, 0.6),
    ho.suppress_high_frequency(0.05),
    ho.preserve_detail(0.8),
    ho.attenuate_background(),
    ho.add_rank_penalty(0.01, 1.2),
    ho.orthogonalize_to_params(),
    ho.project_to_init(
      optax.chain(
        direction, ho.add_scheduled_weight_decay(0.01, transition_steps=1000),
        optax.scale_by_learning_rate(1e-2),
      ),
      0.06,
    ),
  )
  trees.assert_close(
    trees.run(alias, params, gradients)[1], trees.run(chain, params, gradients)[1], 1e-5, 1e-7
  )


def test_the_alias_without_regularizers_is_the_chain_of_its_parts_at_every_visit():
  params = trees.mixed()
  gradients = trees.sequence(params, 6)
  alias = ho.hina_adaptive(
    1e-2, use_agr=False, background_regularization=False, relationship_discovery_interval=2)
  core = ho.scale_by_hina(0.9, 0.999, 1e-8, torque="average", stability="adopt")
  direction = ho.scale_by_importance(
    ho.scale_by_sign_agreement(ho.cautious(core), 0.03, 1e-3, 10.0, 500), 1.0, interval=2)
  chain = ho.project_to_init(optax.chain(
    direction, ho.add_scheduled_weight_decay(0.01, transition_steps=1000),
    optax.scale_by_learning_rate(1e-2)), 0.06)
  trees.assert_close(
    trees.run(alias, params, gradients)[1], trees.run(chain, params, gradients)[1], 1e-5, 1e-7
  )


@pytest.mark.parametrize("unpaired", ["ignore", "nuclear"])
def test_factors_of_the_shape_of_other_matrices_are_not_taken_for_them(unpaired):
  """Down factors, up factors and other matrices of one shape."""
  rng = np.random.default_rng(0)
  make = lambda: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)  # noqa: E731
  params = {f"l{i}": {"kernel": make(), "lora_a": make(), "lora_b": make()} for i in range(2)}
  alone = ho.add_rank_penalty(0.3, 1.5, unpaired=unpaired)
  gradients = trees.sequence(params, 3)
  seen = [alone.update(g, alone.init(params), params)[0] for g in gradients]
  core = ho.scale_by_hina()
  expected = trees.run(core, params, seen, apply=False)[1]
  for batched in (False, True):
    tx = ho.hina_adaptive(1.0, **{**OFF, "lora_rank_penalty": True}, rank_penalty_strength=0.3,
                          low_rank_emphasis=1.5, unpaired=unpaired, weight_decay=0.0,
                          leaf_batching=batched)
    actual = trees.run(tx, params, gradients, apply=False)[1]
    trees.assert_close(actual, jax.tree.map(jnp.negative, expected), 1e-5, 1e-6)


def test_importance_looks_at_the_gradient_as_it_enters_the_chain():
  params = trees.mixed()
  gradients = trees.sequence(params, 4)
  gradients[1] = {**gradients[1], "square": gradients[1]["square"].at[0, 0].set(jnp.inf)}
  alias = ho.hina_adaptive(1e-2, edge_suppression=True, lora_rank_penalty=True, edge_penalty=3.0,
                           rank_penalty_strength=3.0, relationship_discovery_interval=2)
  alone = ho.scale_by_importance(optax.identity(), interval=2)
  states = [trees.run(tx, params, gradients, apply=False)[2] for tx in (alias, alone)]
  for name in ("importance", "initial_norm", "relation"):
    trees.assert_close(*(optax.tree.get(state, name) for state in states))
