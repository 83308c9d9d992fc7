"""Trains a latent diffusion model and a LoRA on photographs; `--help` lists the options."""

import os
import shlex
import sys

if "--smoke" in sys.argv:  # a smoke test mostly compiles: without LLVM's optimizations it is faster
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

from latent_diffusion import options, pipeline
from latent_diffusion.errors import Interrupted, UserError


def main() -> int:
  """Runs everything; the last line of the output is the report's path."""
  args = options.parse()
  words = [word for word in sys.argv[1:] if word != "--resume"]
  again = shlex.join([sys.executable, sys.argv[0], *words, "--resume"])
  try:
    print(pipeline.run(args))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except (Interrupted, KeyboardInterrupt) as stop:
    print(f"{str(stop) or 'Stopped.'} To go on:\n  {again}", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
