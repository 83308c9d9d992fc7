"""Low-rank adapters beside the linear layers of a denoiser."""

from flax import nnx

from latent_diffusion.denoiser import Denoiser


def add_lora(model: Denoiser, rank: int, rngs: nnx.Rngs) -> Denoiser:
  """A copy of the model whose blocks carry adapters; at first they change nothing.

  Train it with `wrt=nnx.LoRAParam`: the rest then stays as it is.
  """
  model = nnx.clone(model)
  for block in model.blocks:
    block.attention.qkv = adapted(block.attention.qkv, rank, rngs)
    block.attention.out = adapted(block.attention.out, rank, rngs)
    block.up = adapted(block.up, rank, rngs)
    block.down = adapted(block.down, rank, rngs)
  return model


def adapted(linear: nnx.Linear, rank: int, rngs: nnx.Rngs) -> nnx.LoRA:
  """Adds the output of a low-rank adapter to that of a layer."""
  return nnx.LoRA(
    linear.in_features, rank, linear.out_features, base_module=linear, rngs=rngs)
