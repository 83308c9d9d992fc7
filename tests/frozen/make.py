"""Optimizer states of hina_optax 0.1.0 (commit ec2a279), frozen as files.

A later version proves on them that it goes on where this one was. They are made once, by the code
of that commit and not by the present one:

    git worktree add /tmp/old ec2a279
    PYTHONPATH=/tmp/old .venv/bin/python tests/frozen/make.py

What it writes beside itself:

- `NAME.npz` and `NAME.json`, for each of `CASES`: after `STEPS` steps `state/00000`, ..., the
  arrays of `pack_state`, and `params/PATH`; after `MORE` further steps `after/PATH`, and
  `updates/PATH` of the last of them; of what was kept in 8 bits `numbers/NAME`, its values to 8
  bits of precision. In the JSON the stamp, and which arrays are bfloat16 under a view as uint16.
- `gradients.npz`: `TREE/STEP/PATH`, those of the further steps; the ones before are random numbers
  of the same seed.
- `raw.npz` and `raw.json`: the state of `defaults` as it was between steps, array by array: its
  trees are dicts with one flat array a stack, and there are vectors of one number a leaf. In the
  JSON the path of each, as `jax.tree_util.keystr` has it and key by key.
- `torch_NAME.pt`, for each of `TORCH_CASES`: the `state_dict` after `TORCH_STEPS` steps, `before`
  and `after` (`MORE` steps later) the parameters, `gradients` the ones of these steps.

No visit of importance falls on the further steps: what it looks at may be measured elsewhere.
"""

import inspect
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hina_optax as ho

FOLDER = pathlib.Path(__file__).parent
STEPS, MORE, TORCH_STEPS = 5, 2, 4
# Version 0.1.0 had no limit on the share of the gradient that AGR takes.
UNLIMITED: dict[str, Any] = {
  name: 1.0 for name in inspect.signature(ho.hina_adaptive).parameters if name == "agr_limit"}
EVERYTHING: dict[str, Any] = dict(
  **UNLIMITED, learning_rate=1e-2, edge_suppression=True, spatial_awareness=True,
  lora_rank_penalty=True, use_orthogonal_grad=True, relationship_discovery_interval=4,
)

_PAIR: dict[str, tuple[int, ...]] = {"lora_a": (6, 2), "lora_b": (2, 5)}
_SMALL: dict[str, Any] = {
  "attn": _PAIR,
  "bias": (5,),
  "conv": {"kernel": (3, 3, 2, 4)},
  "dense": {"kernel": (12, 20)},
  "empty": (0, 3),
  **{f"layer{i}": _PAIR for i in range(4)},
  "scale": (),
  "square": (6, 6),
}
# "large" has a matrix that is kept in bf16 or 8 bits where the options say so.
TREES = {"small": _SMALL, "large": {**_SMALL, "dense": {"kernel": (64, 96)}}}


class Case(NamedTuple):
  """An optimizer, the tree it is run on, and the same optimizer with its state in fp32."""

  make: Callable[[], Any]
  tree: str = "small"
  plain: Callable[[], Any] | None = None


def everything(**options: Any) -> Any:
  return ho.hina_adaptive(**{**EVERYTHING, **options})


def adamw() -> Any:
  return optax.adamw(1e-2)


def parts() -> Any:
  """A chain as a user builds it, leaf by leaf."""
  direction = ho.cautious(ho.scale_by_hina(torque="average", stability="adopt"))
  rates = ho.scale_by_importance(ho.scale_by_sign_agreement(direction), interval=4)
  steps = optax.chain(rates, ho.add_scheduled_weight_decay(0.01, transition_steps=3),
                      optax.scale_by_learning_rate(1e-2))
  return optax.chain(ho.suppress_edges(0.2), ho.preserve_detail(0.8),
                     ho.attenuate_background(mode="fast"), ho.project_to_init(steps))


def decays(params: Any) -> Any:
  """Weight decay on leaves of two axes and more, but not in two of the layers."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.ndim > 1 and path[0].key not in ("layer0", "layer1"), params)


CASES = {
  "defaults": Case(lambda: ho.hina_adaptive(1e-2, **UNLIMITED)),
  "everything": Case(everything, "large"),
  "unbatched": Case(lambda: everything(leaf_batching=False)),
  "bf16": Case(lambda: everything(reduce_precision=True), "large", everything),
  "8-bit": Case(lambda: ho.with_quantized_state(everything()), "large", everything),
  "compat": Case(lambda: everything(sd_scripts_compat=True)),
  "adamw-batched": Case(lambda: ho.with_leaf_batching(adamw())),
  "adamw-bf16": Case(lambda: ho.with_state_dtype(adamw()), "large", adamw),
  "host": Case(lambda: ho.with_host_offload(ho.hina_adaptive(1e-2, **UNLIMITED), min_bytes=0)),
  "parts": Case(parts),
  "masked": Case(lambda: ho.hina_adaptive(1e-2, **UNLIMITED, weight_decay_mask=decays)),
}


def _spread(shapes: dict[str, Any], head: str = "") -> dict[str, tuple[int, ...]]:
  """A tree of shapes by path."""
  found: dict[str, tuple[int, ...]] = {}
  for name, x in shapes.items():
    found |= _spread(x, f"{head}{name}/") if isinstance(x, dict) else {f"{head}{name}": x}
  return found


def nested(flat: dict[str, Any]) -> dict[str, Any]:
  """The tree of what is given by path."""
  tree: dict[str, Any] = {}
  for path, x in flat.items():
    *head, last = path.split("/")
    node = tree
    for name in head:
      node = node.setdefault(name, {})
    node[last] = x
  return tree


def by_path(tree: dict[str, Any], head: str) -> dict[str, np.ndarray]:
  """Inverse of `nested`, each path under `head`."""
  return {
    f"{head}/{'/'.join(key.key for key in path)}": np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _random(tree: str, seed: int) -> Any:
  rng = np.random.default_rng(seed)
  return nested({path: jnp.asarray(rng.normal(size=shape), jnp.float32)
                 for path, shape in _spread(TREES[tree]).items()})


def _gradients(tree: str) -> list[Any]:
  return [_random(tree, 100 + step) for step in range(STEPS + MORE)]


def rows_by_name(arrays: dict[str, Any], stamp: dict[str, Any]) -> dict[str, list[np.ndarray]]:
  """What `pack_state` gave, leaf by leaf: one flat array, or codes and scales of 8 bits."""
  found = {}
  for entry in stamp["arrays"]:
    whole = [np.asarray(arrays[key]) if key else np.zeros(shape)
             for key, (shape, _) in zip(entry["keys"], entry["arrays"])]
    for i, name in enumerate(entry["names"]):
      found[name] = [(x if entry["row"] is None else x[i]).reshape(-1) for x in whole]
  return found


def _step(tx: Any) -> Callable[..., Any]:
  def step(params: Any, state: Any, gradient: Any) -> Any:
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, updates

  return jax.jit(step)


def _freeze(name: str, case: Case) -> None:
  tx, params, given = case.make(), _random(case.tree, 0), _gradients(case.tree)
  state, step = tx.init(params), _step(tx)
  for gradient in given[:STEPS]:
    params, state, _ = step(params, state, gradient)
  arrays, stamp = ho.pack_state(tx, state, params)
  arrays = {key: np.asarray(x) for key, x in arrays.items()}
  saved = {f"state/{key}": x for key, x in arrays.items()} | by_path(params, "params")
  saved |= _numbers_of_8_bits(case, arrays, stamp, params)
  if name == "defaults":
    _freeze_raw(state)
  for gradient in given[STEPS:]:
    params, state, updates = step(params, state, gradient)
  saved |= by_path(params, "after") | by_path(updates, "updates")
  narrow = sorted(key for key, x in saved.items() if x.dtype == jnp.bfloat16)
  saved |= {key: saved[key].view(np.uint16) for key in narrow}
  np.savez_compressed(FOLDER / f"{name}.npz", **saved)
  _write(FOLDER / f"{name}.json", {
    "made_with": {"hina_optax": ho.__version__, "jax": jax.__version__, "optax": optax.__version__},
    "bfloat16": narrow, "stamp": stamp})


def _numbers_of_8_bits(
  case: Case, arrays: dict[str, Any], stamp: dict[str, Any], params: Any
) -> dict[str, np.ndarray]:
  packed = {name for entry in stamp["arrays"] if len(entry["arrays"]) > 1
            for name in entry["names"]}
  if not packed or case.plain is None:
    return {}
  tx = case.plain()
  opened = ho.pack_state(tx, ho.unpack_state(tx, arrays, stamp, params), params)
  return {f"numbers/{name}": rows[0].astype(jnp.bfloat16)
          for name, rows in rows_by_name(*opened).items() if name in packed}


def _freeze_raw(state: Any) -> None:
  kinds = {"GetAttrKey": "name", "SequenceKey": "idx", "DictKey": "key"}
  pairs = jax.tree_util.tree_leaves_with_path(state)
  if not any("[6x2]" in jax.tree_util.keystr(path) for path, _ in pairs):
    sys.exit(f"{ho.__file__} keeps its state in another form than hina_optax 0.1.0: see above.")
  np.savez_compressed(FOLDER / "raw.npz", **{str(i): x for i, (_, x) in enumerate(pairs)})
  _write(FOLDER / "raw.json", [
    {"array": str(i), "path": jax.tree_util.keystr(path),
     "keys": [[type(k).__name__, getattr(k, kinds[type(k).__name__])] for k in path]}
    for i, (path, _) in enumerate(pairs)])


def _write(file: pathlib.Path, content: Any) -> None:
  file.write_text(f"{json.dumps(content, indent=None, separators=(',', ':'))}\n")


_DENSE: dict[str, tuple[int, ...]] = {
  "conv.weight": (4, 3, 3, 3), "dense.weight": (12, 10), "dense.bias": (12,), "norm.weight": (12,),
  "out.weight": (12, 10),
}
_PAIRS: dict[str, tuple[int, ...]] = {"head.bias": (5,), **{
  f"layers.{i}.{kind}.weight": shape for i in range(3)
  for kind, shape in (("lora_down", (2, 6)), ("lora_up", (5, 2)))
}}


class TorchCase(NamedTuple):
  """A torch optimizer and the shapes of its parameters by name."""

  make: Callable[[dict[str, Any]], Any]
  shapes: dict[str, tuple[int, ...]]


def _edges(params: dict[str, Any]) -> Any:
  from hina_optax.torch_bridge import HinaAdaptive

  return HinaAdaptive(list(params.values()), lr=1e-2, **UNLIMITED, edge_suppression=True)


def _pairs(params: dict[str, Any]) -> Any:
  from hina_optax.torch_bridge import HinaAdaptive

  return HinaAdaptive(list(params.items()), lr=1e-2, **UNLIMITED, lora_rank_penalty=True,
                      relationship_discovery_interval=4)


def _compat(params: dict[str, Any]) -> Any:
  from hina_optax.torch_bridge import HinaAdaptive

  return HinaAdaptive(list(params.items()), lr=1e-2, **UNLIMITED, sd_scripts_compat=True,
                      relationship_discovery_interval=4)


def _bf16(params: dict[str, Any]) -> Any:
  from hina_optax.torch_bridge import HinaAdaptive

  return HinaAdaptive(list(params.values()), lr=1e-2, **UNLIMITED, reduce_precision=True)


def _injected(params: dict[str, Any]) -> Any:
  """Two groups with learning rates of their own."""
  from hina_optax.torch_bridge import OptaxOptimizer

  first, *others = params.values()
  groups = [{"params": [first], "lr": 5e-3}, {"params": others}]
  return OptaxOptimizer(groups, optax.inject_hyperparams(optax.adamw)(1e-2))


TORCH_CASES = {
  "edges": TorchCase(_edges, _DENSE),
  "pairs": TorchCase(_pairs, _PAIRS),
  "compat": TorchCase(_compat, {**_DENSE, **_PAIRS}),
  "bf16": TorchCase(_bf16, {**_DENSE, "wide.weight": (32, 40)}),
  "injected": TorchCase(_injected, _DENSE),
}


def torch_steps(optimizer: Any, params: dict[str, Any], gradients: list[dict[str, Any]]) -> None:
  """One step for each tree of gradients."""
  for gradient in gradients:
    for name, p in params.items():
      p.grad = gradient[name].clone()
    optimizer.step()


def _freeze_torch(name: str, case: TorchCase) -> None:
  import torch

  def random(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {n: torch.tensor(rng.normal(size=shape).astype(np.float32))
            for n, shape in case.shapes.items()}

  def now() -> dict[str, Any]:
    return {n: p.detach().clone() for n, p in params.items()}

  params = {n: torch.nn.Parameter(x) for n, x in random(0).items()}
  given = [random(100 + step) for step in range(TORCH_STEPS + MORE)]
  optimizer = case.make(params)
  torch_steps(optimizer, params, given[:TORCH_STEPS])
  saved = {"state_dict": optimizer.state_dict(), "before": now(), "gradients": given[TORCH_STEPS:]}
  torch_steps(optimizer, params, given[TORCH_STEPS:])
  torch.save(saved | {"after": now()}, FOLDER / f"torch_{name}.pt")


def main() -> None:
  """Writes all files."""
  # Read when JAX first computes: compiling is most of what this does.
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
  print(f"states of {ho.__file__}")
  for name, case in CASES.items():
    _freeze(name, case)
    print(name, flush=True)
  np.savez_compressed(FOLDER / "gradients.npz", **{
    key: x for tree in TREES for i, gradient in enumerate(_gradients(tree)[STEPS:])
    for key, x in by_path(gradient, f"{tree}/{i}").items()})
  for name, case in TORCH_CASES.items():
    _freeze_torch(name, case)
    print(f"torch_{name}", flush=True)


if __name__ == "__main__":
  main()
