"""The picture of `openclip-ext structure`: a column per checkpoint, and bars that compare them."""

from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from openclip_ext.evaluation.metrics.structure import TITLES, Structure

COLORS = {"image": "#2a6fb0", "text": "#e07b28"}
MARKERS = {"image": "o", "text": "^"}
DRAWN = 300  # pairs in a projection: more lines would hide each other
COMPARED = 2000  # pairs in a histogram, each against all others
BINS = 60
HEADROOM = 1.2  # of histograms, for the legend
METRICS_PER_ROW = 4  # divides their number, with and without private features


def draw_structure(structures: list[Structure], title: str, path: str) -> None:
    """Write a PNG: above, each checkpoint's features in the plane; below, its similarities; last, the numbers compared.

    Projections share their limits and histograms their axes, so that checkpoints can be compared by eye.
    """
    several = len(structures) > 1
    rows = len(_compared(structures)) // METRICS_PER_ROW if several else 0
    heights = [8.2] + [0.4 + 1.5 * rows] * several
    figure = Figure(
        figsize=(max(5.2, 4.8 * len(structures)), sum(heights)), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    )
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    figure.suptitle(title)
    _draw_columns(parts[0], structures)
    if several:
        _draw_bars(parts[1], structures, rows)
    figure.savefig(path, dpi=130)


def _draw_columns(figure: SubFigure, structures: list[Structure]) -> None:
    """A projection above a histogram for each checkpoint."""
    axes = figure.subplots(2, len(structures), sharex="row", sharey="row", height_ratios=[3, 2], squeeze=False)
    planes = [_project(structure) for structure in structures]
    limit = 1.05 * max(0.01, *(abs(points).max() for plane, _ in planes for points in plane.values()))
    scores = [_similarities(structure) for structure in structures]
    everything = np.concatenate([values for pair in scores for values in pair])
    bins = np.linspace(everything.min() - 0.01, everything.max() + 0.01, BINS + 1)
    for structure, plane, score, (above, below) in zip(structures, planes, scores, axes.T, strict=True):
        above.set_title(_short(structure.label), fontweight="bold")
        _draw_plane(above, *plane, limit)
        _draw_histogram(below, *score, bins)
    axes[1, 0].set_ylabel("density")
    axes[1, 0].set_ylim(top=HEADROOM * axes[1, 0].get_ylim()[1])
    axes[1, 0].legend(loc="upper center", ncols=2, fontsize="small", frameon=False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small",
                  frameon=False, columnspacing=1)  # fmt: skip


def _project(structure: Structure) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Both modalities, (M, 2) each, on the leading two principal components of both together; their variance shares."""
    from sklearn.decomposition import PCA

    features = {modality: structure.features[modality].double().numpy() for modality in COLORS}
    with np.errstate(invalid="ignore"):  # features that are all the same have no variance to share
        pca = PCA(2, random_state=0).fit(np.concatenate(list(features.values())))
    shares = np.nan_to_num(pca.explained_variance_ratio_)
    return {modality: pca.transform(x) for modality, x in features.items()}, shares


def _draw_plane(axes: Axes, plane: dict[str, np.ndarray], shares: np.ndarray, limit: float) -> None:
    """Points of the first pairs joined by lines, and the mean of each modality over all pairs."""
    segments = np.stack([plane[modality][:DRAWN] for modality in COLORS], axis=1)
    axes.add_collection(LineCollection(list(segments), colors="0.55", linewidths=0.4, alpha=0.5, zorder=1))
    for modality, color in COLORS.items():
        shown, mean = plane[modality][:DRAWN], plane[modality].mean(0)
        style: dict[str, Any] = {"color": color, "marker": MARKERS[modality]}
        axes.scatter(shown[:, 0], shown[:, 1], s=12, alpha=0.75, linewidths=0, zorder=2, label=f"{modality}s", **style)
        axes.scatter(mean[0], mean[1], s=100, edgecolors="black", zorder=3, label=f"mean of {modality}s", **style)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), box_aspect=1)
    axes.set_xlabel(f"component 1 ({100 * shares[0]:.0f} % of variance)")
    axes.set_ylabel(f"component 2 ({100 * shares[1]:.0f} %)")


def _similarities(structure: Structure) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of matching pairs and of all others."""
    image, text = (structure.features[modality][:COMPARED] for modality in COLORS)
    cosines = image @ text.T
    other = ~torch.eye(len(cosines), dtype=torch.bool)
    return cosines.diagonal().numpy(), cosines[other].numpy()


def _draw_histogram(axes: Axes, matching: np.ndarray, other: np.ndarray, bins: np.ndarray) -> None:
    for values, color, label in ((other, "0.6", "other pairs"), (matching, "#2f8f5b", "matching pairs")):
        axes.hist(values, bins.tolist(), density=True, color=color, alpha=0.6, label=label)
        axes.axvline(values.mean(), ymax=1 / HEADROOM, color=color, linestyle="--", linewidth=1.2)
    axes.set_xlabel("cosine similarity of image and text (dashed: mean)")


def _draw_bars(figure: SubFigure, structures: list[Structure], rows: int) -> None:
    """One small chart per number, each on its own scale, with a bar per checkpoint that has it."""
    colors = matplotlib.colormaps["BuPu"](np.linspace(0.4, 0.9, len(structures)))
    charts = figure.subplots(rows, METRICS_PER_ROW, squeeze=False).flat
    for axes, name in zip(charts, _compared(structures), strict=True):
        values = [structure.metrics.get(name) for structure in structures]
        bars = axes.bar(range(len(values)), [value or 0.0 for value in values], width=0.6, color=colors)
        axes.bar_label(bars, ["–" if value is None else f"{value:.3g}" for value in values], padding=2)
        axes.axhline(0, color="0.3", linewidth=0.8, clip_on=False)
        axes.set_title(TITLES[name], fontsize="medium")
        axes.margins(y=0.3)
        axes.set_xlim(-0.8, len(values) - 0.2)
        axes.set_axis_off()
    handles = [Patch(color=color) for color in colors]
    figure.legend(handles, [_short(structure.label) for structure in structures], loc="outside lower center",
                  ncols=len(structures), frameon=False)  # fmt: skip


def _compared(structures: list[Structure]) -> list[str]:
    """The numbers that at least one checkpoint has."""
    return [name for name in TITLES if any(name in structure.metrics for structure in structures)]


def _short(label: str, length: int = 36) -> str:
    return label if len(label) <= length else "…" + label[1 - length :]
