"""One look for every picture of the suite, and the numbers behind each picture.

Float is grey, 8 bits blue, 4 bits orange, 16 bits purple, the HTP backend green; the colours are Okabe and Ito's
(2008), which readers with any common colour vision tell apart.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOAT, INT8, INT4, INT16, HTP, WARN = "#6e6e6e", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00"
SIZE = (8.0, 4.5)  # inches, 16:9
DPI = 120
WIDTH = 720  # CSS pixels a picture takes on the page
_LIVE_DPI = 90

STYLE = {
    "figure.figsize": SIZE,
    "figure.dpi": DPI,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=[INT8, INT4, HTP, INT16, WARN, FLOAT]),
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.hashsalt": "qtools",
}


matplotlib.rcParams.update(STYLE)  # so that whatever a notebook draws, with or without `new`, has the one look


def new(rows: int = 1, columns: int = 1, size: tuple[float, float] = SIZE, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes, like ``plt.subplots``, but not kept open (and shown twice) by pyplot."""
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def tensor_panel(ax: Axes, values: np.ndarray, title: str, *, fmt: str, cmap: str = "RdBu", limit: float) -> None:
    """A small matrix as coloured cells with the numbers written in."""
    ax.imshow(values, cmap=cmap, vmin=-limit, vmax=limit)
    for (row, column), value in np.ndenumerate(values):
        dark = abs(value) > 0.6 * limit
        ax.text(
            column, row, format(value, fmt), ha="center", va="center", fontsize=8, color="white" if dark else "black"
        )
    ax.set(title=title, xlabel="column", ylabel="row")
    ax.set_xticks(range(values.shape[1]))
    ax.set_yticks(range(values.shape[0]))


def end_labels(ax: Axes, x: float, ends: Mapping[str, float], colors: Mapping[str, str], apart: float) -> None:
    """Names of lines at their right ends, moved up where two would stand closer than `apart`."""
    height = -np.inf
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        height = max(end, height + apart)
        ax.text(x, height, name, color=colors[name], va="center")


def render(figure: Figure, alt: str = "") -> tuple[bytes, dict[str, Any]]:
    """The PNG of a figure, and its sidecar: hash, alternative text, and every number plotted.

    Raises
    ------
    ValueError
        If an axis has no label, no title states the finding, or a title is wider than the picture.
    """
    titles = [figure.get_suptitle(), *(ax.get_title(loc) for ax in figure.axes for loc in ("left", "center"))]
    title = next((text for text in titles if text), None)
    if title is None:
        raise ValueError("a figure states its finding in a title; this one has none")
    for ax in figure.axes:
        if ax.axison and not (ax.get_xlabel() and ax.get_ylabel()):
            raise ValueError(f"both axes carry a label with its unit; {title!r} lacks one")
    buffer = io.BytesIO()
    figure.set_dpi(DPI)
    figure.savefig(buffer, format="png", metadata={"Software": None})
    _check_titles_fit(figure)
    png = buffer.getvalue()
    return png, {
        "title": title,
        "alt": alt or title,
        "png_sha256": hashlib.sha256(png).hexdigest(),
        "texts": [text.get_text() for text in figure.texts],
        "axes": [_plotted(ax) for ax in figure.axes],
    }


def compare(plotted: Mapping[str, Any], committed: Mapping[str, Any] | None, name: str, rtol: float = 1e-3) -> None:
    """Fail unless two sidecars hold the same numbers; pixels may differ with the font engine, numbers may not.

    Raises
    ------
    AssertionError
        Naming the figure and the place.
    """
    if committed is None:
        raise AssertionError(f"figure {name} is not committed")
    for part in ("title", "alt", "texts", "axes"):
        _same(plotted[part], committed[part], f"{name} {part}", rtol)


class Live(ipywidgets.VBox):
    """Sliders over a picture that is drawn again, in place, whenever one moves."""

    def __init__(self, draw: Callable[..., None], controls: Mapping[str, Any]) -> None:
        self.draw, self.picture = draw, b""
        # Fixed margins: working out the layout anew would take a third of the time between two pictures.
        self.figure = Figure(figsize=SIZE, layout="none")
        self.figure.subplots_adjust(left=0.12, right=0.98, top=0.91, bottom=0.13)
        FigureCanvasAgg(self.figure)
        self.controls = dict(controls)
        self._redraw()
        self.image = ipywidgets.Image(value=self._png(), format="png", width=WIDTH)
        for control in self.controls.values():
            control.observe(self._moved, names="value")
        super().__init__([*self.controls.values(), self.image])

    def _redraw(self) -> None:
        self.figure.clear()
        self.draw(self.figure, **{name: control.value for name, control in self.controls.items()})

    def _png(self) -> bytes:
        # Fewer dots, drawn once, hardly compressed: what a reader drags must follow the hand.
        self.figure.set_dpi(_LIVE_DPI)
        self.figure.canvas.draw()
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self.figure.canvas.buffer_rgba())[..., :3]).save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    def _moved(self, _change: Any) -> None:
        self._redraw()
        self.image.value = self._png()

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        bundle = super()._repr_mimebundle_(**options)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["image/png"] = base64.b64encode(self.picture).decode()
        data["text/plain"] = "Run this cell in JupyterLab to move the sliders."
        return data, {"image/png": {"width": WIDTH}}


# -- the numbers of a figure -----------------------------------------------------------------------------------------


def _check_titles_fit(figure: Figure) -> None:
    for ax in figure.axes:
        for title in (ax.title, ax._left_title):
            if title.get_text() and title.get_window_extent().x1 > figure.bbox.x1:
                raise ValueError(f"the title {title.get_text()!r} is wider than its picture: shorten it")


def _plotted(ax: Axes) -> dict[str, Any]:
    """What a reader sees in one set of axes: labels, scales, limits, and every mark with its place and colour."""
    drawn: dict[str, Any] = {"title": ax.get_title("left") or ax.get_title()}
    for name, axis, limits in (("x", ax.xaxis, ax.get_xlim()), ("y", ax.yaxis, ax.get_ylim())):
        drawn[name] = {"label": axis.get_label_text(), "scale": axis.get_scale(), "limits": _digits(limits)}
        drawn[name]["ticks"] = [label.get_text() for label in axis.get_ticklabels()]
    lines = [
        {"label": line.get_label(), "color": to_hex(line.get_color()), "xy": _digits(line.get_xydata())}
        for line in ax.lines
    ]
    patches = [
        {
            "label": str(patch.get_label()),
            "color": to_hex(patch.get_facecolor()),
            "xy": _digits(patch.get_path().vertices),
        }
        | {"place": _digits(patch.get_patch_transform().get_matrix())}
        for patch in ax.patches
    ]
    areas = [
        {"color": [to_hex(color) for color in area.get_facecolor()], "values": _digits(area.get_array())}
        | {"xy": _digits(np.concatenate([area.get_offsets(), *(path.vertices for path in area.get_paths())]))}
        for area in ax.collections
    ]
    images = [
        {"values": _digits(_coarse(i.get_array())), "extent": _digits(i.get_extent()), "colors": _digits(i.get_clim())}
        for i in ax.images
    ]
    texts = [{"text": text.get_text(), "at": _digits(text.get_position())} for text in ax.texts if text.get_text()]
    legend = [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []
    parts = {"lines": lines, "patches": patches, "areas": areas, "images": images, "texts": texts, "legend": legend}
    return drawn | {name: part for name, part in parts.items() if part}


def _coarse(image: np.ndarray) -> np.ndarray:
    """An image as it is, or, beyond 32 rows or columns, the means of at most 32 by 32 patches: enough to tell it by."""
    image = np.asarray(image, float)
    for axis in (0, 1):
        if image.shape[axis] > 32:
            edges = np.linspace(0, image.shape[axis], 33).astype(int)
            sums = np.add.reduceat(image, edges[:-1], axis=axis)
            image = sums / np.diff(edges).reshape([-1 if i == axis else 1 for i in range(image.ndim)])
    return image


def _digits(values: Any) -> Any:
    if values is None:
        return None
    array = np.asarray(np.ma.filled(values, np.nan) if np.ma.isMaskedArray(values) else values, float)
    rounded = np.vectorize(lambda v: float(f"{v:.5g}") if np.isfinite(v) else None, otypes=[object])
    return rounded(array).tolist()  # a gap in a line is null: JSON has no NaN


def _same(new: Any, old: Any, where: str, rtol: float) -> None:
    if isinstance(new, dict) and isinstance(old, dict) and new.keys() == old.keys():
        for key in new:
            _same(new[key], old[key], f"{where} {key}", rtol)
    elif isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        a, b = _numbers(new), _numbers(old)
        if a is not None and b is not None and a.shape == b.shape:
            # Near zero the size of the other numbers of a column counts, not that of other columns.
            scale = np.nan_to_num(np.abs(b)).max(axis=0) if b.ndim else 0
            if not np.all(np.isclose(a, b, rtol=rtol, atol=rtol * 1e-3 * scale, equal_nan=True)):
                worst = np.nanmax(np.abs(a - b))
                raise AssertionError(
                    f"figure {where}: drawn numbers differ from the committed ones by up to {worst:.3g}"
                )
            return
        for index, (one, other) in enumerate(zip(new, old, strict=True)):
            _same(one, other, f"{where}[{index}]", rtol)
    elif isinstance(new, float | int) and isinstance(old, float | int):
        _same([new], [old], where, rtol)
    elif new != old:
        raise AssertionError(f"figure {where}: {new!r} differs from the committed {old!r}")


def _numbers(values: list[Any]) -> np.ndarray | None:
    """A (nested) list of numbers and gaps as an array; None if it holds words or is ragged."""
    try:
        array = np.array(values, object)
    except ValueError:
        return None
    flat = array.ravel()
    if not flat.size or not all(value is None or isinstance(value, float | int) for value in flat):
        return None
    return array.astype(float)
