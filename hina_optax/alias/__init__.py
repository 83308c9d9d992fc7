"""`hina_adaptive`: the guide's optimizer, by its options. It contains no mathematics.

The guide is the Traditional Chinese guide to HinaAdaptive that the library implements. The original
is the PyTorch class `HinaAdaptive` in a fork of kohya's sd-scripts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from hina_optax import memory
from hina_optax.alias import _chain, _memory_options, _out_of_memory
from hina_optax.base import paths, traits
from hina_optax.base.traits import Traits
from hina_optax.grouped import driver
from hina_optax.grouped.layout import Layout
from hina_optax.modulators import rate_units
from hina_optax.options import HinaOptions, accept_registered_options


class HinaTransformation(optax.GradientTransformationExtraArgs):
  """An `optax.GradientTransformationExtraArgs` that knows the options it was built from.

  The options are an attribute of its `init`, so they survive `jax.tree.map` and `_replace`.
  """

  @property
  def options(self) -> HinaOptions:
    """The options; `get_optimization_info` reads them."""
    return traits.get_traits(self).options

  @property
  def choose_plan(self) -> Callable[..., memory.PlannedTransformation]:
    """`choose_plan(params, state=None)` chooses the `MemoryPlan` for these shapes.

    It returns the plan and the transformation with and without it. `plan_memory` and
    `optimize_for_vram` call it.
    """
    return traits.get_traits(self).choose_plan


def _rebuild(transformation: Any, **options: Any) -> Any:
  return traits.get_traits(transformation).rebuild(**options)


@accept_registered_options(_rebuild)
def hina_adaptive(
  learning_rate: optax.ScalarOrSchedule = 1e-3,
  *,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  edge_suppression: bool = False,
  edge_penalty: float = 0.1,
  edge_threshold: float = 0.6,
  spatial_awareness: bool = False,
  frequency_penalty: float = 0.05,
  detail_preservation: float = 0.8,
  background_regularization: bool = True,
  background_regularization_mode: str = "simple",
  lora_rank_penalty: bool = False,
  rank_penalty_strength: float = 0.01,
  low_rank_emphasis: float = 1.2,
  use_agr: bool = True,
  agr_limit: float = 0.1,
  use_orthogonal_grad: bool = False,
  use_tam: bool = True,
  tam_beta: float | None = None,
  use_adopt_stability: bool = True,
  use_cautious: bool = True,
  use_grams: bool = False,
  use_lr_mask: bool = True,
  lr_bump: float | None = None,
  min_lr: float | None = None,
  max_lr: float | None = None,
  warmup_steps: int = 500,
  reference_lr: float | None = None,
  use_dynamic_adaptation: bool = True,
  adaptation_strength: float = 1.0,
  relationship_discovery_interval: int = 100,
  importance_decay: float = 0.95,
  compatibility_threshold: float = 0.3,
  intrinsic_importance: str = "full",
  dynamic_weight_decay: bool = True,
  wd_transition_steps: int = 1000,
  wd_decay_factor: float = 0.7,
  wd_min_ratio: float = 0.1,
  weight_decay_mask: Any = None,
  use_spd: bool = True,
  spd_lambda: float = 0.06,
  unpaired: str = "ignore",
  lora_pattern: str | None = None,
  spatial_axes: paths.SpatialAxes | None = None,
  sd_scripts_compat: bool = False,
  memory_efficient: bool = False,
  vram_budget_gb: float | None = None,
  reduce_precision: bool = False,
  cpu_offload_states: bool = False,
  max_buffer_memory_mb: float | None = None,
  adaptive_features: bool = False,
  emergency_simplify: bool = False,
  leaf_batching: bool | None = None,
  max_batched_elements: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""The guide's optimizer: regularizers, an adaptive core and modulators, chosen by options.

  The chain, each part only where its option is on:

  .. math::
    g \to \text{AGR} \to \text{edges} \to \text{high frequency} \to \text{detail} \to
    \text{background} \to \text{rank} \to \text{OrthoGrad} \to
    \text{SPD}(\text{importance}(\text{sign agreement}(\text{cautious}(\text{core})))
    \to \text{decay} \to -\eta)

  All arithmetic is fp32, whatever the dtype of the parameters. With everything off it is
  `optax.adamw`. Options and defaults are those of the PyTorch class `HinaAdaptive`, except where
  said below; each option's part documents it in full.

  Args:
    learning_rate: step size, a number or an optax schedule.
    betas: decays of the two moments (`scale_by_hina`).
    eps: added to the root of the second moment (`scale_by_hina`).
    weight_decay: decoupled, per unit of learning rate (`add_scheduled_weight_decay`).
    edge_suppression: damp edges of the gradient (`suppress_edges`).
    edge_penalty: its strength.
    edge_threshold: in [0, 1], a share of each leaf's strongest edge (compat: in units of the
      gradient).
    spatial_awareness: smooth the gradient and keep its detail (`suppress_high_frequency`,
      `preserve_detail`).
    frequency_penalty: share of the high-pass part that is subtracted.
    detail_preservation: in [0, 1], the least factor that varied places keep.
    background_regularization: damp what stays quiet (`attenuate_background`). On by default, as in
      the original.
    background_regularization_mode: `"simple"` or `"fast"`.
    lora_rank_penalty: nuclear norm of each LoRA pair (`add_rank_penalty`).
    rank_penalty_strength: in units of the loss per unit of nuclear norm.
    low_rank_emphasis: >= 1, weight of small singular values. The original never used it.
    use_agr: `adaptive_gradient_regularization`; the original clips each leaf to norm 1 instead.
    agr_limit: in [0, 1], the largest share that an element loses; 1 is the published rule, which
      stalls where a few elements hold most of a leaf's gradient.
    use_orthogonal_grad: `orthogonalize_to_params`.
    use_tam: torque-aware momentum (`scale_by_hina`).
    tam_beta: decay of the torque. `None`: 0.9 as published, with compat 0.999.
    use_adopt_stability: ADOPT's second moment (`scale_by_hina`).
    use_cautious: `cautious`.
    use_grams: `grams`, in place of `use_cautious`. Off by default; the original accepts and never
      applies it, and so does compat.
    use_lr_mask: a learning rate for each element (`scale_by_sign_agreement`).
    lr_bump: by how much a rate moves per step. `None`: 0.03 of the reference rate, with compat
      3e-6.
    min_lr: lower bound of a rate. `None`: 0.001 of the reference rate, with compat 1e-7.
    max_lr: upper bound of a rate. `None`: 10 times the reference rate, with compat 1e-3.
    warmup_steps: first steps, in which `use_lr_mask` moves the rates of elements; then they stay.
      It is no warm-up of the learning rate.
    reference_lr: the rate that the three above are measured against. `None`: `learning_rate`, for a
      schedule its largest value over `warmup_steps`.
    use_dynamic_adaptation: move learning rate between leaves (`scale_by_importance`).
    adaptation_strength: strength of `use_dynamic_adaptation`.
    relationship_discovery_interval: steps after which importance is measured again.
    importance_decay: decay of the average of importance over its measurements.
    compatibility_threshold: least compatibility of two related matrices.
    intrinsic_importance: `"full"` or `"estimated"`.
    dynamic_weight_decay: let weight decay fade (`add_scheduled_weight_decay`).
    wd_transition_steps: steps after which weight decay begins to fade.
    wd_decay_factor: share of weight decay that is left after as many steps again.
    wd_min_ratio: least share of weight decay that is left.
    weight_decay_mask: where weight decay acts, as `optax.masked` takes it; `None`: everywhere.
    use_spd: pull back to the start selectively (`project_to_init`).
    spd_lambda: in [0, 1], strength of `use_spd`.
    unpaired: `"ignore"` or `"nuclear"`, for matrices that are no LoRA factor (`add_rank_penalty`).
    lora_pattern: regular expression with the groups `down` and `up` for other names of factors.
    spatial_axes: `f(path, leaf) -> axes`; `None` is `flax_spatial_axes`. Under
      `optax.inject_hyperparams` name it in `static_args`.
    sd_scripts_compat: the PyTorch original's arithmetic, step by step, faults included.
    memory_efficient: keep state as `plan_memory` advises for `vram_budget_gb`, or without one for
      all the memory that the device reports (CPUs report none: nothing changes).
    vram_budget_gb: memory in GB (2^30 bytes) for parameters, gradients and state, > 0; implies
      `memory_efficient`. Activations are not in it.
    reduce_precision: keep all state in bf16, rounded stochastically (compat: to nearest), also
      where the budget would not need it.
    cpu_offload_states: keep all state in host memory, also where the budget would not need it.
    max_buffer_memory_mb: MB of hosted state that are on the device at once; `None`: 128, or the
      state of the largest parameter.
    adaptive_features: plan for 80% of the budget; `optimize_for_vram` re-plans a running state.
    emergency_simplify: where fp32 state needs more than 90% of the budget, switch off features with
      large state first (background, spatial, learning-rate mask, SPD), with a warning.
    leaf_batching: stack small leaves of equal shape (`with_leaf_batching`), which compiles LoRAs of
      hundreds of leaves in seconds; the state's trees become mappings of stacks. `None`: where any
      part is on beside Adam's moments and weight decay, which compile as fast leaf by leaf and
      save the copies into stacks. Sharded leaves stand alone; where a mesh of several devices is
      set nothing is stacked.
    max_batched_elements: elements up to which a leaf is small. `None`: 2**20.

  Returns:
    A `HinaTransformation`: an `optax.GradientTransformationExtraArgs` with an attribute `options`.
    State: 8 bytes a parameter for the core, 4 each for detail, background and SPD, 2 for the
    learning rates of elements.

  Raises:
    ValueError: an unknown or removed option (with what to use), a value outside its range, Grams
      together with Cautious, `params` missing at the update, a LoRA factor without its partner.
    TypeError: an option of the wrong type, a leaf that is not floating.
    hina_optax.memory.StateMemoryError: `init`, called on arrays, finds no memory for the state; it
      says how the state was to be kept and proposes a smaller plan.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import hina_optax
    >>> tx = hina_optax.hina_adaptive(1e-2, edge_suppression=True, spatial_awareness=True)
    >>> params = {"kernel": jnp.full((4, 4), 2.0)}
    >>> state = tx.init(params)
    >>> for _ in range(20):
    ...   grads = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2))(params)
    ...   updates, state = tx.update(grads, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> bool(jnp.all(params["kernel"] < 2.0))
    True

  References:
    `HinaAdaptive` of a fork of kohya's sd-scripts; the papers at each part.
  """
  return build(HinaOptions(**locals()))


def build(o: HinaOptions) -> HinaTransformation:
  """The transformation that checked options describe."""
  def choose_for(shapes: Any, layout: Layout | None) -> memory.PlannedTransformation:
    return _choose_plan(o, shapes, layout)

  choose_plan = memory.cache_plans(choose_for, functools.partial(_chain.make_layout, o))
  resolve = driver.get_resolver(_chain.build_transformation(o))
  if _memory_options.is_planned(o):
    def resolve(params: Any, state: Any) -> driver.Settings:
      paths.require_params(params, "a transformation with a memory plan")
      return driver.get_resolver(choose_plan(params, state).stored)(params, state)

  own_traits = Traits(
    options=o, choose_plan=choose_plan,
    rebuild=lambda **changes: build(o.replace(**changes)))
  tx = driver.make_transformation(resolve, own_traits)
  init = _out_of_memory.explain_failures(tx.init, o, make_plan)
  return HinaTransformation(*traits.attach_traits(init, tx.update, traits.get_traits(tx)))


def make_plan(o: HinaOptions, params: Any, reserve: int = 0) -> memory.MemoryPlan:
  """The memory plan of checked options. `reserve` bytes of the budget are kept for other uses."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  return _choose_plan(o, shapes, _chain.make_layout(o, params), reserve).plan


def relative_rates(o: HinaOptions) -> rate_units.RateUnits:
  """The learning rates of elements, as multiples of the common rate."""
  return rate_units.resolve(o)


def _choose_plan(
  o: HinaOptions, shapes: Any, layout: Layout | None, reserve: int = 0
) -> memory.PlannedTransformation:
  return _memory_options.choose_plan(
    o, lambda options: _chain.build_with_layout(options, layout), shapes, reserve)
