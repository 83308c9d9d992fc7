"""Parameter trees of the sizes that people train, as shapes in Flax's layout."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = dict[str, Any]
_TIME, _CONTEXT, _ADDED = 1280, 2048, 2816


def sdxl_unet() -> Tree:
  """The U-Net of SDXL: 2.57 billion parameters, from its published configuration."""
  tree: Tree = {
    "conv_in": _conv(4, 320), "conv_out": _conv(320, 4), "norm_out": _norm(320),
    "time": {"0": _dense(320, _TIME), "1": _dense(_TIME, _TIME)},
    "added": {"0": _dense(_ADDED, _TIME), "1": _dense(_TIME, _TIME)},
  }
  skips, channels = [320], 320
  for level, (width, depth) in enumerate(((320, 0), (640, 2), (1280, 10))):
    block: Tree = {}
    for i in range(2):
      block[f"res{i}"] = _resnet(channels, width)
      channels = width
      skips.append(width)
      if depth:
        block[f"attn{i}"] = _transformer(width, depth)
    if level < 2:
      block["downsample"] = _conv(width, width)
      skips.append(width)
    tree[f"down{level}"] = block
  tree["mid"] = {
    "res0": _resnet(1280, 1280), "attn0": _transformer(1280, 10), "res1": _resnet(1280, 1280)}
  for level, (width, depth) in enumerate(((1280, 10), (640, 2), (320, 0))):
    block = {}
    for i in range(3):
      block[f"res{i}"] = _resnet(channels + skips.pop(), width)
      channels = width
      if depth:
        block[f"attn{i}"] = _transformer(width, depth)
    if level < 2:
      block["upsample"] = _conv(width, width)
    tree[f"up{level}"] = block
  return tree


def lora_of(tree: Tree, rank: int, target: str = "attn") -> Tree:
  """LoRA factors for every dense kernel below a node whose name begins with `target`."""

  def factors(node: Any, inside: bool) -> Any:
    if not isinstance(node, dict):
      return None
    kernel = node.get("kernel")
    if inside and kernel is not None and len(kernel.shape) == 2:
      into, out = kernel.shape
      return {"lora_a": _array(into, rank), "lora_b": _array(rank, out)}
    found = {k: factors(v, inside or k.startswith(target)) for k, v in node.items()}
    return {k: v for k, v in found.items() if v} or None

  return factors(tree, False)


def lora_420() -> Tree:
  """LoRA of rank 16 for 21 transformer layers of 640 channels: 420 factors, 7.4 M parameters."""
  return lora_of({f"attn{i}": _layer(640) for i in range(21)}, 16)


def dense_17m() -> Tree:
  """A residual convolutional classifier with a head of three dense layers: 17 M parameters."""
  tree: Tree = {"stem": _conv(3, 64)}
  channels = 64
  for level, width in enumerate((64, 128, 256, 512)):
    for i in range(2):
      shortcut = {"shortcut": _conv(channels, width, 1)} if channels != width else {}
      tree[f"block{level}_{i}"] = {
        "norm": _norm(channels), "conv1": _conv(channels, width), "conv2": _conv(width, width),
        **shortcut}
      channels = width
  sizes = (512, 2048, 2048, 256)
  pairs = enumerate(itertools.pairwise(sizes))
  head = {f"dense{i}": _dense(into, out) for i, (into, out) in pairs}
  return tree | head


def dit_130m() -> Tree:
  """A diffusion transformer like DiT-B/2 (width 768, depth 12, adaLN): 130 M parameters."""
  width = 768

  def block() -> Tree:
    return {
      "adaln": _dense(width, 6 * width), "qkv": _dense(width, 3 * width),
      "out": _dense(width, width), "mlp1": _dense(width, 4 * width),
      "mlp2": _dense(4 * width, width),
    }

  return {
    "patches": _conv(4, width, 2), "classes": {"embedding": _array(1001, width)},
    "time": {"0": _dense(256, width), "1": _dense(width, width)},
    **{f"block{i}": block() for i in range(12)},
    "final": {"adaln": _dense(width, 2 * width), "out": _dense(width, 2 * 2 * 8)},
  }


def transformer_12b() -> Tree:
  """A rectified-flow transformer of width 3072 with 19 double and 38 single blocks: 12 B."""
  width = 3072

  def double() -> Tree:
    return {side: {
      "adaln": _dense(width, 6 * width), "qkv": _dense(width, 3 * width),
      "norm_q": _array(128), "norm_k": _array(128), "out": _dense(width, width),
      "mlp1": _dense(width, 4 * width), "mlp2": _dense(4 * width, width),
    } for side in ("image", "text")}

  def single() -> Tree:
    return {
      "adaln": _dense(width, 3 * width), "norm_q": _array(128), "norm_k": _array(128),
      "in": _dense(width, 7 * width), "out": _dense(5 * width, width),
    }

  return {
    "image_in": _dense(64, width), "text_in": _dense(4096, width),
    **{f"{name}{i}": _dense(into, width)
       for name, into in (("time", 256), ("pooled", 768), ("guidance", 256))
       for i, into in ((0, into), (1, width))},
    **{f"double{i}": double() for i in range(19)},
    **{f"single{i}": single() for i in range(38)},
    "final": {"adaln": _dense(width, 2 * width), "out": _dense(width, 64)},
  }


def equal_leaves(count: int, shape: tuple[int, ...]) -> Tree:
  """`count` leaves of one shape."""
  return {f"w{i}": _array(*shape) for i in range(count)}


def materialise(tree: Tree, seed: int) -> Tree:
  """NumPy arrays of these shapes, normal with a deviation of 0.02."""
  rng = np.random.default_rng(seed)
  scale = np.float32(0.02)
  return jax.tree.map(
    lambda x: (scale * rng.standard_normal(x.shape, np.float32)).astype(x.dtype), tree)


def _array(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _dense(into: int, out: int, bias: bool = True) -> Tree:
  return {"kernel": _array(into, out)} | ({"bias": _array(out)} if bias else {})


def _conv(into: int, out: int, side: int = 3) -> Tree:
  return {"kernel": _array(side, side, into, out), "bias": _array(out)}


def _norm(width: int) -> Tree:
  return {"scale": _array(width), "bias": _array(width)}


def _resnet(into: int, out: int) -> Tree:
  block = {
    "norm1": _norm(into), "conv1": _conv(into, out), "time": _dense(_TIME, out),
    "norm2": _norm(out), "conv2": _conv(out, out),
  }
  return block | ({"shortcut": _conv(into, out, 1)} if into != out else {})


def _attention(width: int, context: int) -> Tree:
  return {
    "to_q": _dense(width, width, False), "to_k": _dense(context, width, False),
    "to_v": _dense(context, width, False), "to_out": _dense(width, width),
  }


def _layer(width: int) -> Tree:
  return {
    "norm1": _norm(width), "self": _attention(width, width),
    "norm2": _norm(width), "cross": _attention(width, _CONTEXT),
    "norm3": _norm(width), "ff1": _dense(width, 8 * width), "ff2": _dense(4 * width, width),
  }


def _transformer(width: int, depth: int) -> Tree:
  return {
    "norm": _norm(width), "proj_in": _dense(width, width), "proj_out": _dense(width, width),
    **{f"layer{i}": _layer(width) for i in range(depth)},
  }
