"""Conversion of state to and from what `torch.save` can save: tensors, numbers and strings."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import torch
from jax.tree_util import keystr

from hina_optax import registry
from hina_optax.torch_bridge import _rules, _tensors, _version_1
from hina_optax.torch_bridge._subgroup import Subgroup, put_array

KEY = "hina_optax"
VERSION = 2
_HOST_MEMORY_KINDS = ("pinned_host", "unpinned_host")


def pack(
  identity: Mapping[str, Any], subgroups: Sequence[Sequence[Subgroup]],
  groups: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
  """Packs everything but the hyperparameters of the groups, which torch saves itself.

  Args:
    identity: the optimizer's class and options, which must be the same when the state is loaded.
    subgroups: the subgroups of each group.
    groups: torch's parameter groups.
  """
  return {
    "version": VERSION, "identity": dict(identity),
    "groups": [[_pack_subgroup(subgroup, group) for subgroup in subgroups_of_group]
               for subgroups_of_group, group in zip(subgroups, groups)],
  }


def _pack_subgroup(subgroup: Subgroup, group: Mapping[str, Any]) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(subgroup.state)
  return {
    "version": VERSION,
    "members": list(subgroup.members),
    "names": [subgroup.names[i] for i in subgroup.members],
    "shapes": [list(p.shape) for p in subgroup.params(group)],
    "dtypes": [str(p.dtype) for p in subgroup.params(group)],
    "arrays": {keystr(path): _tensors.to_torch(_unwrap_prng_key(x)) for path, x in leaves},
    "keys": {keystr(path): str(jax.random.key_impl(x)) for path, x in leaves if _is_prng_key(x)},
    "on_host": [
      keystr(path) for path, x in leaves if x.sharding.memory_kind in _HOST_MEMORY_KINDS],
  }


def _is_prng_key(x: Any) -> bool:
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _unwrap_prng_key(x: jax.Array) -> jax.Array:
  return jax.random.key_data(x) if _is_prng_key(x) else x


def check_identity(packed: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
  """Refuses a state that another optimizer, or a newer version, has saved.

  Raises:
    ValueError: with a list of all differences.
  """
  if packed.get("version") not in (1, VERSION):
    raise ValueError(
      f"The state_dict has version {packed.get('version')}; this hina_optax reads versions 1 "
      f"and {VERSION}. Load it with the hina_optax that saved it.")
  saved = packed["identity"]
  if packed["version"] == 1:
    saved = _version_1.upgrade_identity(saved)
  options = registry.options()
  # An option that the saving version did not have yet, and that no state depends on, is no reason.
  unknown = {name for name in identity
             if name not in saved and name in options and not options[name].defines_state}
  differing = [name for name in {**saved, **identity}
               if saved.get(name) != identity.get(name) and name not in unknown]
  if differing:
    lines = [f"  {name}: saved {saved.get(name)!r}, now {identity.get(name)!r}"
             for name in differing]
    raise ValueError("\n".join([
      "The state_dict was saved by an optimizer with other options:", *lines,
      "Give this one the saved options, or begin anew without the state."]))


def unpack_subgroup(
  saved: Mapping[str, Any], group: Mapping[str, Any], names: Sequence[str],
  rule: _rules.UpdateRule,
) -> Subgroup:
  """Restores a subgroup and its state, on the device where its parameters are now.

  Raises:
    ValueError: if a parameter or an array of the state differs from what was saved.
  """
  _check_members(saved, group, names)
  # The empty state is replaced below, once its structure is known.
  subgroup = Subgroup(group, names, saved["members"], rule, state=())
  abstract = jax.eval_shape(rule.init, subgroup.shapes(group))
  leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
  expected = {keystr(path): x for path, x in leaves}
  if saved.get("version", 1) == 1:
    saved = _upgrade(saved, abstract, subgroup.shapes(group), rule)
  _check_arrays(saved["arrays"], expected)
  device = _tensors.jax_device(subgroup.params(group)[0].device)
  subgroup.state = jax.tree.unflatten(
    structure, [_restore_array(saved, key, device) for key in expected])
  return subgroup


def _upgrade(
  saved: Mapping[str, Any], abstract: Any, params: Any, rule: _rules.UpdateRule
) -> dict[str, Any]:
  """Converts a subgroup that version 1 saved to the present format."""
  old = saved["arrays"]
  new = _version_1.upgrade_arrays(
    old, lambda key: _tensors.to_numpy(old[key]), abstract, params, rule.options)
  hosted_fields = {_field(key) for key in saved["on_host"]}
  return {**saved, "arrays": {key: _tensors.to_torch(x) for key, x in new.items()},
          "on_host": [key for key in new if _field(key) in hosted_fields]}


def _field(key: str) -> str:
  """Returns the part of a key that names the field of a state, without the name of the leaf."""
  return key[:key.rindex("[")] if "[" in key else key


def _restore_array(saved: Mapping[str, Any], key: str, device: jax.Device) -> jax.Array:
  memory_kind = "pinned_host" if key in saved["on_host"] else None
  array = put_array(_tensors.to_numpy(saved["arrays"][key]), device, memory_kind)
  if key in saved["keys"]:
    return jax.random.wrap_key_data(array, impl=saved["keys"][key])
  return array


def _check_members(
  saved: Mapping[str, Any], group: Mapping[str, Any], names: Sequence[str]
) -> None:
  members = zip(saved["members"], saved["names"], saved["shapes"], saved["dtypes"])
  for index, saved_name, saved_shape, saved_dtype in members:
    p = group["params"][index]
    name, shape, dtype = names[index], list(p.shape), str(p.dtype)
    if (shape, dtype) != (saved_shape, saved_dtype):
      raise ValueError(
        f"Parameter '{name}' is {shape} in {dtype}, but the state was saved for '{saved_name}', "
        f"{saved_shape} in {saved_dtype}. Give the parameters in the order and shapes of the saved "
        "run.")
    if name != saved_name:
      raise ValueError(
        f"Parameter {index} of its group is named '{name}', but the state was saved for "
        f"'{saved_name}'. Give the parameters in the order, and with the names, of the saved run.")


def _check_arrays(saved: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> None:
  lines = [f"  {key}: only in the saved state" for key in saved if key not in expected]
  lines += [f"  {key}: not in the saved state" for key in expected if key not in saved]
  for key in expected:
    if key in saved:
      now = jax.eval_shape(_unwrap_prng_key, expected[key])
      before = _tensors.to_numpy(saved[key])
      if (now.shape, now.dtype) != (before.shape, before.dtype):
        lines.append(f"  {key}: saved {before.dtype}{list(before.shape)}, now "
                     f"{now.dtype}{list(now.shape)}")
  if lines:
    raise ValueError("\n".join([
      "The saved state is not of this optimizer and these parameters:", *lines[:20]]))
