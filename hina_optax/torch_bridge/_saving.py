"""State on its way to and from `torch.save`: tensors, numbers and strings, nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import torch

from hina_optax.torch_bridge import _rules, _tensors, _version_1
from hina_optax.torch_bridge._cohort import Cohort, put

KEY = "hina_optax"
VERSION = 2
_ON_HOST = ("pinned_host", "unpinned_host")


def pack(
  identity: Mapping[str, Any], cohorts: Sequence[Sequence[Cohort]],
  groups: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
  """Everything but the groups' numbers, which torch saves."""
  return {
    "version": VERSION, "identity": dict(identity),
    "groups": [[_pack_cohort(c, group) for c in row] for row, group in zip(cohorts, groups)],
  }


def _pack_cohort(cohort: Cohort, group: Mapping[str, Any]) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(cohort.state)
  return {
    "version": VERSION,
    "members": list(cohort.members),
    "names": [cohort.names[i] for i in cohort.members],
    "shapes": [list(p.shape) for p in cohort.params(group)],
    "dtypes": [str(p.dtype) for p in cohort.params(group)],
    "arrays": {_key(path): _tensors.to_torch(_plain(x)) for path, x in leaves},
    "keys": {_key(path): str(jax.random.key_impl(x)) for path, x in leaves if _is_key(x)},
    "on_host": [_key(path) for path, x in leaves if x.sharding.memory_kind in _ON_HOST],
  }


def _key(path: Any) -> str:
  return jax.tree_util.keystr(path)


def _is_key(x: Any) -> bool:
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: jax.Array) -> jax.Array:
  return jax.random.key_data(x) if _is_key(x) else x


def check(packed: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
  """Refuses what another optimizer, or another version, has saved.

  Raises:
    ValueError: naming each difference.
  """
  if packed.get("version") not in (1, VERSION):
    raise ValueError(
      f"The state_dict has version {packed.get('version')}; this hina_optax reads versions 1 "
      f"and {VERSION}. Load it with the hina_optax that saved it.")
  saved = _version_1.identity(packed["identity"]) if packed["version"] == 1 else packed["identity"]
  differing = [name for name in {**saved, **identity} if saved.get(name) != identity.get(name)]
  if differing:
    lines = [f"  {name}: saved {saved.get(name)!r}, now {identity.get(name)!r}"
             for name in differing]
    raise ValueError("\n".join([
      "The state_dict was saved by an optimizer with other options:", *lines,
      "Give this one the saved options, or begin anew without the state."]))


def unpack(
  saved: Mapping[str, Any], group: Mapping[str, Any], names: Sequence[str], rule: _rules.Rule
) -> Cohort:
  """A cohort in the saved state, on its parameters' present device.

  Raises:
    ValueError: if a parameter or a piece of state differs from what was saved.
  """
  _check_members(saved, group, names)
  abstract = Cohort(group, names, saved["members"], rule, state=())
  like = jax.eval_shape(rule.init, abstract.shapes(group))
  paths, structure = jax.tree_util.tree_flatten_with_path(like)
  wanted = {_key(path): x for path, x in paths}
  if saved.get("version", 1) == 1:
    saved = _upgraded(saved, like, abstract.shapes(group), rule)
  _check_arrays(saved["arrays"], wanted)
  device = _tensors.jax_device(abstract.params(group)[0].device)
  leaves = [_restored(saved, name, device) for name in wanted]
  abstract.state = jax.tree.unflatten(structure, leaves)
  return abstract


def _upgraded(
  saved: Mapping[str, Any], like: Any, params: Any, rule: _rules.Rule
) -> dict[str, Any]:
  """What version 1 saved, in the form of today."""
  old = saved["arrays"]
  found = _version_1.upgraded(
    old, lambda key: _tensors.to_numpy(old[key]), like, params, rule.options)
  hosted = {_field(key) for key in saved["on_host"]}
  return {**saved, "arrays": {key: _tensors.to_torch(x) for key, x in found.items()},
          "on_host": [key for key in found if _field(key) in hosted]}


def _field(key: str) -> str:
  """The field of a state that a key stands in, without the leaf's own name."""
  return key[:key.rindex("[")] if "[" in key else key


def _restored(saved: Mapping[str, Any], name: str, device: jax.Device) -> jax.Array:
  kind = "pinned_host" if name in saved["on_host"] else None
  array = put(_tensors.to_numpy(saved["arrays"][name]), device, kind)
  if name in saved["keys"]:
    return jax.random.wrap_key_data(array, impl=saved["keys"][name])
  return array


def _check_members(
  saved: Mapping[str, Any], group: Mapping[str, Any], names: Sequence[str]
) -> None:
  rows = zip(saved["members"], saved["names"], saved["shapes"], saved["dtypes"])
  for place, name, shape, dtype in rows:
    p = group["params"][place]
    now = names[place], list(p.shape), str(p.dtype)
    if now[1:] != (shape, dtype):
      raise ValueError(
        f"Parameter '{now[0]}' is {now[1]} in {now[2]}, but the state was saved for '{name}', "
        f"{shape} in {dtype}. Give the parameters in the order and shapes of the saved run.")
    if now[0] != name:
      raise ValueError(
        f"Parameter {place} of its group is named '{now[0]}', but the state was saved for "
        f"'{name}'. Give the parameters in the order, and with the names, of the saved run.")


def _check_arrays(saved: Mapping[str, torch.Tensor], wanted: Mapping[str, Any]) -> None:
  lines = [f"  {name}: only in the saved state" for name in saved if name not in wanted]
  lines += [f"  {name}: not in the saved state" for name in wanted if name not in saved]
  for name in wanted:
    if name in saved:
      now = jax.eval_shape(_plain, wanted[name])
      then = _tensors.to_numpy(saved[name])
      if (now.shape, now.dtype) != (then.shape, then.dtype):
        lines.append(f"  {name}: saved {then.dtype}{list(then.shape)}, now "
                     f"{now.dtype}{list(now.shape)}")
  if lines:
    raise ValueError("\n".join([
      "The saved state is not of this optimizer and these parameters:", *lines[:20]]))
