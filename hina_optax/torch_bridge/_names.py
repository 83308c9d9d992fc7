"""Names of parameters that came without: LoRA pairs by shape and order, the others by number."""

from collections.abc import Sequence

Shape = tuple[int, ...]


def names_of(shapes: Sequence[Shape]) -> list[str]:
  """A name for each shape of a list of parameters.

  Two neighbours are a LoRA pair if the first narrows `(rank, in, ...)` to as many as the second
  widens `(out, rank, ...)`, and the rank is smaller than what comes in and what goes out: the order
  in which kohya's sd-scripts, peft and most others list them. A bottleneck of two layers without
  biases looks the same; names tell them apart.

  >>> names_of([(4, 64), (32, 4), (32,), (32, 64)])
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
  return down[0] < min(_product(down[1:]), up[0]) and _product(up[2:]) == 1


def _product(sides: Sequence[int]) -> int:
  product = 1
  for side in sides:
    product *= side
  return product
