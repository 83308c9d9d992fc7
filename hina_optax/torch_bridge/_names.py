"""Names for parameters that were given without names, such that LoRA pairs are recognized."""

import math
from collections.abc import Sequence

Shape = tuple[int, ...]


def infer_names(shapes: Sequence[Shape]) -> list[str]:
  """Names the parameters of a list by their shapes: LoRA factors as such, others by their index.

  Two neighbours are taken for a LoRA pair if the first has the shape `(rank, in, ...)`, the second
  `(out, rank, ...)`, and the rank is smaller than the numbers of inputs and outputs. This is the
  order in which kohya's sd-scripts, peft and most others list them. A bottleneck of two layers
  without biases has the same shapes; only names tell the two apart.

  >>> infer_names([(4, 64), (32, 4), (32,), (32, 64)])
  ['0.lora_down', '0.lora_up', '2', '3']
  """
  names: list[str] = []
  while len(names) < len(shapes):
    i = len(names)
    if i + 1 < len(shapes) and _is_pair(shapes[i], shapes[i + 1]):
      names += [f"{i}.lora_down", f"{i}.lora_up"]
    else:
      names.append(str(i))
  return names


def _is_pair(down: Shape, up: Shape) -> bool:
  if len(down) < 2 or len(down) != len(up) or down[0] != up[1]:
    return False
  return down[0] < min(math.prod(down[1:]), up[0]) and math.prod(up[2:]) == 1
