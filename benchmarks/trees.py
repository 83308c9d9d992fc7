"""Parameter trees of the sizes that people train, as shapes in Flax's layout."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = dict[str, Any]
# Widths of SDXL's embeddings: of the time, of the text, and of the pooled text with the image size.
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


def lora_factors(tree: Tree, rank: int, target: str = "attn") -> Tree:
  """LoRA factors for every dense kernel below a node whose name begins with `target`."""

  def make_factors(node: Any, in_target: bool) -> Any:
    if not isinstance(node, dict):
      return None
    kernel = node.get("kernel")
    if in_target and kernel is not None and len(kernel.shape) == 2:
      inputs, outputs = kernel.shape
      return {"lora_a": _array(inputs, rank), "lora_b": _array(rank, outputs)}
    children = {k: make_factors(v, in_target or k.startswith(target)) for k, v in node.items()}
    return {k: v for k, v in children.items() if v} or None

  return make_factors(tree, False)


def lora_420() -> Tree:
  """LoRA of rank 16 for 21 transformer layers of 640 channels: 420 factors, 7.4 M parameters."""
  return lora_factors({f"attn{i}": _layer(640) for i in range(21)}, 16)


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
  head = {f"dense{i}": _dense(inputs, outputs) for i, (inputs, outputs) in pairs}
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
    **{f"{name}{i}": _dense(inputs, width)
       for name, inputs in (("time", 256), ("pooled", 768), ("guidance", 256))
       for i, inputs in ((0, inputs), (1, width))},
    **{f"double{i}": double() for i in range(19)},
    **{f"single{i}": single() for i in range(38)},
    "final": {"adaln": _dense(width, 2 * width), "out": _dense(width, 64)},
  }


def equal_leaves(count: int, shape: tuple[int, ...]) -> Tree:
  """`count` leaves of the same shape."""
  return {f"w{i}": _array(*shape) for i in range(count)}


def materialise(tree: Tree, seed: int) -> Tree:
  """Draws NumPy arrays of these shapes from a normal distribution with a deviation of 0.02."""
  rng = np.random.default_rng(seed)
  scale = np.float32(0.02)
  return jax.tree.map(
    lambda x: (scale * rng.standard_normal(x.shape, np.float32)).astype(x.dtype), tree)


def _array(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _dense(inputs: int, outputs: int, bias: bool = True) -> Tree:
  return {"kernel": _array(inputs, outputs)} | ({"bias": _array(outputs)} if bias else {})


def _conv(inputs: int, outputs: int, side: int = 3) -> Tree:
  return {"kernel": _array(side, side, inputs, outputs), "bias": _array(outputs)}


def _norm(width: int) -> Tree:
  return {"scale": _array(width), "bias": _array(width)}


def _resnet(inputs: int, outputs: int) -> Tree:
  block = {
    "norm1": _norm(inputs), "conv1": _conv(inputs, outputs), "time": _dense(_TIME, outputs),
    "norm2": _norm(outputs), "conv2": _conv(outputs, outputs),
  }
  return block | ({"shortcut": _conv(inputs, outputs, 1)} if inputs != outputs else {})


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
