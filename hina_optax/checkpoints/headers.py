"""Shapes and dtypes of a checkpoint's arrays, from its header alone."""

import pathlib
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shapes = dict[str, jax.ShapeDtypeStruct]

_SAFETENSORS_DTYPES = {
  "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
  "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}


def read_shapes(path: pathlib.Path) -> Shapes:
  """Reads the names, shapes and dtypes of a checkpoint's floating arrays from its header.

  Raises:
    FileNotFoundError: if `path` does not exist.
    ValueError: if it is neither a safetensors file, an `.npz` file nor an Orbax folder, or if it
      holds no floating array.
    ImportError: if the package that reads the format is not installed.
  """
  if not path.exists():
    raise FileNotFoundError(f"There is no checkpoint at {path}.")
  if path.is_dir():
    shapes = _read_orbax(path)
  elif path.suffix == ".npz":
    shapes = _read_npz(path)
  else:
    shapes = _read_safetensors(path)
  floating = {k: x for k, x in shapes.items() if jnp.issubdtype(x.dtype, jnp.floating)}
  if not floating:
    raise ValueError(f"{path} holds no floating array.")
  return floating


def _read_safetensors(path: pathlib.Path) -> Shapes:
  try:
    import safetensors
  except ImportError as error:
    raise ImportError("Reading checkpoints needs: pip install 'hina-optax[cli]'") from error
  try:
    with safetensors.safe_open(path, framework="np") as file:
      slices = {name: file.get_slice(name) for name in file.keys()}
      types = {name: (x.get_shape(), x.get_dtype()) for name, x in slices.items()}
  except safetensors.SafetensorError as error:
    raise _unreadable_error(path, error) from error
  # Other dtypes stand as int8: `read_shapes` drops what is not floating.
  return {
    name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(_SAFETENSORS_DTYPES.get(dtype, "int8")))
    for name, (shape, dtype) in types.items()
  }


def _read_npz(path: pathlib.Path) -> Shapes:
  shapes = {}
  try:
    with zipfile.ZipFile(path) as archive:
      for member in archive.namelist():
        with archive.open(member) as file:
          version = np.lib.format.read_magic(file)
          read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
          }[version]
          shape, _, dtype = read_header(file)
        shapes[member.removesuffix(".npy")] = jax.ShapeDtypeStruct(shape, dtype)
  except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
    raise _unreadable_error(path, error) from error
  return shapes


def _read_orbax(path: pathlib.Path) -> Shapes:
  try:
    import orbax.checkpoint as ocp
  except ImportError as error:
    raise ImportError("Reading Orbax checkpoints needs: pip install 'hina-optax[cli]'") from error
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree: Any = checkpointer.metadata(path.absolute())
    # Orbax may wrap the tree of metadata once or twice.
    tree = getattr(tree, "item_metadata", tree)
    tree = getattr(tree, "tree", tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
      raise ValueError("no arrays in its metadata")
    return {
      "/".join(str(getattr(key, "key", key)) for key in path_in_tree):
        jax.ShapeDtypeStruct(tuple(x.shape), jnp.dtype(x.dtype))
      for path_in_tree, x in leaves if getattr(x, "shape", None) is not None
    }
  except (FileNotFoundError, ValueError, AttributeError, TypeError) as error:
    raise _unreadable_error(path, error) from error


def _unreadable_error(path: pathlib.Path, error: Exception) -> ValueError:
  return ValueError(
    f"{path} is not a checkpoint that can be read: give a .safetensors file, an .npz file or an "
    f"Orbax folder ({type(error).__name__}: {error})."
  )
