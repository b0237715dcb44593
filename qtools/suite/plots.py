"""Pictures that more than one cell draws, in the style of `figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from qtools.affine import Grid, QParams, bits_per_weight, choose_qparams, fake_quantize, qparams_from_range
from qtools.npu.capabilities import sign
from qtools.npu.tiling import Tiling, lower_bound, rectangles
from qtools.suite.figures import FLOAT, HTP, INT4, INT8, INT16, WARN, end_labels, new


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


# -- granularity -----------------------------------------------------------------------------------------------------


def loud_rows(w: np.ndarray, title: str, around: int = 12) -> Figure:
    """The neighbourhood of the largest entry of a weight matrix, and the largest weight of every row."""
    figure, (left, right) = new(1, 2, size=(10, 4.6), width_ratios=(1, 1.25))
    loudest = np.abs(w).max(axis=1)
    place = np.unravel_index(np.abs(w).argmax(), w.shape)
    top, side = (max(0, min(at - around, n - 2 * around)) for at, n in zip(place, w.shape))
    window = w[top : top + 2 * around, side : side + 2 * around]
    ends = (side, side + window.shape[1], top + window.shape[0], top)
    left.imshow(np.abs(window), cmap="viridis", norm=LogNorm(1e-3, loudest.max(), clip=True), extent=ends)
    left.set(title="|w| around the loudest row (yellow: loud)", xlabel="input channel", ylabel="output channel (row)")
    step = loudest.max() / 127
    right.plot(np.sort(loudest), color=INT8)
    right.axhline(loudest.max(), color=WARN, ls="--", lw=1)
    right.text(0, loudest.max() * 0.93, "end of the one 8-bit grid", color=WARN, va="top")
    right.axhline(step, color=WARN, ls="--", lw=1)
    right.text(len(w), step * 1.05, "its step", color=WARN, va="bottom", ha="right")
    right.set(title="largest weight of each row", xlabel="row, sorted", ylabel="largest |w|", yscale="log")
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def layers_chart(layers: Mapping[str, np.ndarray], title: str) -> Figure:
    """SQNR of every layer with one scale (x) against a scale per channel (y); arrays of shape (layers, 2)."""
    figure, ax = new()
    for (name, points), color, marker in zip(layers.items(), (FLOAT, HTP, WARN, INT8), "sD^o"):
        ax.plot(*points.T, marker, color=color, label=f"{name}, {len(points)} layers", ms=5, alpha=0.8, ls="none")
    ends = np.array([5, 52])
    ax.plot(ends, ends, color="black", lw=1)
    ax.text(45.2, 44, "no gain", rotation=35, ha="center", va="top")
    ax.plot(ends, ends + 6.02 * 2, color="black", lw=1, ls=":")
    ax.text(21, 34.4, "two bits gained", rotation=35, ha="center", va="bottom")
    ax.set(title=title, xlim=ends, ylim=(28, 52), xlabel="one scale per tensor: SQNR (dB)")
    ax.set_ylabel("one scale per channel: SQNR (dB)")
    ax.legend(loc="lower right")
    return figure


def ladder_chart(ladders: Mapping[str, np.ndarray], names: Sequence[str], title: str) -> Figure:
    """Error of ever finer granularities as a share of the first; the first ladder of the mapping drawn in black."""
    figure, ax = new()
    colors = dict(zip(ladders, ("black", FLOAT, INT8, HTP), strict=True))
    for name, values in ladders.items():
        ax.plot(values, color=colors[name], marker="o", ls="--" if colors[name] == "black" else "-")
    last = len(names) - 1
    ends = {name: np.log10(values[-1]) for name, values in ladders.items()}
    height = -np.inf
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        height = max(end, height + 0.1)
        ax.text(last + 0.08, 10**height, name, color=colors[name], va="center")
    ax.set(title=title, yscale="log", xlim=(-0.1, last + 1.1), xticks=range(len(names)), xticklabels=names)
    ax.set(xlabel="who shares a scale", ylabel="mean squared error, share of per tensor")
    return figure


def storage_chart(curves: Mapping[str, np.ndarray], marks: Mapping[str, tuple[float, float]], title: str) -> Figure:
    """SQNR against bits per weight, scales included: one line a granularity, one point a width of the codes."""
    figure, ax = new(size=(8, 5))
    colors = dict(zip(curves, (WARN, FLOAT, INT16, INT8, HTP), strict=True))
    for name, points in curves.items():
        ax.plot(*points.T, color=colors[name], marker="o", ms=4, label=name)
    for name, place in marks.items():
        ax.plot(*place, "*", color=INT4, ms=14, mec="black", mew=0.6, label=name, ls="none")
    ax.set(title=title, xlabel="bits per weight, scales included", ylabel="SQNR of the weights (dB)")
    ax.legend(loc="upper left")
    return figure


def capability_chart(answers: Mapping[Any, Mapping[str, Any]], title: str) -> Figure:
    """What each architecture of the HTP backend takes, one panel for each type of the activations."""
    figure, axes = new(1, 3, size=(10, 6.6), sharey=True)
    kinds = ("#BDBDBD", "#E4E4E4", HTP, INT4)  # refused by the library, by the provider; taken, taken further off
    for ax, activation in zip(axes, ("uint8", "uint16", "float32"), strict=True):
        asked = {probe: said for probe, said in answers.items() if probe.activation == activation}
        arches = list(next(iter(asked.values())))
        table = [list(said.values()) for said in asked.values()]
        grid = np.array([[_kind(answer) for answer in row] for row in table], float)
        ax.imshow(grid, cmap=ListedColormap(kinds), vmin=0, vmax=3, aspect="auto")
        for (row, column), kind in np.ndenumerate(grid):
            answer = table[row][column]
            text = "–" if kind < 2 else "~" if answer.float_bias else sign(answer).removesuffix("dB")
            ax.text(column, row, text, ha="center", va="center", fontsize=8)
        names = [f"int{probe.weight_bits} per {probe.granularity}".replace("per LPBQ", "LPBQ") for probe in asked]
        ax.set(title=f"{activation} activations", xlabel="Hexagon architecture", ylabel="weights")
        ax.set_xticks(range(len(arches)), arches)
        ax.set_yticks(range(len(names)), names)
        ax.label_outer()
    axes[1].set_ylabel("weights", visible=False)
    axes[2].set_ylabel("weights", visible=False)
    said = ("refused by the library", "refused by the provider", "taken, within 1 code", "taken, further off")
    figure.legend(
        handles=[Patch(color=kinds[k], label=said[k]) for k in (2, 3, 0, 1)], ncols=4, loc="outside lower center"
    )
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def _kind(answer: Any) -> int:
    if not answer.accepted:
        return 0 if answer.refused_by == "library" else 1
    return 2 if answer.worst is None or answer.worst <= 1 else 3


def group_errors(figure: Figure, w: np.ndarray, bits: int, group: int, corner: tuple[int, int] = (0, 0)) -> None:
    """Where the error lies when `group` neighbours of a row share a scale; `corner`: where `w` lies in its layer."""
    grid = Grid(bits, signed=True, symmetric=True, narrow_range=True, block_size=(1, group))
    error = fake_quantize(w, choose_qparams(w, grid)) - w
    widest = float(np.quantile(np.abs(w).max(axis=1), 0.9)) / grid.qmax / 2  # half a step of most rows' own scale
    sqnr = 10 * np.log10(np.sum(w**2) / np.sum(error**2))
    ax = figure.subplots()
    (top, left), (rows, columns) = corner, w.shape
    place = {"extent": (left, left + columns, top + rows, top), "aspect": "auto", "interpolation": "none"}
    ax.imshow(np.abs(error), cmap="viridis", vmin=0, vmax=widest, **place)
    ax.vlines(np.arange(left + group, left + columns, group), top, top + rows, color="white", lw=0.6)
    storage = bits_per_weight(grid, w.shape)
    ax.set_title(f"{bits} bits in groups of {group}: {storage:.2f} bits a weight, {sqnr:.1f} dB")
    ax.set(xlabel="input (white lines: a new scale begins)", ylabel="output channel; bright: large error")


# -- post-training quantization ---------------------------------------------------------------------------------------


def recognizer_chart(rows: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Lines read without a mistake, one row a setting, one dot a set of lines."""
    figure, ax = new()
    names = list(rows)[::-1]
    for row, name in enumerate(names):
        color = FLOAT if name == "float" else WARN if name == "onnxruntime" else INT16 if "a16" in name else INT8
        ax.barh(row, np.mean(rows[name]), color=color, alpha=0.6)
        ax.plot(rows[name], [row] * len(rows[name]), "o", color="black", ms=4)
        ax.text(max(rows[name]) + 1.5, row, f"{np.mean(rows[name]):.1f}", va="center")
    ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    ax.set(title=title, xlim=(0, 105), xlabel="lines read without a mistake (%), three sets of 600", ylabel="setting")
    return figure


def samples_chart(sizes: np.ndarray, curves: np.ndarray, title: str) -> Figure:
    """Unseen range and SQNR against the number of samples; `curves` of shape (sizes, draws, 3 or more)."""
    figure, (left, right) = new(1, 2, size=(10, 4.5))
    marks = ((left, 0, WARN, "range not yet seen (%)"), (right, 1, INT8, "SQNR of the logits (dB)"))
    for ax, column, color, label in marks:
        mean, spread = curves[:, :, column].mean(axis=1), curves[:, :, column].std(axis=1)
        ax.fill_between(sizes, mean - 2 * spread, mean + 2 * spread, color=color, alpha=0.2, lw=0)
        ax.plot(sizes, mean, color=color, marker="o", ms=4)
        ax.axvspan(100, 1000, color=FLOAT, alpha=0.12, lw=0)
        ax.set(xscale="log", xlabel="calibration samples", ylabel=label)
    left.text(316, left.get_ylim()[1] * 0.9, "the article", ha="center", color=FLOAT)
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def bars_chart(values: Mapping[str, float], title: str, label: str, kind: str, fmt: str = ".0f") -> Figure:
    """One bar a name, the number at its end."""
    figure, ax = new()
    names = list(values)[::-1]
    ax.barh(range(len(names)), [values[name] for name in names], color=INT8)
    for row, name in enumerate(names):
        ax.text(max(values[name], 0) + 0.01 * max(values.values()), row, format(values[name], fmt), va="center")
    ax.set_yticks(range(len(names)), names)
    ax.set(
        title=title, xlabel=label, ylabel=kind, xlim=(min(0, 1.1 * min(values.values())), 1.1 * max(values.values()))
    )
    return figure


def damage(figure: Figure, factors: np.ndarray, sqnr: np.ndarray, factor: float, method: str) -> None:
    """SQNR of a network against how strong its calibration samples were, with one strength marked."""
    ax = figure.subplots()
    ax.plot(factors, sqnr, color=INT8)
    here = float(np.interp(np.log(factor), np.log(factors), sqnr))
    ax.plot(factor, here, "o", color="black", ms=9)
    ax.axvline(1, color=FLOAT, ls="--", lw=1)
    ax.set(xscale="log", xlabel="strength of the calibration samples (1: as in use)", ylabel="SQNR of the logits (dB)")
    ax.set_title(
        f"{method}, samples {factor:.2f} times as strong: {here:.1f} dB, {sqnr.max() - here:.1f} from the best"
    )


# -- integers, and repairs --------------------------------------------------------------------------------------------


def accumulator_line(figure: Figure, acc: int, multiplier: float, bits: int) -> None:
    """Where an accumulator lands between codes: times the exact multiplier, and times one of fewer bits."""
    exact = acc * multiplier
    mantissa, exponent = np.frexp(multiplier)
    rounded = acc * float(np.ldexp(np.rint(mantissa * 2**bits), int(exponent) - bits))
    ax = figure.subplots()
    codes = np.arange(np.floor(exact) - 1, np.floor(exact) + 3)
    ax.plot(codes, np.zeros(len(codes)), "o", color=INT8, ms=9)
    for edge in codes[:-1] + 0.5:
        ax.axvline(edge, color=FLOAT, ls=":", lw=1)
    for place, height, color, name in (
        (exact, 1, "black", "exact multiplier"),
        (rounded, 0.5, WARN, f"{bits}-bit multiplier"),
    ):
        ax.annotate("", (np.rint(place), 0), (place, height), arrowprops={"arrowstyle": "->", "color": color})
        ax.plot(place, height, "|", color=color, ms=18, mew=2.5)
        ax.text(codes[0] - 0.45, height, name, color=color, va="center")
    same = "the same code" if np.rint(exact) == np.rint(rounded) else "another code"
    ax.set(
        title=f"{acc} times {multiplier:.3g} is {exact:.2f}; with {bits} bits {rounded:.2f}: {same}",
        xlabel="codes above the zero point (dotted: where rounding turns)",
        ylabel="the same product",
        ylim=(-0.3, 1.4),
        xlim=(codes[0] - 0.5, codes[-1] + 0.5),
        yticks=[],
    )


def depth_chart(chains: Mapping[str, Sequence[float]], title: str, names: Sequence[str] = ()) -> Figure:
    """Share of codes that differ from the simulation, tensor by tensor; lines told apart by style and colour."""
    figure, ax = new(size=(8, 4.6))
    styles = zip((HTP, INT8, WARN, FLOAT, INT4, INT16), ("-", "--", "-.", ":", "-", "--"))
    for (label, values), (color, style) in zip(chains.items(), styles):
        ax.plot(values, color=color, ls=style, marker="o", ms=3, label=label)
    ax.set(title=title, ylabel="codes unlike the simulated ones (%)", xlabel="tensor, in the order of the network")
    if names:
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.legend()
    return figure


def ranges_chart(before: np.ndarray, after: np.ndarray, title: str) -> Figure:
    """Largest weight of each channel of two layers that meet there, before and after equalization; (2, channels)."""
    figure, axes = new(1, 2, size=(10, 4.4), sharey=True)
    for ax, ranges, name in zip(axes, (before, after), ("before", "after"), strict=True):
        order = np.argsort(before[0])
        for values, color, marker, label in zip(
            ranges, (INT8, WARN), "o^", ("written by the first", "read by the second")
        ):
            ax.plot(values[order], marker, color=color, ms=4, ls="none", label=label)
        ax.set(title=name, yscale="log", xlabel="channel between the layers, sorted", ylabel="its largest |w|")
        ax.label_outer()
    axes[1].set_ylabel("its largest |w|", visible=False)
    axes[0].legend(loc="upper center")
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def equalizing(figure: Figure, ranges: np.ndarray, strength: float, found: Mapping[str, float]) -> None:
    """The ranges of a pair's channels at one strength of equalization, and what the network is worth then."""
    ax = figure.subplots()
    order = np.argsort(ranges[0])
    for values, color, marker, label in zip(ranges, (INT8, WARN), "o^", ("written by the first", "read by the second")):
        ax.plot(values[order], marker, color=color, ms=5, ls="none", label=label)
    said = ", ".join(f"{name} {value:.1f} %" for name, value in found.items())
    ax.set(title=f"equalized to {100 * strength:.0f} %: {said} right", yscale="log", ylim=(0.01, 200))
    ax.set(xlabel="channel between the layers, sorted", ylabel="its largest |w|")
    ax.legend(loc="upper center", ncols=2)


def flips_chart(places: np.ndarray, shares: Mapping[str, np.ndarray], title: str) -> Figure:
    """Share of weights rounded up against where they lie between two codes; rounding to nearest is the step."""
    figure, ax = new()
    ax.plot([0, 0.5, 0.5, 1], [0, 0, 100, 100], color=FLOAT, ls="--", label="nearest")
    for (name, values), color, marker in zip(shares.items(), (INT8, WARN), "o^"):
        ax.plot(places, values, color=color, marker=marker, ms=4, label=name)
    ax.set(title=title, xlabel="where a weight lies between two codes", ylabel="rounded up (%)")
    ax.legend()
    return figure


def rungs_chart(values: Mapping[str, Mapping[str, float]], title: str, label: str) -> Figure:
    """Groups of bars: one group a name, one bar a method, the number on it; nothing below 0 is shown."""
    figure, ax = new(size=(8, 4.6))
    methods = list(next(iter(values.values())))
    colors = (FLOAT, INT8, HTP, INT4, WARN, INT16)
    width = 0.84 / len(methods)
    for row, method in enumerate(methods):
        places = np.arange(len(values)) + (row - (len(methods) - 1) / 2) * width
        heights = [max(group[method], 0) for group in values.values()]
        ax.bar(places, heights, 0.92 * width, color=colors[row], label=method)
        for place, height in zip(places, heights):
            ax.text(place, height, f"{height:.0f}", ha="center", va="bottom", fontsize=8)
    ax.set_xticks(range(len(values)), list(values))
    ax.set(title=title, ylabel=label, xlabel="scheme")
    ax.axhline(0, color="black", lw=0.8)
    ax.set_ylim(top=1.22 * max(max(group.values()) for group in values.values()))
    ax.legend(ncols=len(methods), loc="upper center", columnspacing=1.2, handlelength=1.2)
    return figure


# -- overrides and fusion ---------------------------------------------------------------------------------------------


def between(figure: Figure, apart: Mapping[int, float], fused: float, bits: int) -> None:
    """SQNR against the width of the tensor between two operators that might be fused; one width marked."""
    ax = figure.subplots()
    ax.plot(list(apart), list(apart.values()), color=INT8, marker="o", ms=4)
    ax.plot(bits, apart[bits], "o", color="black", ms=10)
    ax.axhline(fused, color=HTP, ls="--")
    ax.text(4, fused, "fused: never rounded", color=HTP, va="bottom")
    ax.set_title(f"{bits} bits between convolution and clip: {apart[bits]:.1f} dB, fused {fused:.1f}")
    ax.set(xlabel="bits of the tensor between", ylabel="SQNR of the logits (dB)")


# -- quantization-aware training --------------------------------------------------------------------------------------


def staircase_chart(x: np.ndarray, y: np.ndarray, slopes: Mapping[str, np.ndarray], title: str) -> Figure:
    """A rounding on the left, and the slopes that it is said to have on the right."""
    figure, (left, right) = new(1, 2)
    left.plot(x, y, color=INT4)
    left.plot(x, x, color=INT8, lw=1, ls="--", label="x itself")
    left.set(xlabel="x", ylabel="x on the grid", aspect="equal")
    left.legend(loc="upper left")
    for (name, slope), color, width in zip(slopes.items(), (INT4, INT8), (3, 1.8)):
        right.plot(x, slope, color=color, label=name, lw=width)
    right.set(xlabel="x", ylabel="slope", ylim=(-0.15, 1.5))
    right.legend(loc="upper left")
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def restless_chart(
    used: np.ndarray, curves: Mapping[str, np.ndarray], target: float, threshold: float, title: str
) -> Figure:
    """One trained weight: as it is used, as it is kept, what it should be and where its code changes."""
    figure, ax = new()
    ax.step(range(len(used)), used, color=INT4, lw=1.2, label="the weight as it is used, on the grid")
    for (name, kept), color in zip(curves.items(), (INT8, HTP)):
        ax.plot(kept, color=color, label=name)
    ax.axhline(target, color=FLOAT, ls="--", label="what it should be")
    ax.axhline(threshold, color=WARN, ls=":", lw=1.2, label="where its code changes")
    ax.set(title=title, xlabel="update", ylabel="weight", ylim=(0, 1.6))
    ax.legend(loc="upper left", ncols=2)
    return figure


def training_chart(before: Mapping, after: Mapping, others: Mapping, title: str) -> Figure:
    """Accuracy and SQNR by scheme before and after training, and after another's training."""
    figure, axes = new(1, 2)
    sides = {"before": (before, FLOAT, "o", 0), "trained by qtools": (after, INT8, "o", 0)}
    sides["trained by AIMET"] = others, INT4, "D", 0.25
    for ax, part, label in zip(axes, ("right", "db"), ("test digits right (%)", "SQNR of the logits (dB)")):
        for row, scheme in enumerate(before):
            ax.plot([before[scheme][part], after[scheme][part]], [row, row], color=FLOAT, lw=1)
        for name, (values, color, marker, down) in sides.items():
            places = [value[part] for value in values.values()]
            ax.plot(places, down + np.arange(len(places)), color=color, marker=marker, ls="none", label=name)
        ax.set(xlabel=label, ylabel="bits of weights and activations", yticks=range(len(before)), ylim=(4.6, -0.5))
        ax.set_yticklabels(list(before))
    axes[0].legend(loc="upper left")
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def parts_chart(panels: Mapping[str, Mapping[str, float]], title: str, label: str) -> Figure:
    """Panels of bars that lie, one a name, the number at its end; the last bar, of everything, in another color."""
    figure, axes = new(1, len(panels))
    for ax, (panel, values) in zip(axes, panels.items()):
        colors = [FLOAT] + [INT8] * (len(values) - 2) + [INT4]
        ax.barh(range(len(values)), list(values.values()), color=colors)
        for row, value in enumerate(values.values()):
            ax.text(value + 1, row, f"{value:.0f}", va="center")
        ax.set(xlabel=label, xlim=(0, 112), xticks=range(0, 101, 20), ylim=(len(values) - 0.4, -0.6))
        ax.set_yticks(range(len(values)), list(values))
        ax.set_ylabel("what is done")
        ax.set_title(panel, fontsize=10, weight="normal")
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def spread_chart(
    panels: Mapping[str, Mapping[str, tuple]], title: str, label: str, unit: str, before: Mapping[str, float] = {}
) -> Figure:
    """Panels of curves on a logarithmic axis, each of places, means and deviations; and a line before training."""
    figure, axes = new(1, len(panels))
    for ax, (name, curves) in zip(axes, panels.items()):
        for (curve, (places, means, spread)), color in zip(curves.items(), (INT8, WARN, INT4)):
            ax.errorbar(places, means, yerr=spread, color=color, marker="o", ms=5, capsize=3, label=curve)
        marks = sorted({place for places, _, _ in curves.values() for place in places})
        ax.set(xscale="log", xlabel=label, ylabel=unit)
        ax.set_xticks(marks, [f"{mark:g}" for mark in marks])
        ax.minorticks_off()
        if name in before:
            ax.axhline(before[name], color=FLOAT, ls="--", lw=1.2, label="not trained")
        ax.set_ylim(bottom=min(ax.get_ylim()[0], ax.get_ylim()[1] - 3))  # small differences are to look small
        ax.set_title(name, fontsize=10, weight="normal")
    if len(curves) > 1 or before:
        axes[0].legend(loc="lower center")
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def training_path(figure: Figure, path: Mapping[str, Sequence], edges: np.ndarray, bits: int, at: int) -> None:
    """One moment of a training: where the weights lie between the codes, and how far the network has come."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    left.stairs(path["histogram"][0], edges, color=FLOAT, label="before training")
    left.stairs(path["histogram"][at], edges, color=INT4, fill=True, alpha=0.6, label="now")
    for code in range(ends[0], ends[1] + 1):
        left.axvline(code, color=INT8, lw=0.7, ls=":")
    left.set(xlabel="weights of one layer (steps; dotted: the codes)", ylabel="weights")
    left.set(xlim=(max(ends[0] - 2, edges[0]), min(ends[1] + 2, edges[-1])))
    left.legend(loc="upper left")
    epochs = np.linspace(0, 5, len(path["right"]))
    right.plot(epochs, path["right"], color=INT8)
    right.plot(epochs[at], path["right"][at], "o", color="black", ms=8)
    right.set(xlabel="epoch", ylabel="test digits right (%)", ylim=(0, 103))
    right.grid(alpha=0.3)
    left.set_title(f"{bits} bits, epoch {epochs[at]:.2f}: {path['changed'][at]:.1f} % of the network's codes changed")


# -- the roofline -----------------------------------------------------------------------------------------------------


def roof(ax: Axes, peak: float, bandwidth: float, unit: float = 1e12, ends: tuple[float, float] = (0.1, 1e4)) -> None:
    """The most operations a second (of `unit`) against operations a byte, for `peak` a second and `bandwidth` bytes."""
    ridge = peak / bandwidth
    places = np.array([ends[0], ridge, ends[1]])
    ax.plot(places, np.minimum(peak, places * bandwidth) / unit, color="black", lw=1.4)
    ax.axvline(ridge, color=FLOAT, ls=":", lw=1)
    name = {1e12: "TOPS", 1e9: "GOPS"}[unit]
    ax.set(xscale="log", yscale="log", xlim=ends, xlabel="intensity (operations a byte)", ylabel=f"attainable ({name})")


def kinds_chart(
    kinds: Mapping[str, np.ndarray], printed: Mapping[str, float], peak: float, bandwidth: float, title: str
) -> Figure:
    """Layers by kind: on the roof above, and their intensities below, with crosses for what was printed."""
    figure, (top, strips) = new(2, 1, size=(8, 6), sharex=True, height_ratios=(1.35, 1))
    roof(top, peak, bandwidth)
    for row, ((name, found), color) in enumerate(zip(kinds.items(), (INT8, HTP, INT4, INT16), strict=True)):
        top.plot(found, np.minimum(peak, found * bandwidth) / 1e12, "o", color=color, ms=4, alpha=0.5)
        strips.plot(found, [row] * len(found), "|", color=color, ms=16, mew=1.2)
        strips.plot(printed[name], row, "x", color=WARN, ms=9, mew=2.5)
        top.plot(printed[name], printed[name] * bandwidth / 1e12, "x", color=WARN, ms=9, mew=2.5)
    top.text(peak / bandwidth * 0.9, peak / 1e12 * 1.25, "ridge", ha="right", color=FLOAT)
    top.text(3.2, 0.06, "crosses: as the article prints them", color=WARN)
    strips.axvline(peak / bandwidth, color=FLOAT, ls=":", lw=1)
    strips.set(xlabel="intensity (operations a byte)", ylabel="kind of layer", ylim=(len(kinds) - 0.4, -0.6))
    strips.set_yticks(range(len(kinds)), [f"{name} ({len(found)})" for name, found in kinds.items()])
    top.set(title=title, ylim=(0.003, 2.5 * peak / 1e12))
    top.label_outer()
    top.set_xlabel(strips.get_xlabel(), visible=False)
    return figure


def attained_chart(
    points: Mapping[str, tuple[float, float]], peak: float, bandwidth: float, title: str, unit: float = 1e12,
    named: Sequence[str] = (), ends: tuple[float, float] = (30, 2e4),
) -> Figure:  # fmt: skip
    """Where measured (intensity, operations a second) lie under a roof; some of them by name."""
    figure, ax = new()
    roof(ax, peak, bandwidth, unit, ends)
    for name, (dense, reached) in points.items():
        above = reached > 1.05 * min(peak, dense * bandwidth)
        look = {"color": WARN if above else INT8}
        ax.plot(dense, reached / unit, "o", ms=6, **look)
        if name in named:
            look |= {"va": "bottom" if above else "top", "textcoords": "offset points"}
            ax.annotate(name, (dense, reached / unit), (6, 0 if above else -3), **look)
    ax.set(title=title, ylabel=ax.get_ylabel().replace("attainable", "attained; line: attainable"))
    return figure


def latency_chart(
    panels: Mapping[str, Sequence[tuple[str, str, float, float]]], named: Sequence[str], title: str
) -> Figure:
    """Predicted against published milliseconds, of (network, precision, published, predicted), one panel a model."""
    figure, axes = new(1, len(panels), size=(10, 5.2), sharex=True, sharey=True)
    colors = {"float": (FLOAT, "s"), "w8a16": (INT16, "^"), "w8a8": (INT8, "o")}
    ends = np.array([0.05, 50])
    for ax, (words, rows) in zip(axes, panels.items(), strict=True):
        ax.plot(ends, ends, color="black", lw=1)
        ax.fill_between(ends, ends / 1.25, ends * 1.25, color=FLOAT, alpha=0.15, lw=0)
        for precision, (color, marker) in colors.items():
            if part := [row[2:] for row in rows if row[1] == precision]:
                ax.plot(*zip(*part), marker, color=color, ms=5, ls="none", label=precision)
        for name, precision, published, predicted in rows:
            if name in named and not 1 / 1.25 < predicted / published < 1.25:
                above = predicted > published
                shift = (-6 if above else 6, -9 if precision == "w8a16" else 0)
                place = {"xytext": shift, "textcoords": "offset points", "va": "center"}
                ax.annotate(name, (published, predicted), ha="right" if above else "left", fontsize=8, **place)
        ax.set(title=words, xscale="log", yscale="log", xlim=ends, ylim=ends)
        ax.set_xlabel("published (ms)")
        ax.set_ylabel("predicted (ms)", visible=ax is axes[0])
    axes[-1].legend(loc="upper left", title="band: within a quarter")
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def steps_chart(steps: Mapping[str, tuple[float, float]], title: str) -> Figure:
    """Median (bar) and 90th percentile (mark) of an error, refinement by refinement."""
    figure, ax = new(size=(8, 5))
    names = list(steps)[::-1]
    for row, name in enumerate(names):
        median, tail = steps[name]
        ax.barh(row, median, color=INT8)
        ax.plot(tail, row, "|", color=WARN, ms=15, mew=2.5)
        ax.text(median + 0.7, row, f"{median:.1f}", va="center")
    ax.text(tail - 1, row, "one in ten is worse than this", color=WARN, ha="right", va="center")
    ax.set_yticks(range(len(names)), names)
    ax.set(title=title, xlabel="error of networks left out of the fit: median (%)", ylabel="what the formula has")
    return figure


def under_a_roof(figure: Figure, ops: np.ndarray, moved: np.ndarray, peak: float, bandwidth: float, name: str) -> None:
    """Layers on a roof, larger the longer they take; the title says how long, by the larger of the two clocks."""
    ax = figure.subplots()
    roof(ax, peak, bandwidth, ends=(0.5, 2e4))
    ax.minorticks_off()  # half of the time it takes to draw
    compute, memory = ops / peak, moved / bandwidth
    took = np.maximum(compute, memory)
    dense, waits = ops / moved, memory > compute
    for chosen, color in ((waits, WARN), (~waits, INT8)):
        place = dense[chosen], np.minimum(peak, dense[chosen] * bandwidth) / 1e12
        ax.scatter(*place, s=30 + 600 * took[chosen] / took.sum(), color=color, alpha=0.5)
    share = 100 * took[waits].sum() / took.sum()
    ax.set(title=f"{name}: {1e3 * took.sum():.3g} ms, {share:.0f} % of it bound by memory", ylim=(0.02, 200))


# -- mixed precision --------------------------------------------------------------------------------------------------

_OF_WIDTH = {4: INT4, 8: INT8, 16: INT16}
_MARGINS = {"left": 0.1, "right": 0.98, "top": 0.93, "bottom": 0.11}


def sensitivity_chart(
    names: Sequence[str], losses: Mapping[int, np.ndarray], errors: Mapping[int, np.ndarray], title: str, label: str
) -> Figure:  # fmt: skip
    """What each tensor loses by each width, with two standard errors to either side (above only, from 0 on)."""
    figure, ax = new(size=(8, 0.28 * len(names) + 1.4))
    rows = np.arange(len(names))
    for bits, values in losses.items():
        reach = 2 * errors[bits]
        low = np.where(values > reach, values - reach, values)
        ax.hlines(rows, low, values + reach, color=_OF_WIDTH[bits], lw=1.2)
        ax.plot(values, rows, "o", color=_OF_WIDTH[bits], ms=5, label=f"{bits} bits")
    ax.set_yticks(rows, names)
    ax.set(title=title, xscale="log", xlabel=label, ylabel="tensor", ylim=(len(names) - 0.4, -0.6))
    ax.legend(loc="center left", bbox_to_anchor=(0, 0.25))
    ax.grid(axis="x", alpha=0.3)
    return figure


def adding_chart(panels: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """Tensors rounded one after another: the sum of what each costs alone, and what they cost together."""
    figure, axes = new(1, len(panels), size=(10, 4.4))
    for ax, (label, (alone, together)) in zip(axes, panels.items(), strict=True):
        counts = np.arange(1, len(alone) + 1)
        ax.plot(counts, np.cumsum(alone), color=FLOAT, ls="--", marker="o", ms=3, label="each alone, added up")
        ax.plot(counts, together, color=INT8, marker="o", ms=4, label="measured together")
        ax.set(xlabel="tensors rounded to 8 bits, the most sensitive last", ylabel=label, xticks=counts[1::4])
        ax.legend(loc="upper left")
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def shares_chart(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], reference: float, title: str) -> Figure:
    """What is misread against the share of the tensors that stay wide, the worst first; the article's 20 % marked."""
    figure, ax = new()
    ax.axhline(100 - reference, color=FLOAT, ls=":", lw=1.2)
    ax.text(100, 0.97 * (100 - reference), "float", color=FLOAT, ha="right", va="top")
    ax.axvline(20, color=WARN, ls="--", lw=1.2)
    for (name, (share, right)), color, marker in zip(curves.items(), (INT8, HTP, INT4, INT16), "o^sD"):
        ax.plot(share, 100 - right, color=color, marker=marker, ms=5, label=name)
    ax.set(title=title, xlabel="tensors at 16 bits, the most sensitive first (%)", ylabel="misread (%)", yscale="log")
    ax.set_yticks(marks := (1, 2, 5, 10, 20, 50), [str(mark) for mark in marks])
    ax.minorticks_off()
    ax.set_ylim(bottom=0.7)
    ax.text(20.8, 30, "the article's 20 %", color=WARN)
    ax.legend(loc="upper right")
    return figure


def front_chart(
    panels: Mapping[str, Mapping[str, np.ndarray]], title: str, label: str, stairs: bool = True
) -> Figure:  # fmt: skip
    """Loss against cost, one panel a cost: the best (as stairs), a greedy choice, shares kept wide, and one more."""
    figure, axes = new(1, len(panels), size=(10 if len(panels) > 1 else 8, 4.6), sharey=True)
    looks = (INT8, "-" if stairs else "", "o", 4), (HTP, "", "o", 9), (INT4, "", "s", 6), (WARN, "", "D", 8)
    for ax, (cost, series) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for (name, points), (color, line, marker, size) in zip(series.items(), looks):
            ring = {"mfc": "none", "mew": 1.6} if size == 9 else {}
            x, y = np.asarray(points).T
            ax.plot(x, y, marker, ls=line, color=color, ms=size, drawstyle="steps-post", label=name, **ring)
        ax.set(yscale="log", xlabel=cost)
        ax.set_ylabel(label, visible=ax is np.atleast_1d(axes)[0])
    np.atleast_1d(axes)[0].legend(loc="upper right")
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def widths(
    figure: Figure, names: Sequence[str], types: Mapping[str, int], front: np.ndarray, here: tuple[float, float],
    title: str,
) -> None:  # fmt: skip
    """Tensors in the colour of their width, over the front of cost and loss with one point marked."""
    top, ax = figure.subplots(2, 1, height_ratios=(1, 2.6), gridspec_kw={"hspace": 0.95} | _MARGINS)
    bits = [types[name] for name in names]
    top.bar(range(len(names)), bits, color=[_OF_WIDTH[width] for width in bits], width=0.9)
    for place, name in enumerate(names):  # texts are drawn sooner than ticks
        top.text(place, -1, name, rotation=90, fontsize=8, ha="center", va="top")
    top.set(title=title, ylabel="bits", xlabel=" ", xticks=(), yticks=(4, 8, 16), ylim=(0, 17))
    ax.plot(front[:, 0], front[:, 1], color=INT8, marker="o", ms=4)
    ax.plot(*here, "o", color="black", ms=10)
    ax.set(yscale="log", xlabel="bytes moved (% of all at 16 bits)", ylabel="noise (share of power)")
    ax.minorticks_off()


# -- tuning -----------------------------------------------------------------------------------------------------------


def tiles(ax: Axes, of: Tiling, tensor: Literal["weights", "inputs", "outputs"], color: str) -> None:
    """The tiles of a tensor; where they overlap it is darker."""
    places = rectangles(of, tensor)
    # One collection instead of many patches: it is drawn several times faster.
    corners = [[(x, y), (x + width, y), (x + width, y + height), (x, y + height)] for y, x, height, width in places]
    ax.add_collection(PolyCollection(corners, facecolors=to_rgba(color, 0.3), edgecolors=color, linewidths=0.6))
    height, width = (max(end) for end in zip(*((y + h, x + w) for y, x, h, w in places)))
    axes = ("input channel", "output channel") if tensor == "weights" else ("column", "row")
    times = getattr(of.times, tensor)
    ax.set(xlim=(0, width), ylim=(height, 0), xlabel=axes[0], ylabel=axes[1], aspect="equal")
    ax.set_title(f"{tensor}: {len(places)} tile{'s' * (len(places) > 1)}, {times:.2f} times")


def tiles_chart(of: Tiling, title: str) -> Figure:
    """Inputs, weights and outputs of one tiling, side by side."""
    figure, axes = new(1, 3, size=(10, 4.2))
    for ax, tensor, color in zip(axes, ("inputs", "weights", "outputs"), (INT8, INT4, HTP), strict=True):
        tiles(ax, of, tensor, color)
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def sizes_chart(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], marks: Mapping[str, float], title: str,
    labels: tuple[str, str],
) -> Figure:  # fmt: skip
    """Curves over sizes in bytes, both axes logarithmic; upright lines with names at some sizes."""
    figure, ax = new()
    looks = {"process": INT8, "runtime": INT4}
    for (name, (sizes, values)), color in zip(curves.items(), (INT8, INT4, HTP, INT16, WARN, FLOAT)):
        color = next((tone for word, tone in looks.items() if word in name), color)
        style = "-" if "copied" not in name else "--"
        ax.plot(sizes, values, style, color=color, marker="o", ms=4, label=name)
    for name, size in marks.items():
        ax.axvline(size, color=FLOAT, ls=":", lw=1)
        side = "left" if size < max(next(iter(curves.values()))[0]) / 20 else "right"
        ax.text(size, 1, f" {name} ", color=FLOAT, ha=side, va="top", transform=ax.get_xaxis_transform())
    ax.set(title=title, xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    _sizes_axes(ax, curves)
    ax.legend()
    return figure


def _sizes_axes(ax: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Ticks in KB and MB below, and plain numbers at the left where powers of ten would be few."""
    sizes, values = (np.concatenate(parts) for parts in zip(*curves.values()))
    places = [4.0**power for power in range(5, 16) if sizes.min() <= 4**power <= sizes.max()]
    ax.set_xticks(places, [f"{p / 2**20:.0f} MB" if p >= 2**20 else f"{p / 2**10:.0f} KB" for p in places])
    if values.max() < 100:
        ticks = [1, 1.5, 2, 3, 5, 10, 20, 50]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_ylim(0.93, max(1.5, 1.15 * values.max()))
    ax.minorticks_off()


def small_vtcm(
    figure: Figure, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], of: Tiling, vtcm: float
) -> None:
    """The tiles of the tensor that travels most, and the traffic of every order of loops over the sizes of VTCM."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25), gridspec_kw={"wspace": 0.3})
    color, tensor = max(
        zip((INT8, INT4, HTP), ("inputs", "weights", "outputs")), key=lambda one: getattr(of.times, one[1])
    )
    tiles(left, of, tensor, color)
    once = lower_bound(of.conv).total
    for (name, (sizes, values)), color, wide in zip(curves.items(), (INT4, INT8, HTP), (6, 4, 1.5)):
        right.plot(sizes, values, color=color, marker="o", ms=3, lw=wide, label=f"{name} stay")
    right.plot(vtcm, of.moved.total / once, "o", color="black", ms=10, mfc="none")
    right.set(xscale="log", yscale="log", xlabel="VTCM", ylabel="bytes moved / all bytes once")
    right.set_title(f"{of.moved.total / 1e6:.2f} MB travel, {of.moved.total / once:.2f} times what must")
    _sizes_axes(right, curves)
    right.legend()


def levers_chart(savings: Mapping[str, Mapping[str, float]], title: str, label: str) -> Figure:
    """Groups of lying bars: one group a lever, one bar a network, the number at its end."""
    figure, ax = new(size=(8, 5))
    networks = list(next(iter(savings.values())))
    width = 0.8 / len(networks)
    for row, values in enumerate(savings.values()):
        for index, (network, color) in enumerate(zip(networks, (INT8, INT4, HTP))):
            place = row + (index - (len(networks) - 1) / 2) * width
            ax.barh(place, values[network], 0.92 * width, color=color, label=network if not row else None)
            ax.text(max(values[network], 0) + 0.4, place, f"{values[network]:.1f}", va="center", fontsize=9)
    ax.set_yticks(range(len(savings)), list(savings))
    most = max(max(values.values()) for values in savings.values())
    ax.set(title=title, xlabel=label, ylabel="lever", xlim=(0, 1.12 * most), ylim=(len(savings) - 0.45, -0.55))
    ax.legend(loc="lower right")
    return figure


def types_chart(
    labels: Mapping[str, str], only: Mapping[str, tuple[float, float]], gains: Mapping[str, tuple[float, float]],
    title: str,
) -> Figure:  # fmt: skip
    """Kinds of operators, with two standard errors: quality with one alone quantized, and what leaving it out gains."""
    figure, axes = new(1, 2, size=(10, 0.34 * len(labels) + 1.5), sharey=True)
    rows = np.arange(len(labels))
    sides = (only, "SQNR with only this kind at 8 bits (dB)"), (gains, "gained by leaving this kind in float (dB)")
    for ax, (values, label) in zip(axes, sides, strict=True):
        means, errors = np.array([values[name] for name in labels]).T
        ax.barh(rows, means, color=INT8, alpha=0.85)
        ax.hlines(rows, means - 2 * errors, means + 2 * errors, color="black", lw=1.2)
        ax.axvline(0, color="black", lw=0.8)
        ax.set(xlabel=label, ylim=(len(labels) - 0.4, -0.6))
    axes[0].set_yticks(rows, list(labels.values()))
    axes[0].set_ylabel("kind (tensors)")
    axes[1].set_ylabel("kind (tensors)", visible=False)
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


# -- language models --------------------------------------------------------------------------------------------------


def floor_chart(
    floors: Mapping[str, tuple[float, float]], printed: Mapping[str, float], measured: float, title: str
) -> Figure:
    """Least milliseconds a token at two bandwidths (bars: impossible), and what an article prints for it (crosses)."""
    figure, ax = new()
    for row, (name, (peak, usable)) in enumerate(floors.items()):
        ax.barh(row, peak, color=WARN, alpha=0.35, label="impossible at the DRAM's peak" if not row else None)
        ax.barh(row, usable - peak, left=peak, color=WARN, alpha=0.15, label=None if row else "impossible at 50 GB/s")
        ax.text(usable + 1, row, f"{usable:.0f}", va="center", color=WARN)
        ax.text(peak - 1, row + 0.36, f"{peak:.0f}", va="bottom", ha="right", color=WARN)
        if name in printed:
            ax.plot(printed[name], row, "x", color="black", ms=10, mew=2.5, label=None if row else "the article")
    ax.axvline(measured, color=HTP, ls="--", lw=1.5)
    ax.text(measured + 1, -0.62, "published by Qualcomm (w4a16)", color=HTP, va="center")
    ax.set_yticks(range(len(floors)), list(floors))
    ax.set(title=title, xlabel="milliseconds a token, Llama-2-7B", ylabel="scheme")
    ax.set_ylim(len(floors) - 0.5, -0.9)
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.12), ncols=3)
    return figure


def pairs_chart(rows: Mapping[str, tuple[float, float]], title: str, label: str, names: tuple[str, str]) -> Figure:
    """Two lying bars for each row, with their numbers."""
    figure, ax = new()
    for side, (name, color) in enumerate(zip(names, (HTP, INT8))):
        places = np.arange(len(rows)) + 0.4 * side - 0.2
        values = [row[side] for row in rows.values()]
        ax.barh(places, values, 0.36, color=color, label=name)
        for place, value in zip(places, values):
            ax.text(value, place, f" {value:.1f}", va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(title=title, xlabel=label, ylabel="model and chip", ylim=(len(rows) - 0.5, -0.5))
    ax.legend(loc="lower right")
    return figure


def widths_chart(panels: Mapping[str, Mapping[str, Mapping[str, float]]], title: str, label: str) -> Figure:
    """Perplexity over the width of weights, a line for each granularity, one panel a model; a dotted line is float."""
    figure, axes = new(1, len(panels), size=(10, 4.6))
    colors = {"tensor": FLOAT, "channel": INT8, "groups of 128": INT4, "groups of 32": HTP}
    for ax, (model, lines) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        widths_ = list(dict.fromkeys(width for line in lines.values() for width in line if width != "float"))
        ax.axhline(lines["float"]["float"], color="black", ls=":", lw=1.2, label="float")
        for name, line in lines.items():
            if name != "float":
                places = [widths_.index(width) for width in line]
                ax.plot(places, list(line.values()), "o-", color=colors[name], ms=5, label=name)
                for place, value in zip(places, line.values()):
                    if value > 1000:
                        ax.text(place - 0.58, 700, f"{value:.0e} ↑", color=colors[name])
        ax.set_xticks(range(len(widths_)), [f"{width} bits" for width in widths_])
        ax.set(title=model, yscale="log", ylim=(9, 1000), xlabel="weights", ylabel=label)
        ticks = [10, 20, 50, 100, 200, 500, 1000]
        ax.set_yticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
    np.atleast_1d(axes)[0].legend(loc="upper left")
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def context_chart(
    context: np.ndarray, saved: Mapping[str, np.ndarray], wanted: float, longest: int, title: str
) -> Figure:
    """What a cache of half the bits saves of a token's time against the context, up to which a model may go."""
    figure, ax = new()
    ax.axvspan(longest, context[-1], color=FLOAT, alpha=0.12, lw=0)
    ax.text(longest * 1.02, 2, "beyond what Llama 2 was trained for", color=FLOAT)
    ax.axhline(wanted, color=WARN, ls="--", lw=1.2)
    ax.text(context[0], wanted + 0.4, f"the article: {wanted:.0f} %", color=WARN)
    for (name, line), color in zip(saved.items(), (INT4, INT8)):
        ax.plot(context, line, color=color)
        place = len(context) * 3 // 4
        ax.text(context[place], line[place] - 1.2, name, color=color)
    ax.set(title=title, xlabel="context (tokens)", ylabel="saved of a token's time (%)", ylim=(0, None))
    return figure


def attention_chart(maps: Mapping[str, np.ndarray], words: Sequence[str], title: str) -> Figure:
    """Attention weights (queries, keys) side by side, in one colour scale, with the tokens along the axes."""
    figure, axes = new(1, len(maps), size=(10, 4.4), sharey=True)
    for ax, (name, values) in zip(axes, maps.items(), strict=True):
        shown = ax.imshow(values, cmap="Blues", vmin=0, vmax=1)
        ax.set_title(name, fontsize=10)
        ax.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
        ax.set_yticks(range(len(words)), words, fontsize=7)
        ax.set_xlabel("looked at")
        ax.set_ylabel("token", visible=ax is axes[0])
    bar = figure.colorbar(shown, ax=axes, shrink=0.7)
    bar.ax.set(ylabel="share of its attention")
    bar.ax.set_xlabel("0 to 1", labelpad=10)
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure


def token_times(
    figure: Figure, context: np.ndarray, curves: Mapping[str, np.ndarray], here: int, title: str, printed: float
) -> None:
    """Milliseconds a token against the context: the floor, the prediction, and a mark at one context."""
    ax = figure.subplots()
    for (name, line), color in zip(curves.items(), (WARN, INT8)):
        ax.plot(context, line, color=color, label=name)
        ax.plot(here, np.interp(here, context, line), "o", color=color, ms=9)
    ax.axhline(printed, color="black", ls=":", lw=1.2)
    ax.text(context[-1], printed, f"the article: {printed:.0f} ms", ha="right", va="bottom")
    ax.set(title=title, xlabel="context (tokens)", ylabel="milliseconds a token", ylim=(0, 200))
    ax.legend(loc="upper left")


# -- the ledger -------------------------------------------------------------------------------------------------------

_OF_VERDICT = {"holds": HTP, "holds when": INT4, "fails": WARN, "needs a phone": INT8}


def verdict_color(verdict: str) -> str:
    """The colour of a verdict; grey for none."""
    return _OF_VERDICT.get(verdict, FLOAT)


def tiles_of_claims(rows: Mapping[str, Sequence[tuple[str, str, str]]], title: str) -> Figure:
    """One row a section, one tile a claim: its id, sign and verdict; the sign says what the colour says."""
    figure, ax = new(size=(8, 0.42 * len(rows) + 1.6))
    for row, tiles_ in enumerate(rows.values()):
        for column, (name, sign_, verdict) in enumerate(tiles_):
            ax.barh(row, 0.94, 0.84, left=column, color=verdict_color(verdict), alpha=0.3)
            ax.text(column + 0.08, row, f"{sign_}  {name}", va="center", fontsize=11)
    most = max(len(tiles_) for tiles_ in rows.values())
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(xlim=(0, most), ylim=(len(rows) - 0.5, -0.5), xticks=(), ylabel="section of the article")
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    ax.set_xlabel("its claims, one tile each")
    seen = {verdict: sign_ for tiles_ in rows.values() for _, sign_, verdict in tiles_}
    kinds = [verdict for verdict in _OF_VERDICT if verdict in seen]
    legend = [Patch(color=_OF_VERDICT[kind], alpha=0.3, label=f"{seen[kind]}  {kind}") for kind in kinds]
    figure.legend(handles=legend, ncols=4, loc="outside lower center")
    return figure


def off_chart(rows: Sequence[tuple[str, float, float]], title: str) -> Figure:
    """Printed over found on a logarithmic axis, one row a number: name, printed, found; the shaded band is 10 %."""
    figure, ax = new(size=(8, 0.27 * len(rows) + 1.2))
    ax.axvspan(1 / 1.1, 1.1, color=HTP, alpha=0.25, lw=0)
    ax.axvline(1, color="black", lw=1)
    for row, (_, printed, found) in enumerate(rows):
        ratio = printed / found
        near = 1 / 1.1 <= ratio <= 1.1
        color, marker = (HTP, "o") if near else (WARN, ">") if ratio > 1 else (INT8, "<")
        ax.plot([1, ratio], [row, row], color=color, lw=1.5)
        ax.plot(ratio, row, marker, color=color, ms=7)
        side = {"ha": "left", "x": ratio * 1.35} if ratio >= 1 else {"ha": "right", "x": ratio / 1.35}
        ax.text(side["x"], row, f"{printed:.3g} : {found:.3g}", va="center", ha=side["ha"], fontsize=8)
    ends = [printed / found for _, printed, found in rows]
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    ticks = [10.0**power for power in range(-3, 5) if min(ends) / 8 <= 10**power <= max(ends) * 12]
    ax.set(xscale="log", xlim=(min(ends) / 8, max(ends) * 12), ylim=(len(rows) - 0.4, -0.6))
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set(xlabel="printed / found (numbers: printed : found; band: within 10 %)", ylabel="claim and quantity")
    return figure


def firmness(rows: Sequence[tuple[str, str, float | None, str]], furthest: float, title: str) -> Figure:
    """How large a factor on one result turns each verdict: name, verdict, factor (or None), and which result."""
    figure, ax = new(size=(8, 0.235 * len(rows) + 1.1))
    for row, (_, verdict, factor, key) in enumerate(rows):
        color = verdict_color(verdict)
        if factor is None:
            ax.plot(furthest, row, "o", color=color, mfc="none", ms=7)
            ax.text(furthest / 1.2, row, "no factor turns it", va="center", ha="right", fontsize=8, color=FLOAT)
        else:
            size = max(factor, 1 / factor)
            ax.plot([1, size], [row, row], color=color, lw=2.5)
            ax.plot(size, row, "o", color=color, ms=6)
            digits = 3 if abs(factor - 1) > 0.01 else 5
            ax.text(size * 1.12, row, f"{key} × {factor:.{digits}g}", va="center", fontsize=8)
    ax.axvspan(1, 1.1, color=FLOAT, alpha=0.15, lw=0)
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ticks = [tick for tick in (1, 2, 5, 10, 100, 1000) if tick <= furthest]
    ax.set(title=title, xscale="log", xlim=(1, 1.3 * furthest), ylim=(len(rows) - 0.4, -0.6))
    ax.set_xticks(ticks, [f"{tick}" for tick in ticks])
    ax.minorticks_off()
    ax.set(xlabel="smallest factor on one result that turns the verdict (grey: within 10 %)", ylabel="claim")
    return figure


def what_if(
    figure: Figure, words: Sequence[str], spans: Sequence[tuple[float, float, str]], here: float, key: str, title: str
) -> None:
    """A claim in words, over the verdicts that it would get if one result were so many times as large."""
    top, ax = figure.subplots(2, 1, height_ratios=(3.2, 1), gridspec_kw={"hspace": 0.05})
    top.axis("off")
    top.set_title(title)
    for line, text in enumerate(words):
        top.text(0, 0.97 - 0.077 * line, text, transform=top.transAxes, fontsize=9, va="top")
    for left, right, verdict in spans:
        ax.fill_between([left, right], 0, 1, color=verdict_color(verdict), alpha=0.35, lw=0)
        if right > 1.3 * left:
            ax.text(np.sqrt(left * right), 0.5, verdict, ha="center", va="center", fontsize=9)
    ax.axvline(1, color="black", ls=":", lw=1)
    ax.plot(here, 0.85, "v", color="black", ms=11)
    ax.set(xscale="log", xlim=(spans[0][0], spans[-1][1]), ylim=(0, 1), yticks=(), ylabel="verdict")
    ax.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
    ax.minorticks_off()
    ax.set_xlabel(f"{key}, times what was found")
