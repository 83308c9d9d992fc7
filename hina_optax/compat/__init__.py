"""The arithmetic of other implementations, each in a module of its own."""

from hina_optax.compat.sd_scripts import sd_scripts_chain

__all__ = ["sd_scripts_chain"]
