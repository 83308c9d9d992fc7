"""Parameter trees of the sizes that people train, as shapes in Flax's layout."""

from typing import Any

import jax
import jax.numpy as jnp

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


def _transformer(width: int, depth: int) -> Tree:
  def layer() -> Tree:
    return {
      "norm1": _norm(width), "self": _attention(width, width),
      "norm2": _norm(width), "cross": _attention(width, _CONTEXT),
      "norm3": _norm(width), "ff1": _dense(width, 8 * width), "ff2": _dense(4 * width, width),
    }

  return {
    "norm": _norm(width), "proj_in": _dense(width, width), "proj_out": _dense(width, width),
    **{f"layer{i}": layer() for i in range(depth)},
  }
