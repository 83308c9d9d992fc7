"""Plots of curves, as SVG text."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

COLOURS = {
  "optax.adamw": "#7a7a7a", "optax.adamw, 3 x rate": "#b5b5b5", "core": "#2a78d6",
  "core + edges": "#1baf7a"}
OTHERS = ("#d6552a", "#8a4fd0", "#b8860b", "#0f8b8d", "#c2417c", "#556b2f")
Rows = list[dict[str, Any]]
plt.rcParams.update({
  "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
  "grid.color": "#e5e5e5", "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "0"})


def column(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the steps and values of the records that contain `name`."""
  pairs = [(row["step"], row[name]) for row in rows if name in row]
  return np.array(pairs, float).reshape(-1, 2).T


def svg(figure: plt.Figure) -> str:
  """The figure as an SVG element."""
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg", metadata={"Date": None})
  plt.close(figure)
  text = buffer.getvalue()
  return text[text.index("<svg"):]


def colour(name: str, position: int) -> str:
  """Returns the colour of an optimizer."""
  return COLOURS.get(name, OTHERS[position % len(OTHERS)])


def loss_curves(rows: Rows, mean_loss: float | None, ylabel: str = "loss") -> str:
  """Plots training and held-out loss of a run; without `mean_loss` the early steps are cut off."""
  figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
  axes.plot(*column(rows, "loss"), color="#b9d2f0", label="training")
  axes.plot(*column(rows, "held_out"), color="#2a78d6", marker="o", markersize=3,
            label="held out, averaged weights")
  if mean_loss is not None:
    axes.axhline(mean_loss, color="#7a7a7a", linestyle="--", linewidth=1)
    axes.annotate("predicting the mean", (rows[-1]["step"], mean_loss), ha="right", va="bottom",
                  color="#555555", xytext=(0, 2), textcoords="offset points")
    _ranges(axes, ylabel)
    axes.set_ylim(top=1.1 * max(axes.get_ylim()[1], mean_loss))
  else:
    axes.set(xlabel="step", ylabel=ylabel, ylim=(0, 4 * column(rows, "held_out")[1][-1]))
  axes.legend()
  return svg(figure)


def seed_curves(runs: dict[str, list[Rows]]) -> str:
  """Plots training and held-out loss of several optimizers, with the range over seeds."""
  figure, both = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
  for axes, name, title in zip(both, ("loss", "held_out"), ("training loss", "held-out loss")):
    for i, (optimizer, seeds) in enumerate(runs.items()):
      _band(axes, [column(rows, name) for rows in seeds], optimizer, colour(optimizer, i))
    _ranges(axes, title)
  both[0].legend()
  return svg(figure)


def _band(axes: Axes, curves: Sequence[np.ndarray], label: str, shade: str) -> None:
  steps, values = curves[0][0], smooth(np.stack([curve[1] for curve in curves]))
  axes.plot(steps, values.mean(0), color=shade, label=label, linewidth=1.4)
  axes.fill_between(steps, values.min(0), values.max(0), color=shade, alpha=0.15, linewidth=0)


def smooth(values: np.ndarray) -> np.ndarray:
  """Computes a running mean along the steps, over at most a tenth of them."""
  window = max(1, values.shape[1] // 10) if values.shape[1] > 20 else 1
  ends = np.arange(values.shape[1]) + 1
  starts = np.maximum(ends - window, 0)
  sums = np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, 1)], 1)
  return (sums[:, ends] - sums[:, starts]) / (ends - starts)


def _ranges(axes: Axes, ylabel: str) -> None:
  axes.set(xlabel="step", ylabel=ylabel)
  axes.set_ylim(bottom=0 if axes.get_ylim()[0] < 0.3 * axes.get_ylim()[1] else None)


def effects(rows: Rows) -> str:
  """Plots what each regularizer did to the gradient during training."""
  figure, both = plt.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
  titles = ("share of elements changed by 1% or more", "size of the change / size of the gradient")
  for axes, kind, title in zip(both, ("touched", "change"), titles):
    names = [name for name in rows[0] if name.startswith(f"{kind} ")]
    for i, name in enumerate(names):
      axes.plot(*column(rows, name), marker="o", markersize=3, color=OTHERS[i % len(OTHERS)],
                label=name.removeprefix(f"{kind} "))
    axes.set(xlabel="step", title=title)
  both[0].set_yscale("log", nonpositive="mask")
  both[1].set_ylim(bottom=0)
  both[1].legend()
  return svg(figure)


def figures(rows: Rows, names: Sequence[str]) -> str:
  """Plots the optimizer's figures, each on its own axes."""
  names = [name for name in names if any(name in row for row in rows)]
  figure, many = plt.subplots(
    1, len(names), figsize=(9.6, 2.3), layout="constrained", squeeze=False)
  for axes, name in zip(many[0], names):
    axes.plot(*column(rows, name), color="#2a78d6", marker="o", markersize=3)
    axes.set(xlabel="step", title=name.replace("_", " "))
  return svg(figure)
