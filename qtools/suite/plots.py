"""Pictures that more than one cell draws, in the style of `figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qtools.affine import Grid, QParams, fake_quantize, qparams_from_range
from qtools.suite.figures import FLOAT, HTP, INT4, INT8, WARN, end_labels, new


def number_line(figure: Figure, x: np.ndarray, qparams: QParams) -> None:
    """Where a grid moves each of a few numbers: floats above, codes below, clipped ones in red."""
    grid, scale = qparams.grid, float(qparams.scale)
    codes = np.arange(grid.qmin, grid.qmax + 1)
    places = (codes - int(qparams.zero_point)) * scale
    x = np.sort(np.ravel(x))
    moved = fake_quantize(x, qparams)
    clipped = np.abs(moved - x) > 0.5001 * scale
    ax = figure.subplots()
    for chosen, color in ((~clipped, FLOAT), (clipped, WARN)):
        # One line with gaps instead of many: it is drawn several times faster.
        sides = np.stack([x[chosen], moved[chosen], np.full(chosen.sum(), np.nan)], 1).ravel()
        ax.plot(sides, np.tile([1, 0, np.nan], chosen.sum()), color=color, lw=0.9)
        ax.plot(x[chosen], np.ones(chosen.sum()), "|", color=color, ms=14)
    ax.plot(places, np.zeros(len(places)), "o", color=INT8, ms=max(2, 9 - grid.bits))
    ax.plot(0, 0, "o", color="black", ms=10, mfc="none")
    worst, mean = np.abs(moved - x).max(), np.abs(moved - x).mean()
    note = f", {clipped.sum()} of {len(x)} clipped" if clipped.any() else ""
    ax.set(
        title=f"{len(codes)} codes, step {scale:.3f}: worst error {worst:.3f}, mean {mean:.3f}{note}",
        xlabel="value (the ring marks zero)",
        ylabel="from the float to its code",
        xlim=(-2.2, 2.7),
        ylim=(-0.3, 1.3),
        yticks=[0, 1],
    )
    ax.set_yticklabels(["on the grid", "float"])


def clipping_curve(x: np.ndarray, bits: int, limits: np.ndarray) -> np.ndarray:
    """Mean squared error of a symmetric quantizer of `x` against where it clips, in two parts.

    Returns
    -------
    ndarray of shape (2, len(limits))
        The part of the values beyond the limit (clipping), then of those within it (rounding).
    """
    grid = Grid(bits, signed=True, symmetric=True, narrow_range=True)
    parts = np.empty((2, len(limits)))
    for index, limit in enumerate(np.asarray(limits, np.float32)):
        error = (fake_quantize(x, qparams_from_range(-limit, limit, grid)) - x) ** 2
        beyond = np.abs(x) > limit
        parts[:, index] = error[beyond].sum() / x.size, error[~beyond].sum() / x.size
    return parts


def bargain(figure: Figure, x: np.ndarray, bits: int, limit: float) -> None:
    """The clipping curve of `x` with one limit marked: what is clipped away against what is rounded away."""
    limits = np.linspace(0.5, np.abs(x).max(), 28)
    ax = figure.subplots()
    total = _two_parts(ax, limits, clipping_curve(x, bits, limits))
    here, best = clipping_curve(x, bits, np.array([limit])).sum(), total.min()
    ax.plot(limit, here, "o", color="black", ms=9)
    title = f"{bits} bits, clipped at ±{limit:.2f}: {here / best:.1f} times the least possible error"
    ax.set(title=title, ylim=(0, 6 * best), xlim=(0.5, limits[-1]))


def clipping_chart(x: np.ndarray, bits: int, limits: np.ndarray, marks: Mapping[str, float], title: str) -> Figure:
    """The clipping curve of `x`, with the limits that several rules choose."""
    figure, ax = new()
    total = _two_parts(ax, limits, clipping_curve(x, bits, limits))
    for name, limit in marks.items():
        height = clipping_curve(x, bits, np.array([limit])).sum()
        ax.plot(limit, height, "o", color="black")
        options = {"textcoords": "offset points", "rotation": 35, "rotation_mode": "anchor"}
        ax.annotate(name.replace("_", "-"), (limit, height), xytext=(-2, 10), **options)
    ax.set(title=title, ylim=(0, 7 * total.min()), xlim=(limits[0], limits[-1] + 0.3))
    return figure


def _two_parts(ax: Axes, limits: np.ndarray, parts: np.ndarray) -> np.ndarray:
    clipping, rounding = parts
    ax.fill_between(limits, rounding, color=INT8, alpha=0.35, lw=0)
    ax.fill_between(limits, rounding, rounding + clipping, color=WARN, alpha=0.35, lw=0)
    ax.plot(limits, rounding + clipping, color="black")
    ax.text(0.97, 0.05, "rounding", color=INT8, transform=ax.transAxes, ha="right", weight="bold")
    ax.text(0.04, 0.3, "clipping", color=WARN, transform=ax.transAxes, weight="bold")
    ax.set(xlabel="clipping limit (standard deviations)", ylabel="mean squared error")
    return rounding + clipping


def statistics(found: Mapping[str, np.ndarray], printed: float, title: str) -> Figure:
    """Where MSE, MAE and RMSE (columns of each array, a row a draw) of several kinds of data lie; one value marked."""
    figure, ax = new()
    for row, columns in enumerate(found.values()):
        for name, color, side, values in zip(
            ("MSE", "MAE", "RMSE"), (FLOAT, INT8, WARN), ("center", "right", "left"), columns.T, strict=True
        ):
            ax.plot([values.min(), values.max()], [row, row], color=color, lw=9, solid_capstyle="butt", alpha=0.5)
            ax.plot(np.median(values), row, "|", color=color, ms=16, mew=3)
            place = {"xy": (np.median(values), row), "xytext": (0, 13), "textcoords": "offset points"}
            ax.annotate(name, **place, ha=side, color=color)
    ax.axvline(printed, color="black", ls="--", lw=1)
    ax.annotate("printed as MSE", (printed, len(found) - 0.4), (-5, 0), textcoords="offset points", ha="right")
    ax.set(xscale="log", ylim=(-0.5, len(found) - 0.2), yticks=range(len(found)), yticklabels=list(found), title=title)
    ax.set(xlabel="error of the symmetric grid (RMSE, MAE: unit of x; MSE: its square)", ylabel="kind of data")
    return figure


def gains(groups: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Bars of what an asymmetric grid gains over a symmetric one, tensor by tensor, in groups."""
    figure, ax = new()
    start = 0.0
    for (name, values), color in zip(groups.items(), (INT8, INT4), strict=True):
        places = start + np.arange(len(values))
        ax.bar(places, values, color=color)
        ax.text(places.mean(), max(values) + 0.3, name, ha="center", weight="bold")
        start = places[-1] + 1.6
    ax.axhline(20 * np.log10(2), color="black", ls="--", lw=1)
    ax.text(0, 6.15, "one whole bit: 6.02 dB")
    ax.set(title=title, xlabel="tensor of the digit network", xticks=[], ylim=(-0.5, 7.4))
    ax.set_ylabel("gain of asymmetric over symmetric (dB)")
    return figure


def bits_chart(bits: np.ndarray, sqnr: Mapping[str, np.ndarray], title: str) -> Figure:
    """SQNR against bits for several kinds of data, beside the line of 6.02 dB a bit."""
    figure, ax = new()
    rule = "6.02 dB a bit"
    colors = dict(zip(sqnr, (FLOAT, INT8, HTP, WARN), strict=True)) | {rule: "black"}
    for name, values in sqnr.items():
        ax.plot(bits, values, color=colors[name], marker="o", ms=3)
    ax.plot(bits, 6.02 * bits, color="black", ls="--", lw=1)
    ends = {name: values[-1] for name, values in sqnr.items()} | {rule: 6.02 * bits[-1]}
    end_labels(ax, bits[-1] + 0.2, ends, colors, apart=6)
    ax.set(title=title, xlabel="bits b of a code", ylabel="SQNR (dB), min-max range", xticks=bits[::2])
    ax.set(xlim=(bits[0], bits[-1] + 2.8), ylim=(0, 112))
    return figure
