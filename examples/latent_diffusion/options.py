"""The command line."""

import argparse
import pathlib

SMOKE = {
  "resolution": 24, "crops": 40, "vae_steps": 20, "vae_width": 16, "steps": 20,
  "compare_steps": 8, "lora_steps": 8, "seeds": 2, "width": 32, "depth": 1, "batch": 8,
  "sampling_steps": 5, "measure_every": 4, "save_every": 5,
}
DEFAULTS = {
  "resolution": 48, "crops": 2400, "vae_steps": 800, "vae_width": 64, "steps": 1800,
  "compare_steps": 160, "lora_steps": 120, "seeds": 3, "width": 96, "depth": 4, "batch": 16,
  "sampling_steps": 30, "measure_every": None, "save_every": 100,
}
HELP = {
  "resolution": "side of the crops in pixels; other ratios have about as many pixels",
  "crops": "crops in all, of all photographs together",
  "vae_steps": "steps of the autoencoder",
  "vae_width": "channels inside of the autoencoder",
  "steps": "steps of the denoiser",
  "compare_steps": "steps of each run of the comparison with AdamW",
  "lora_steps": "steps of each LoRA",
  "seeds": "runs of each optimizer that is compared",
  "width": "width of the denoiser, a multiple of 4 times --heads",
  "depth": "blocks of the denoiser",
  "batch": "latents in a batch; crops too",
  "sampling_steps": "steps of DDIM",
  "measure_every": "steps between held-out measurements and samples (default: eight in a run)",
  "save_every": "steps between checkpoints",
}


def parser() -> argparse.ArgumentParser:
  """Makes the parser with all options."""
  p = argparse.ArgumentParser(
    description="Trains a VAE, a latent diffusion model and a LoRA on photographs with "
    "hina_optax, compares with AdamW, and writes a report.")
  _data(p.add_argument_group("data"))
  _optimizer(p.add_argument_group("optimizer"))
  _model(p.add_argument_group("model"))
  sizes = p.add_argument_group("sizes")
  for name, text in HELP.items():
    default = DEFAULTS[name]
    shown = "" if default is None else f" (default: {default})"
    sizes.add_argument(f"--{name.replace('_', '-')}", type=positive, help=text + shown)
  _run(p.add_argument_group("run"))
  return p


def _data(group: argparse._ArgumentGroup) -> None:
  either = group.add_mutually_exclusive_group()
  either.add_argument("--images", type=pathlib.Path, metavar="DIR",
                      help="a folder of photographs, of any size and any format that Pillow reads "
                      "(default: those inside scikit-image and scikit-learn)")
  either.add_argument("--latents", type=pathlib.Path, metavar="DIR",
                      help="a folder of cached latents in the .npz layout of kohya's sd-scripts; "
                      "no autoencoder is trained then")
  group.add_argument("--subject", metavar="NAME",
                     help="the photograph that the LoRA learns and the base never sees "
                     "(default: chelsea, or the first)")
  group.add_argument("--square", action=argparse.BooleanOptionalAction, default=None,
                     help="square crops only, one shape to compile for (default: yes for the "
                     "bundled photographs, buckets by aspect ratio for --images)")


def _optimizer(group: argparse._ArgumentGroup) -> None:
  group.add_argument("--optimizer", choices=("hina", "adamw"), default="hina",
                     help="what trains the base and the shown LoRA (default: hina)")
  group.add_argument("--preset", choices=("lora", "large", "quick", "extreme"),
                     help="options of the base's optimizer, but for the rate (default: all "
                     "regularizers); a LoRA always begins with the preset for LoRA")
  group.add_argument("--optimizer-arg", action="append", default=[], metavar="KEY=VALUE",
                     help="an option of hina_adaptive, for the base and the LoRA; may be repeated")
  group.add_argument("--learning-rate", type=rate, default=2e-3,
                     help="of the denoiser, for every optimizer (default: 2e-3)")
  group.add_argument("--lora-learning-rate", type=rate, default=2e-3,
                     help="of the LoRA, for both optimizers (default: 2e-3)")
  group.add_argument("--vae-learning-rate", type=rate, default=2e-3,
                     help="of the autoencoder (default: 2e-3)")
  group.add_argument("--staged", action=argparse.BooleanOptionalAction, default=None,
                     help="compare stages in between too: the core alone, the core with edges, "
                     "AdamW at three times the rate (default: yes, but with --smoke no)")
  group.add_argument("--schedule", choices=("constant", "cosine"), default="constant",
                     help="of the rate after a short warm-up (default: constant)")


def _model(group: argparse._ArgumentGroup) -> None:
  group.add_argument("--prediction", choices=("v", "eps"), default="v",
                     help="what the denoiser answers (default: v)")
  group.add_argument("--min-snr", type=number, default=5.0, metavar="GAMMA",
                     help="limit of the min-SNR weights, 0 for none (default: 5)")
  group.add_argument("--channels", type=positive, default=4,
                     help="channels of the autoencoder's latents (default: 4)")
  group.add_argument("--heads", type=positive, default=4, help="of attention (default: 4)")
  group.add_argument("--rank", type=positive, default=4, help="of the LoRA (default: 4)")


def _run(group: argparse._ArgumentGroup) -> None:
  group.add_argument("--output", type=pathlib.Path, default=pathlib.Path("demo_output"),
                     help="folder of everything that is written (default: demo_output)")
  group.add_argument("--seed", type=natural, default=0, help="of everything random (default: 0)")
  group.add_argument("--resume", action="store_true",
                     help="go on where the last call with the same options stopped")
  group.add_argument("--smoke", action="store_true",
                     help="tiny sizes where none are given: seconds instead of minutes")


def parse(words: list[str] | None = None) -> argparse.Namespace:
  """Parses a command line, and fills in sizes that were not given."""
  p = parser()
  args = p.parse_args(words)
  for name, value in (SMOKE if args.smoke else DEFAULTS).items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  if args.width % (4 * args.heads):
    p.error(f"argument --width: {args.width} is no multiple of 4 times --heads.")
  if args.vae_width % 8:
    p.error(f"argument --vae-width: {args.vae_width} is no multiple of 8.")
  if args.staged is None:
    args.staged = not args.smoke
  if args.square is None:
    args.square = args.images is None
  return args


def number(text: str) -> float:
  """A finite number, at least 0."""
  value = float(text)
  if not 0 <= value < float("inf"):
    raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
  return value


def rate(text: str) -> float:
  """A finite number above 0."""
  if number(text) == 0:
    raise argparse.ArgumentTypeError("must be above 0")
  return float(text)


def natural(text: str) -> int:
  """A whole number, at least 0."""
  if int(text) < 0:
    raise argparse.ArgumentTypeError(f"{text} is below 0")
  return int(text)


def positive(text: str) -> int:
  """A whole number, at least 1."""
  if int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text} is below 1")
  return int(text)
