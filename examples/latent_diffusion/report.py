"""The report: a self-contained HTML file."""

import argparse
import importlib.metadata
import pathlib
import shlex
import sys
from typing import Any

import jax
import jinja2
import numpy as np

from latent_diffusion import optimizers, pictures, plots
from latent_diffusion.dataset import Dataset
from latent_diffusion.training import Row
from latent_diffusion.workspace import Workspace, write_whole

FIGURES = ("alignment", "torque", "mean_rate_scale", "background_share")
LORA_FILES = {"optax.adamw": "adamw", "lora_preset()": "hina"}
PACKAGES = ("hina-optax", "jax", "optax", "flax", "numpy")


def write(args: argparse.Namespace, space: Workspace, data: Dataset,
          results: dict[str, Any]) -> pathlib.Path:
  """Fills the template and writes the file."""
  final = pictures.grid(pictures.to_bytes(results["final"]), columns=8)
  pictures.save(final, space.folder / "samples.png", scale=2)
  compared, loras = results["compared"], results["lora"]
  page = {
    "command": command(), "args": args, "data": data, "skipped": space.skipped.lines(),
    "cards": cards(results), "vae": vae_pictures(data),
    "base_sheets": sheets(space.sheets("base"), 7), "final": pictures.data_uri(final),
    "lora_sheets": {name: sheets(space.sheets(f"lora-{short}"), 4)
                    for name, short in LORA_FILES.items()},
    "lora_effects": effects(loras["lora_preset()"][0]),
    "rank_change": rank_change(loras["lora_preset()"][0]),
    "base_curve": plots.loss_curves(results["base"], results["mean_loss"]),
    "base_effects": effects(results["base"]),
    "stage_curves": plots.seed_curves(compared), "stage_table": table(compared),
    "stages_line": findings(compared), "lora_curves": plots.seed_curves(loras),
    "lora_table": table(loras), "lora_line": findings(loras),
    "memory": results["memory"],
    "versions": {name: version(name) for name in PACKAGES},
  }
  template = pathlib.Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
  html = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
  path = space.folder / "report.html"
  write_whole(path, html.render(page))
  return path


def command() -> str:
  """Returns the command that repeats the run."""
  words = [word for word in sys.argv[1:] if word != "--resume"]
  return shlex.join(["python", sys.argv[0], *words])


def version(package: str) -> str:
  """The installed version of a package."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def cards(results: dict[str, Any]) -> list[tuple[str, str]]:
  """Returns the figures at the top of the report."""
  held_out = plots.column(results["base"], "held_out")[1]
  mean, last = results["mean_loss"], held_out[-1]
  rows = [row for row in results["base"] if "steps_per_second" in row]
  speed = float(np.median([row["steps_per_second"] for row in rows]))
  return [
    (f"{last:.3f}", f"held-out loss of the base; predicting the mean gives {mean:.3f}"),
    (f"{100 * (1 - last / mean):.0f} %", "of that loss removed"),
    (f"{speed:.1f}", "steps a second"),
    (f"{rows[-1]['state_mb']:.2f} MB", "of optimizer state"),
  ]


def vae_pictures(data: Dataset) -> dict[str, Any] | None:
  """Shows photographs beside their reconstructions by the autoencoder."""
  if data.vae is None:
    return None
  before, after = data.vae["photographs"], np.clip(data.vae["reconstructions"], -1, 1)
  error = np.mean((before - after) ** 2, axis=(1, 2, 3))
  pair = lambda x: pictures.data_uri(pictures.grid(pictures.to_bytes(x), len(x)))  # noqa: E731
  return {"photographs": pair(before), "reconstructions": pair(after),
          "subject": pair(data.vae["subject"]), "psnr": float(np.mean(10 * np.log10(4 / error))),
          "curve": plots.loss_curves(data.vae["rows"], None, "absolute error")}


def sheets(found: list[tuple[int, np.ndarray]], count: int) -> list[dict[str, Any]]:
  """Selects a few sheets, evenly from the first to the last."""
  chosen = sorted(set(np.linspace(0, len(found) - 1, count).round().astype(int)))
  return [{"step": found[i][0], "uri": pictures.data_uri(found[i][1])} for i in chosen]


def effects(rows: list[Row]) -> dict[str, str] | None:
  """Makes the plots of what the optimizer's parts did."""
  first = rows[0]
  return {
    "regularizers": plots.effects(rows) if any(k.startswith("touched ") for k in first) else "",
    "figures": plots.figures(rows, FIGURES) if any(k in first for k in FIGURES) else "",
  }


def rank_change(rows: list[Row]) -> float | None:
  """Returns the median, over the training, of the rank penalty's size over the gradient's size."""
  values = plots.column(rows, "change rank")[1]
  return float(np.median(values)) if values.size else None


def last_losses(runs: list[list[Row]]) -> np.ndarray:
  """Returns the final held-out loss of each seed."""
  return np.array([plots.column(rows, "held_out")[1][-1] for rows in runs])


def table(runs: dict[str, list[list[Row]]]) -> list[dict[str, Any]]:
  """Makes one row per optimizer; the others are compared with the first, AdamW."""
  reference = last_losses(next(iter(runs.values())))
  rows = []
  for name, seeds in runs.items():
    losses = last_losses(seeds)
    records = [row for records in seeds for row in records if "steps_per_second" in row]
    rows.append({
      "name": name, "mean": losses.mean(), "spread": spread(losses),
      "seeds": ", ".join(f"{x:.4f}" for x in losses),
      "difference": 100 * float(np.mean(losses / reference - 1)),
      "wins": int(np.sum(losses < reference)), "count": len(losses),
      "milliseconds": 1e3 / float(np.median([row["steps_per_second"] for row in records])),
      "megabytes": records[-1]["state_mb"],
    })
  return rows


def spread(values: np.ndarray) -> float:
  """Returns the standard deviation over seeds, or NaN for a single seed."""
  return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def findings(runs: dict[str, list[list[Row]]]) -> str:
  """Summarizes the table in a sentence."""
  rows = table(runs)
  best = min(rows, key=lambda row: row["mean"])
  reference = rows[0]
  text = f"Lowest mean held-out loss: {best['name']} ({best['mean']:.4f})."
  others = [
    f"{row['name']} {'lower' if row['difference'] < 0 else 'higher'} by "
    f"{abs(row['difference']):.1f} %, better in {row['wins']} of {row['count']} seeds"
    for row in rows[1:]]
  return f"{text} Against {reference['name']}: {'; '.join(others)}."


def memory(base: Any, lora: Any) -> list[dict[str, Any]]:
  """State of several optimizers on the parameters of the base and of the LoRA."""
  hina = optimizers.hina
  full = optimizers.ALL
  makers = {
    "optax.adamw": (base, optimizers.adamw(1e-3)),
    "core": (base, hina(1e-3, optimizers.CORE)),
    "core + edges": (base, hina(1e-3, optimizers.EDGES)),
    "all regularizers": (base, hina(1e-3, full)),
    "all, reduce_precision": (base, hina(1e-3, full | {"reduce_precision": True})),
    "all, cpu_offload_states": (base, hina(1e-3, full | {"cpu_offload_states": True})),
    "LoRA, optax.adamw": (lora, optimizers.adamw(1e-3)),
    "LoRA, lora_preset()": (lora, hina(1e-3, optimizers.PRESETS["lora"](learning_rate=1e-3))),
  }
  return [{"name": name} | weigh(params, tx) for name, (params, tx) in makers.items()]


def weigh(params: Any, optimizer: Any) -> dict[str, Any]:
  """Bytes of a state, on the device and in the host's memory; made in earnest if offloaded."""
  count = sum(x.size for x in jax.tree.leaves(params))
  options = getattr(optimizer, "options", None)
  if options is not None and options.cpu_offload_states:
    state = jax.tree.leaves(optimizer.init(params))
    host = sum(x.nbytes for x in state if "host" in str(x.sharding.memory_kind))
  else:
    state, host = jax.tree.leaves(jax.eval_shape(optimizer.init, params)), 0
  total = sum(x.size * x.dtype.itemsize for x in state)
  return {"parameters": count, "megabytes": total / 1e6, "each": total / count,
          "device": (total - host) / count, "host": host / count}
