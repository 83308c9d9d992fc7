"""The adaptive core: Adam's moments, torque-aware momentum, ADOPT's normalisation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import registry
from hina_optax.base import checks, leafwise, numerics
from hina_optax.base.numerics import Scalar
from hina_optax.base.positions import LeafNumbers
from hina_optax.registry import Figure, Option, Part

__all__ = ["ScaleByHinaState", "scale_by_hina"]

_TORQUE_EPS = 1e-8


class ScaleByHinaState(NamedTuple):
  """State of `scale_by_hina`.

  Attributes:
    count: int32 scalar, steps seen.
    mu: like the parameters, fp32: first moment. 4 bytes per parameter.
    nu: like the parameters, fp32: second moment. 4 bytes per parameter.
    torque: fp32, one number per leaf, found by its path: average of the cosine between momentum and
      gradient; `None` without `torque`. 4 bytes per leaf.
  """

  count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  mu: Any
  nu: Any
  torque: LeafNumbers | None


def scale_by_hina(
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-8,
  *,
  torque: str | None = None,
  torque_decay: Scalar = 0.9,
  stability: str | None = None,
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

  Elements of a gradient beyond 1.8e19, whose squares fp32 cannot hold, are clipped to it.

  `stability="adopt"` takes the second moment and clipping of `optax.contrib.scale_by_adopt`:
  :math:`g` is divided by :math:`\max(\sqrt{v_{t-1}}, \epsilon)`, clipped to :math:`\pm t^{1/4}` and
  averaged by `b1`; the first step only fills `v`. There is no bias correction.

  Args:
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: > 0, in units of the gradient, outside the square root.
    torque: `None`, `"average"` or `"sum"`.
    torque_decay: :math:`\gamma` in [0, 1). With 0.999 `d` stays close to 0.5 for the first thousand
      steps, which only halves the learning rate.
    stability: `None` or `"adopt"`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ScaleByHinaState`: 8 bytes per
    parameter, whatever the dtype of the parameters, and 4 per leaf with `torque`.

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
  checks.decay("b1", b1)
  checks.decay("b2", b2)
  checks.decay("torque_decay", torque_decay)
  checks.number("eps", eps, open_low=True)
  checks.choice("torque", torque, (None, "average", "sum"))
  checks.choice("stability", stability, (None, "adopt"))

  def step(leaf, g, old):
    del leaf
    # `numerics.cosine` handles large squares itself, and its sums are best read from the unclipped
    # gradient, which is in memory already.
    unclipped, g = g, numerics.clip_to_squarable(g)
    increment, nu = (
      _scale_by_adopt(g, old, b2, eps) if stability == "adopt"
      else (g, numerics.update_average(old.nu, jnp.square(g), b2))
    )
    a = old.torque
    if torque:
      a = numerics.update_average(a, numerics.cosine(old.mu, unclipped), torque_decay)
      increment = increment * (_TORQUE_EPS + (1 + a) / 2)
    decay = numerics.scalar(b1, g.dtype)
    mu = decay * old.mu + (increment if torque == "sum" else (1 - decay) * increment)
    u = mu
    if stability != "adopt":
      u = _adam_direction(mu, nu, eps, (b1, b2), None if torque == "sum" else old.count)
    return u, old._replace(mu=mu, nu=nu, torque=a)

  return leafwise.part(
    ScaleByHinaState, step, elements={"mu": 0.0, "nu": 0.0},
    numbers={"torque": 0.0} if torque else None)


def _scale_by_adopt(
  g: jax.Array, old: ScaleByHinaState, b2: Scalar, eps: Scalar
) -> tuple[jax.Array, jax.Array]:
  """The scaled `g` and the new `nu` of optax's ADOPT, without its momentum: `mu` is ours."""
  adopt = optax.contrib.scale_by_adopt(
    b1=0.0, b2=b2, eps=eps, clip_value_fn=lambda count: count.astype(g.dtype) ** 0.25
  )
  adopt_state = optax.ScaleByAdamState(count=old.count - 1, mu=jnp.zeros_like(g), nu=old.nu)
  scaled, new = adopt.update(g, adopt_state)
  return scaled, new.nu


def _adam_direction(
  mu: jax.Array, nu: jax.Array, eps: Scalar, betas: tuple[Scalar, Scalar], count: jax.Array | None
) -> jax.Array:
  """`mu / (sqrt(nu) + eps)`, with bias correction of both moments unless `count` is `None`."""
  if count is None:
    return mu / (jnp.sqrt(nu) + numerics.scalar(eps, mu.dtype))
  first, second = (numerics.bias_correction(b, count, mu.dtype) for b in betas)
  return (mu / first) / (jnp.sqrt(nu / second) + numerics.scalar(eps, mu.dtype))


def _check_betas(name: str, value: Any) -> None:
  if not isinstance(value, (tuple, list)) or len(value) != 2:
    raise ValueError(f"{name} must be a pair (b1, b2), got {value!r}.")
  for i, beta in enumerate(value):
    checks.decay(f"{name}[{i}]", beta)


def _build(options):
  return scale_by_hina(
    options.betas[0], options.betas[1], options.eps,
    torque="average" if options.use_tam else None,
    torque_decay=0.9 if options.tam_beta is None else options.tam_beta,
    stability="adopt" if options.use_adopt_stability else None)


registry.register(Part(
  scale_by_hina, ScaleByHinaState, "moments", 10, (
    Option("betas", (0.9, 0.999), registry.AllowedValues(_check_betas, "a pair, each in [0, 1)"),
           "decays of the two moments"),
    Option("eps", 1e-8, registry.POSITIVE, "added to the root of the second moment"),
    Option("use_tam", True, registry.FLAG, "torque-aware momentum (`torque` of `scale_by_hina`)",
           "torque on the direction", defines_state=True),
    Option("tam_beta", None, registry.DECAY, "decay of the torque; `None`: 0.9",
           "`None`: 0.999, nearly a constant 0.5"),
    Option("use_adopt_stability", True, registry.FLAG,
           "ADOPT's second moment (`stability` of `scale_by_hina`)",
           "maximum of two successive second moments", defines_state=True),
  ), ("use_tam", "use_adopt_stability"), _build, is_on=lambda options: True,
  # ADOPT has the same state as Adam, so a state does not show it.
  shows={"use_tam": lambda state: state.torque is not None,
         "use_adopt_stability": lambda state: False},
  figures={"torque": Figure("torque", -2.0)},
  examples={"": {}, "torque": {"torque": "average"}, "torque-sum": {"torque": "sum"},
            "adopt": {"stability": "adopt"},
            "torque-adopt": {"torque": "average", "stability": "adopt"}}))
