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
from matplotlib.figure import Figure

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
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    _check_titles_fit(figure)
    png = buffer.getvalue()
    return png, {
        "title": title,
        "alt": alt or title,
        "png_sha256": hashlib.sha256(png).hexdigest(),
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
    _same(plotted["axes"], committed["axes"], name, rtol)
    _same(plotted["title"], committed["title"], f"{name} title", rtol)


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
        # Fewer dots and hardly any compression: what a reader drags must follow the hand.
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=_LIVE_DPI, pil_kwargs={"compress_level": 1})
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
    """Every line, bar, step, area, image and text of one set of axes, to five digits."""
    drawn: dict[str, Any] = {"title": ax.get_title("left"), "x": ax.get_xlabel(), "y": ax.get_ylabel()}
    lines = [{"label": line.get_label(), "xy": _digits(line.get_xydata())} for line in ax.lines]
    bars = [
        [_digits(p.get_x()), _digits(p.get_width()), _digits(p.get_height())]
        for p in ax.patches
        if hasattr(p, "get_height")
    ]
    steps = [_digits(p.get_data().values) for p in ax.patches if hasattr(p, "get_data")]
    areas = [_digits(np.concatenate([c.get_offsets(), *(p.vertices for p in c.get_paths())])) for c in ax.collections]
    images = [_digits(image.get_array()) for image in ax.images]
    texts = [text.get_text() for text in ax.texts if text.get_text()]
    parts = {"lines": lines, "bars": bars, "steps": steps, "areas": areas, "images": images, "texts": texts}
    return drawn | {name: part for name, part in parts.items() if part}


def _digits(values: Any) -> Any:
    array = np.asarray(np.ma.filled(values, np.nan) if np.ma.isMaskedArray(values) else values, float)
    rounded = np.vectorize(lambda v: float(f"{v:.5g}") if np.isfinite(v) else None, otypes=[object])
    return rounded(array).tolist()  # a gap in a line is null: JSON has no NaN


def _same(new: Any, old: Any, where: str, rtol: float) -> None:
    if isinstance(new, dict) and isinstance(old, dict) and new.keys() == old.keys():
        for key in new:
            _same(new[key], old[key], f"{where} {key}", rtol)
    elif isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        numbers = _numbers(new), _numbers(old)
        if numbers[0] is not None and numbers[1] is not None and numbers[0].shape == numbers[1].shape:
            scale = np.nanmax(np.abs(numbers[1]), initial=0.0)
            if not np.allclose(*numbers, rtol=rtol, atol=rtol * 1e-3 * scale, equal_nan=True):
                worst = np.nanmax(np.abs(numbers[0] - numbers[1]))
                raise AssertionError(
                    f"figure {where}: plotted numbers differ from the committed ones by up to {worst:.3g}"
                )
            return
        for index, (a, b) in enumerate(zip(new, old, strict=True)):
            _same(a, b, f"{where}[{index}]", rtol)
    elif isinstance(new, float | int) and isinstance(old, float | int):
        _same([new], [old], where, rtol)
    elif new != old:
        raise AssertionError(f"figure {where}: {new!r} differs from the committed {old!r}")


def _numbers(values: list[Any]) -> np.ndarray | None:
    try:
        array = np.asarray(values, float)
    except (TypeError, ValueError):
        return None
    return array if array.size else None
