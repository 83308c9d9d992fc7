"""The adaptive core: Adam's moments, torque-aware momentum, ADOPT's normalisation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import _checks, _leaves, _numerics, _parts, _visits
from hina_optax._numerics import Scalar

_TORQUE_EPS = 1e-8


class ScaleByHinaState(NamedTuple):
  """State of `scale_by_hina`.

  Attributes:
    count: int32 scalar, steps seen.
    mu: like the parameters, fp32: first moment. 4 bytes a parameter.
    nu: like the parameters, fp32: second moment. 4 bytes a parameter.
    torque: fp32 vector, one number a leaf: average of the cosine between momentum and gradient;
      `None` without `torque`.
  """

  count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  mu: Any
  nu: Any
  torque: jax.Array | None


def scale_by_hina(
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-8,
  *,
  torque: str | None = None,
  torque_decay: Scalar = 0.9,
  stability: str | None = None,
  precise_debias: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Adam's direction, with torque-aware momentum and a steadier second moment if asked for.

  Without `torque` and `stability` this is `optax.scale_by_adam` with fp32 moments:

  .. math::
    m = \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2, \quad
    u = \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

  `torque` damps gradients that pull away from the momentum. Per leaf,
  :math:`a = \gamma a + (1-\gamma) \cos(m_{t-1}, g)` and :math:`d = (1+a)/2`, then

  - `"average"`: :math:`m = \beta_1 m + (1-\beta_1)(10^{-8} + d)\, g`, bias corrected as Adam's. The
    published rule in Adam's normalisation, so that a learning rate keeps its meaning.
  - `"sum"`: :math:`m = \beta_1 m + (10^{-8} + d)\, g` and no bias correction: AdaTAM exactly as
    published. Its steps are about five times Adam's.
  - `"direction"`: the PyTorch original: `m` as in Adam, `a` from the new `m`, :math:`u \leftarrow
    d\,u`.

  Numbers of a gradient beyond 1.8e19, whose squares fp32 cannot hold, count as that.

  `stability`:

  - `"adopt"`: the second moment and clipping of `optax.contrib.scale_by_adopt`: :math:`g` is
    divided by :math:`\max(\sqrt{v_{t-1}}, \epsilon)`, clipped to :math:`\pm t^{1/4}` and averaged
    by `b1`; the first step only fills `v`. There is no bias correction.
  - `"max"`: the PyTorch original: `v` in the denominator becomes :math:`\max(v_t, v_{t-1})`.

  Args:
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: > 0, in units of the gradient, outside the square root.
    torque: `None`, `"average"`, `"sum"` or `"direction"`.
    torque_decay: :math:`\gamma` in [0, 1). The original's 0.999 makes `d` close to a constant 0.5
      for the first thousand steps: it then only halves the learning rate.
    stability: `None`, `"adopt"` or `"max"`.
    precise_debias: :math:`1-\beta^t` to fp32 precision, as PyTorch has it, where `b1` and `b2` are
      Python numbers. `False` is optax's arithmetic, whose first steps are 6e-6 off.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ScaleByHinaState`: 8 bytes a parameter,
    whatever the dtype of the parameters, and 4 a leaf with `torque`.

  Raises:
    ValueError: if an argument lies outside its range or a decay arrives in bf16.
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.scale_by_hina()
    >>> grads = {"w": jnp.array([0.1, -20.0])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> [round(float(x), 4) for x in updates["w"]]
    [1.0, -1.0]

  References:
    Kingma, Ba, Adam, arXiv 1412.6980. Malviya et al., Torque-aware momentum, arXiv 2412.18790.
    Taniguchi et al., ADOPT, NeurIPS 2024, arXiv 2411.02853. `use_tam` and `use_adopt_stability` of
    `HinaAdaptive`.
  """
  _checks.decay("b1", b1)
  _checks.decay("b2", b2)
  _checks.decay("torque_decay", torque_decay)
  _checks.number("eps", eps, open_low=True)
  _checks.choice("torque", torque, (None, "average", "sum", "direction"))
  _checks.choice("stability", stability, (None, "adopt", "max"))
  _checks.flag("precise_debias", precise_debias)

  def init(params: Any) -> ScaleByHinaState:
    return ScaleByHinaState(
      count=jnp.zeros([], jnp.int32),
      mu=_leaves.per_element_state(params),
      nu=_leaves.per_element_state(params),
      torque=_visits.per_leaf_scalars(params) if torque else None,
    )

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    count = optax.safe_increment(state.count)

    def normalise(g, nu):
      # optax's ADOPT without its momentum, which would be a copy of ours.
      adopt = optax.contrib.scale_by_adopt(
        b1=0.0, b2=b2, eps=eps, clip_value_fn=lambda count: count.astype(g.dtype) ** 0.25
      )
      old = optax.ScaleByAdamState(count=state.count, mu=jnp.zeros_like(g), nu=nu)
      scaled, new = adopt.update(g, old)
      return scaled, new.nu

    def step(leaf, g, read, trees, scalars):
      del read
      (mu, nu), dtype = trees, g.dtype
      # Cosines take care of their own squares, and sums want what is in memory already.
      whole, g = g, _numerics.squarable(g)
      a = scalars[0].astype(dtype) if scalars else jnp.zeros([], dtype)
      source, new_nu = (
        normalise(g, nu) if stability == "adopt"
        else (g, _numerics.average(nu, jnp.square(g), b2))
      )
      if torque in ("average", "sum"):
        a = _numerics.average(a, _numerics.cosine(mu, whole), torque_decay)
        source = source * (_TORQUE_EPS + (1 + a) / 2)
      keep = _numerics.scalar(b1, dtype)
      new_mu = keep * mu + (source if torque == "sum" else (1 - keep) * source)
      if stability == "adopt" and leaf.stacked:
        # The last to read the old second moment, which need not be copied then.
        new_nu = _numerics.after([new_mu], new_nu)
      u = new_mu
      if stability != "adopt":
        shown = jnp.maximum(nu, new_nu) if stability == "max" else new_nu
        seen = None if torque == "sum" else count
        u = _adam_direction(u, shown, eps, (b1, b2), seen, precise_debias)
      if torque == "direction":
        a = _numerics.average(a, _numerics.cosine(new_mu, whole), torque_decay)
        u = u * ((1 + a) / 2)
      return u, (new_mu, new_nu), (a,) if torque else ()

    visited = _visits.visit(
      step, updates, trees=(state.mu, state.nu), scalars=(state.torque,) if torque else ()
    )
    new_torque = visited.scalars[0] if torque else None
    mu, nu = visited.trees
    return visited.updates, ScaleByHinaState(count, mu, nu, new_torque)

  return _parts.Part(init, update, params="ignores")


def _adam_direction(
  mu: jax.Array, nu: jax.Array, eps: Scalar, betas: tuple[Scalar, Scalar], count: jax.Array | None,
  precise: bool,
) -> jax.Array:
  """`mu / (sqrt(nu) + eps)`, both corrected for their start from zero unless `count` is `None`."""
  if count is None:
    return mu / (jnp.sqrt(nu) + _numerics.scalar(eps, mu.dtype))
  first, second = (_numerics.debias(b, count, mu.dtype, precise) for b in betas)
  return (mu / first) / (jnp.sqrt(nu / second) + _numerics.scalar(eps, mu.dtype))
