"""Tiles of a convolution or matrix product that fit into the VTCM, and the bytes that each order of loops moves.

The matrix unit reads only the VTCM (8 MB on most chips: ``data/soc.yaml``).  Here one layer runs alone: its tensors
start and end in DRAM, each has room for the tile in use and the next one (double buffering), and a tile is fetched
again unless it is the one in use.  Weights, inputs and outputs lack one loop each (pixels, output channels, input
channels); with that loop innermost their tiles stay, which names the three orders.  Biases and scales do not count.
It is a model: Qualcomm's compiler chooses its tiles itself, documents no key for their sizes, and keeps tensors in the
VTCM from one layer to the next; its levers are ``vtcm_mb`` and the like (QNN's HTP backend, 80-63442-10).

Sources: V. Sze et al., Efficient Processing of Deep Neural Networks, Proc. IEEE 105(12), 2017, section V (stationary
orders); A. Parashar et al., Timeloop, ISPASS 2019 (a tensor is fetched anew by the loops outside its innermost one).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from qtools.npu.roofline import PRECISIONS, Precision

if TYPE_CHECKING:
    import onnx

Order = Literal["weight", "input", "output"]
Tensor = Literal["weights", "inputs", "outputs"]
VTCM, SUM_BITS = 8 * 2**20, 32
_W8A8 = PRECISIONS["w8a8"]
# From the outermost loop to the innermost: p over tiles of pixels, c of output channels, d of input channels (depth).
_NESTS: dict[Order, str] = {"weight": "cdp", "input": "pdc", "output": "pcd"}
_LACKS: dict[Tensor, str] = {"weights": "p", "inputs": "c", "outputs": "d"}


class Tile(NamedTuple):
    """Rows and columns of the output, output channels and input channels; at the far edges less."""

    rows: int
    columns: int
    channels: int
    depth: int


class Traffic(NamedTuple):
    """Bytes to and from DRAM; inputs with the halo that neighbouring tiles fetch twice, `sums` written and read."""

    weights: float
    inputs: float
    outputs: float
    sums: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True)
class Conv:
    """A convolution of one image; ValueError if a size is no whole number, or the sizes do not fit together.

    `image` is rows and columns of the input, `depth` and `channels` are its channels and the output's, of all groups,
    which run one after the other and share nothing; `pads` are top, left, bottom, right, zeros that are not fetched.
    """

    image: tuple[int, int]
    depth: int
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    precision: Precision = _W8A8

    def __post_init__(self) -> None:
        sizes = (*self.image, *self.kernel, *self.stride, self.depth, self.channels, self.groups)
        whole = all(isinstance(one, int | np.integer) for one in (*sizes, *self.pads))
        if not whole or len(sizes) != 9 or len(self.pads) != 4 or min(sizes) < 1 or min(self.pads) < 0:
            raise ValueError(f"sizes must be whole numbers, pads from 0 and all others from 1: {self}")
        if self.depth % self.groups or self.channels % self.groups or min(self.size) < 1:
            raise ValueError(f"groups must divide both channels, and the kernel must fit into the image: {self}")

    @property
    def size(self) -> tuple[int, ...]:
        """Rows and columns of the output."""
        axes = zip(self.image, self.pads, self.pads[2:], self.kernel, self.stride)
        return tuple((size + before + after - taps) // step + 1 for size, before, after, taps, step in axes)

    @property
    def whole(self) -> Tile:
        """The tile that is all of one group."""
        return Tile(*self.size, self.channels // self.groups, self.depth // self.groups)


def matmul(rows: int, depth: int, channels: int, groups: int = 1, precision: Precision = _W8A8) -> Conv:
    """(rows, depth) x (depth, channels), `groups` times with other matrices, as a convolution of one column."""
    return Conv((rows, 1), depth * groups, channels * groups, groups=groups, precision=precision)


def from_onnx(model: onnx.ModelProto, precision: Precision = _W8A8) -> dict[str, Conv]:
    """Convolutions and products, by their outputs; ValueError for unknown shapes, batches, dilations or auto_pad."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    told, found = (*graph.input, *graph.value_info, *graph.output), {}
    shapes = {entry.name: tuple(dim.dim_value for dim in entry.type.tensor_type.shape.dim) for entry in told}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if constants.issuperset(node.input):
            constants.update(node.output)
        elif node.op_type in ("Conv", "Gemm", "MatMul"):
            sides = [shapes.get(name, (0,)) for name in node.input[:2]]
            if 0 in sides[0] + sides[1]:
                raise ValueError(f"the sizes of what makes {node.output[0]!r} are not known")
            bits = precision if node.input[1] in constants else precision._replace(weight_bits=precision.act_bits)
            given = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
            found[node.output[0]] = _from_node(node.op_type, *sides, given, bits)
    return found


def _from_node(op: str, left: tuple, right: tuple, given: Mapping[str, Any], bits: Precision) -> Conv:
    if op != "Conv":
        left = (1, *left[:: -1 if given.get("transA") else 1])
        heads = math.prod(right[:-2])  # each has a matrix of its own on the right
        rows, depth = max(math.prod(left[:-1]) // heads, left[-2]), left[-1]
        return matmul(rows, depth, math.prod(right[-2:]) // depth, heads, bits)
    simple = {*given.get("dilations", ())} <= {1} and given.get("auto_pad", b"NOTSET") == b"NOTSET"
    if not simple or len(left) != 4 or left[0] != 1:
        raise ValueError(f"a convolution must be of one image, not dilated, its pads given: {left}, {given}")
    strides, pads = tuple(given.get("strides", (1, 1))), tuple(given.get("pads", (0, 0, 0, 0)))
    return Conv(left[2:], left[1], right[0], right[2:], strides, pads, given.get("group", 1), bits)


@dataclass(frozen=True)
class Tiling:
    """A tile, an order of the loops over it, the bytes they move, and the bytes of VTCM that they need."""

    conv: Conv
    order: Order
    tile: Tile
    moved: Traffic
    vtcm: float

    @property
    def counts(self) -> Tile:
        """Into how many tiles each axis of a group is cut."""
        return Tile(*(math.ceil(size / step) for size, step in zip(self.conv.whole, self.tile)))

    @property
    def times(self) -> Traffic:
        """How often each byte crosses, on average; of `sums`, how often a result leaves and comes back unfinished."""
        once = lower_bound(self.conv)
        back = once.outputs * 2 * SUM_BITS / self.conv.precision.act_bits
        return Traffic(*(part / (whole or 1) for part, whole in zip(self.moved, (*once[:3], back))))


def lower_bound(conv: Conv) -> Traffic:
    """Every byte once: no tiling moves less.  Inputs that no window touches are not counted."""
    return tiling(conv, conv.whole, "output").moved


def tiling(conv: Conv, tile: tuple[int, int, int, int], order: Order) -> Tiling:
    """What a tile and an order of loops cost, fit or not; ValueError if they are not a tile and an order."""
    if len(tile) != 4 or not all(1 <= step <= size for step, size in zip(tile, conv.whole)) or order not in _NESTS:
        raise ValueError(f"needs a tile from 1 to {tuple(conv.whole)} and one of {', '.join(_NESTS)}: {tile}, {order}")
    _, room, *moved = (float(number) / 8 for number in _cost(conv, _pixels(conv, *tile[:2]), *tile[2:], order))
    return Tiling(conv, order, Tile(*tile), Traffic(*moved), room)


def best(conv: Conv, vtcm: float = VTCM, order: Order | None = None) -> Tiling:
    """The tiling with the least traffic, of one order or of all.

    Of all sizes that cut an axis into as many tiles only the most even one is tried: others need more room, and move
    less by what halo they put into the padding at most.  Among equals of an order, the one that cuts the depth least is
    taken, then the one with the fewest tiles.  Raises ValueError if no tile fits into `vtcm` bytes.
    """
    even = ({math.ceil(size / count) for count in range(1, size + 1)} for size in conv.whole)
    rows, columns, channels, depths = (sorted(steps, reverse=True) for steps in even)
    pairs = [(row, column) for column in columns for row in rows]  # strips of whole rows before others
    pixels = np.array([_pixels(conv, *pair) for pair in pairs]).T[:, :, None]
    wide, bound = np.array(channels), 8 * tiling(conv, conv.whole, order or "output").moved.total
    found: tuple[float, Tile, Order] = np.inf, conv.whole, "output"
    for depth in depths:  # the whole depth first, which needs no partial sums
        for name in [order] if order else _NESTS:
            tiles, room, *moved = _cost(conv, pixels, wide, depth, name)
            total = np.where(room <= 8 * vtcm, sum(moved), np.inf)
            least = float(total.min())
            few = np.where(total == least, tiles, np.inf)
            at = np.unravel_index(few.argmin(), few.shape)
            if least < found[0]:
                found = least, Tile(*pairs[at[0]], channels[at[1]], depth), name
        if found[0] <= bound:
            break
    if found[0] == np.inf:
        raise ValueError(f"no tile of this layer fits into {vtcm} bytes of VTCM")
    return tiling(conv, *found[1:])


def _windows(conv: Conv, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """First input row (or column) that the window of each output row reads, and the one after the last."""
    start = np.arange(conv.size[axis]) * conv.stride[axis] - conv.pads[axis]
    return np.clip(start, 0, conv.image[axis]), np.clip(start + conv.kernel[axis], 0, conv.image[axis])


def _touched(conv: Conv, axis: int, step: int) -> np.ndarray:
    """Input rows (or columns) that the windows of each tile read."""
    low, high = _windows(conv, axis)
    new = np.maximum(high - np.maximum(low, np.append(0, high[:-1])), 0)
    new[::step] = (high - low)[::step]  # nothing is left from the tile before: this is the halo
    return np.add.reduceat(new, np.arange(0, len(new), step))


def _pixels(conv: Conv, row: int, column: int) -> tuple[int, int, int, int]:
    """Of tiles of pixels: their number, the output pixels and the most input pixels of one, the input pixels of all."""
    down, across = _touched(conv, 0, row), _touched(conv, 1, column)
    return len(down) * len(across), row * column, int(down.max() * across.max()), int(down.sum() * across.sum())


def _cost(conv: Conv, pixels: Any, channels: np.ndarray | int, depth: int, order: Order) -> list[Any]:
    """Tiles to compute, bits of VTCM, and those of weights, inputs, outputs and partial sums that move."""
    whole, bits, nest, taps = conv.whole, conv.precision, _NESTS[order], math.prod(conv.kernel)
    counts = {"p": pixels[0], "c": -(whole.channels // -channels), "d": -(whole.depth // -depth)}
    tiles: dict[Tensor, Any] = {
        "weights": channels * depth * taps * bits.weight_bits,
        "inputs": pixels[2] * depth * bits.act_bits,
        "outputs": pixels[1] * channels * (SUM_BITS if counts["d"] > 1 else bits.act_bits),
    }
    room, visits = 0, []
    for name, loop in _LACKS.items():
        several = conv.groups * math.prod(counts[other] for other in nest if other != loop) > 1
        room = room + tiles[name] * np.where(several, 2, 1)
        # A tile is fetched once, unless loops further inside have put others in its place meanwhile.
        inside = math.prod(counts[other] for other in nest[nest.index(loop) + 1 :])
        visits.append(np.where(inside > 1, counts[loop], 1))
    results, weights = math.prod(conv.size) * conv.channels, conv.channels * whole.depth * taps * bits.weight_bits
    moved = [weights * visits[0], pixels[3] * conv.depth * bits.act_bits * visits[1], results * bits.act_bits]
    return [math.prod(counts.values()), room, *moved, 2 * results * SUM_BITS * (visits[2] - 1)]


def rectangles(of: Tiling, tensor: Tensor) -> list[tuple[int, int, int, int]]:
    """The tiles of a tensor in one group, (top, left, height, width) in the order in which the loops come to them.

    Of inputs and outputs pixels, rows downwards (the halo makes those of the inputs overlap); of weights output
    channels downwards and input channels to the right.  Raises ValueError if there is no such tensor.
    """
    conv = of.conv
    if tensor not in _LACKS:
        raise ValueError(f"the tensor is one of {', '.join(_LACKS)}, got {tensor!r}")
    cuts = [[(a, min(a + step, size)) for a in range(0, size, step)] for size, step in zip(conv.whole, of.tile)]
    cells = list(itertools.product(*(cuts[2:] if tensor == "weights" else cuts[:2])))
    if tensor == "weights" and of.order == "input":  # its loop over output channels is the innermost
        cells.sort(key=lambda cell: cell[::-1])
    if tensor == "inputs":
        low, high = zip(_windows(conv, 0), _windows(conv, 1))
        cells = [tuple((low[a][s], high[a][e - 1]) for a, (s, e) in enumerate(cell)) for cell in cells]
    return [(int(y), int(x), int(y_end - y), int(x_end - x)) for (y, y_end), (x, x_end) in cells]
