"""Checkpoints of one run; an incomplete checkpoint never replaces a complete one."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from latent_diffusion.errors import UserError


class Checkpoints:
  """The last two states of a run, with the records up to then."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder.absolute()
    self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
      max_to_keep=2, enable_async_checkpointing=False, create=True))

  def save(self, step: int, state: Any, history: list[dict[str, Any]]) -> None:
    """Writes to a temporary folder, which is then renamed."""
    leaves = {f"{i:05d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    self._manager.save(step, args=ocp.args.Composite(
      state=ocp.args.StandardSave(leaves), history=ocp.args.JsonSave({"rows": history})))

  def restore(self, state: Any) -> tuple[Any, list[dict[str, Any]]] | None:
    """Restores the last state in the structure and sharding of `state`; `None` if there is none."""
    step = self._manager.latest_step()
    if step is None:
      return None
    leaves, tree = jax.tree.flatten(state)
    like = {f"{i:05d}": np.empty(x.shape, x.dtype) for i, x in enumerate(leaves)}
    try:
      found = self._manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(like), history=ocp.args.JsonRestore()))
    except (ValueError, KeyError) as error:
      raise UserError(f"{self.folder} holds another model or optimizer: {error}") from None
    placed = [jax.device_put(found.state[name], x.sharding) for name, x in zip(like, leaves)]
    return jax.tree.unflatten(tree, placed), found.history["rows"]

  def close(self) -> None:
    """Releases the folder."""
    self._manager.close()
