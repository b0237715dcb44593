"""Traffic of tilings against walks through the loops that count bytes, and the choice against all tilings there are."""

import functools
import itertools
import math
import random
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from qtools import zoo
from qtools.npu import roofline, tiling
from qtools.npu.roofline import PRECISIONS, Precision
from qtools.npu.tiling import Conv, matmul
from qtools.ptq import graph
from qtools.zoo import shapes

# Loops from the outermost to the innermost: over 0 tiles of pixels, 1 of output channels, 2 of input channels.
NESTS = {"weight": (1, 2, 0), "input": (0, 2, 1), "output": (0, 1, 2)}


def touched(conv: Conv, axis: int, outputs: range) -> set[int]:
    """Rows (or columns) of the image that these rows of the output look at."""
    starts = (out * conv.stride[axis] - conv.pads[axis] for out in outputs)
    return {at for start in starts for at in range(start, start + conv.kernel[axis]) if 0 <= at < conv.image[axis]}


def pieces(size: int, step: int) -> list[range]:
    return [range(start, min(start + step, size)) for start in range(0, size, step)]


def walk(conv: Conv, tile: tuple[int, ...], order: str) -> tuple[list[float], float]:
    """Bytes of weights, inputs, outputs and partial sums, and of VTCM: done step by step, with one tile kept of each.

    The VTCM holds, of each tensor, the tile in use and the one that is fetched meanwhile, if there are several.
    """
    group_in, group_out, bits = conv.depth // conv.groups, conv.channels // conv.groups, conv.precision
    pixels = list(itertools.product(*(pieces(conv.size[axis], tile[axis]) for axis in (0, 1))))
    loops = [pixels, pieces(group_out, tile[2]), pieces(group_in, tile[3])]
    width = 32 if len(loops[2]) > 1 else bits.act_bits
    moved, largest, done = [0.0] * 4, [0.0] * 3, {}
    every: list[set] = [set(), set(), set()]
    held: list = [None, None, None]

    def write(key: tuple) -> None:
        results = len(key[1][0]) * len(key[1][1]) * len(key[2])
        finished = done[key] == len(loops[2])
        moved[2 if finished else 3] += results * (bits.act_bits if finished else 32) / 8

    for group in range(conv.groups):
        for step in itertools.product(*(loops[loop] for loop in NESTS[order])):
            at = dict(zip(NESTS[order], step))
            keys = (group, at[1], at[2]), (group, at[0], at[2]), (group, at[0], at[1])
            rows, columns = (touched(conv, axis, at[0][axis]) for axis in (0, 1))
            sizes = (
                len(at[1]) * len(at[2]) * math.prod(conv.kernel) * bits.weight_bits / 8,
                len(rows) * len(columns) * len(at[2]) * bits.act_bits / 8,
                len(at[0][0]) * len(at[0][1]) * len(at[1]) * width / 8,
            )
            for tensor, (key, size) in enumerate(zip(keys, sizes)):
                every[tensor].add(key)
                largest[tensor] = max(largest[tensor], size)
                if held[tensor] == key:
                    continue
                if tensor < 2:
                    moved[tensor] += size
                else:
                    if held[2]:
                        write(held[2])
                    moved[3] += size if key in done else 0  # it left unfinished and comes back
                held[tensor] = key
            done[keys[2]] = done.get(keys[2], 0) + 1
    write(held[2])
    assert set(done.values()) == {len(loops[2])}
    return moved, sum(most * (2 if len(tiles) > 1 else 1) for most, tiles in zip(largest, every))


ALL_NESTS = np.array(list(itertools.permutations(range(4))))


@numba.njit(cache=True)
def fastest_walk(nests, counts, weights, inputs, outputs, sums):
    """Least bits that four loops move (0 rows, 1 columns, 2 output and 3 input channels, nested in any order).

    Sizes of the tiles are those of `weights` [2, 3], `inputs` [0, 1, 3] and `outputs`, `sums` [0, 1, 2].
    """
    least = np.inf
    for nest in nests:
        i, before = np.zeros(4, np.int64), np.full(4, -1, np.int64)
        moved, done = outputs.sum(), np.zeros(outputs.shape, np.int64)
        for step in range(counts.prod()):
            rest = step
            for loop in nest[::-1]:  # from the innermost
                i[loop], rest = rest % counts[loop], rest // counts[loop]
            if i[2] != before[2] or i[3] != before[3]:
                moved += weights[i[2], i[3]]
            if i[0] != before[0] or i[1] != before[1] or i[3] != before[3]:
                moved += inputs[i[0], i[1], i[3]]
            if i[0] != before[0] or i[1] != before[1] or i[2] != before[2]:
                if before[0] >= 0 and done[before[0], before[1], before[2]] < counts[3]:
                    moved += sums[before[0], before[1], before[2]]
                if done[i[0], i[1], i[2]]:
                    moved += sums[i[0], i[1], i[2]]
            done[i[0], i[1], i[2]] += 1
            before[:] = i
        least = min(least, moved)
    return least


def walked_everywhere(conv: Conv, vtcm: float) -> float:
    """Least bytes of all integer tile sizes that fit and all nests of four loops; infinite if none fits."""
    bits, least = conv.precision, math.inf
    group = (conv.channels // conv.groups, conv.depth // conv.groups)
    outs, ins = (
        [[[size(axis, piece) for piece in pieces(full, step)] for step in range(1, full + 1)] for axis, full in axes]
        for size, axes in (
            (lambda axis, piece: len(piece), list(enumerate((*conv.size, *group)))),
            (lambda axis, piece: len(touched(conv, axis, piece)), list(enumerate(conv.size))),
        )
    )
    for rows, columns, channels, depth in itertools.product(*(range(len(steps)) for steps in outs)):
        across = np.multiply.outer(outs[0][rows], outs[1][columns])
        weights = np.multiply.outer(outs[2][channels], outs[3][depth]) * math.prod(conv.kernel) * bits.weight_bits
        inputs = np.multiply.outer(np.multiply.outer(ins[0][rows], ins[1][columns]), outs[3][depth]) * bits.act_bits
        results = np.multiply.outer(across, outs[2][channels])
        counts = np.array([*results.shape, weights.shape[1]])
        sizes = (weights, inputs, results * (32 if counts[3] > 1 else bits.act_bits))
        if sum(int(one.max()) * (2 if one.size * conv.groups > 1 else 1) for one in sizes) <= 8 * vtcm:
            one = fastest_walk(ALL_NESTS, counts, weights, inputs, results * bits.act_bits, results * 32)
            least = min(least, conv.groups * one / 8)
    return least


@st.composite
def convs(draw, largest: int = 9, channels: int = 6) -> Conv:
    """Convolutions and, with a kernel and an image of one column, matrix products."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    image = draw(st.tuples(st.integers(kernel[0], largest), st.integers(kernel[1], largest)))
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    return Conv(
        image,
        groups * draw(st.integers(1, channels)),
        groups * draw(st.integers(1, channels)),
        kernel,
        draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        draw(st.tuples(*(st.integers(0, kernel[axis % 2] - 1) for axis in range(4)))),
        groups,
        draw(st.sampled_from(list(PRECISIONS.values()))),
    )


def random_conv(rng: random.Random, most: int = 8) -> Conv:
    """A small layer: everything about it can be tried."""
    kernel, groups = rng.choice(((1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (1, 3), (2, 2))), rng.choice((1, 1, 1, 2))
    pads = tuple(rng.randint(0, kernel[axis % 2] // 2) for axis in range(4))
    image = tuple(max(size, rng.randint(1, most + 1)) for size in kernel)
    stride = (rng.choice((1, 1, 2)),) * 2
    depth, channels = groups * rng.randint(1, most), groups * rng.randint(1, most)
    return Conv(image, depth, channels, kernel, stride, pads, groups, rng.choice(list(PRECISIONS.values())))


# -- traffic -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(convs(), st.sampled_from(list(NESTS)), st.data())
def test_traffic_and_room_are_those_of_a_walk_through_the_loops(conv, order, data):
    tile = tuple(data.draw(st.integers(1, size)) for size in conv.whole)
    found = tiling.tiling(conv, tile, order)
    moved, room = walk(conv, tile, order)
    assert list(found.moved) == pytest.approx(moved, abs=1e-9)
    assert found.vtcm == pytest.approx(room, abs=1e-9)
    assert found.counts == tuple(math.ceil(size / step) for size, step in zip(conv.whole, tile))


@settings(max_examples=60, deadline=None)
@given(convs())
def test_no_walk_moves_less_than_every_byte_once(conv):
    rows, columns = (touched(conv, axis, range(conv.size[axis])) for axis in (0, 1))
    bits, bound = conv.precision, tiling.lower_bound(conv)
    inputs = len(rows) * len(columns) * conv.depth * bits.act_bits / 8
    outputs = math.prod(conv.size) * conv.channels * bits.act_bits / 8
    weights = conv.channels * conv.depth // conv.groups * math.prod(conv.kernel) * bits.weight_bits / 8
    assert bound == (weights, inputs, outputs, 0)
    tile = [math.ceil(size / 2) for size in conv.whole]
    for order in NESTS:
        assert all(one >= least for one, least in zip(tiling.tiling(conv, tile, order).moved, bound))


def test_times_say_how_often_each_byte_crosses():
    conv = matmul(64, 64, 64)
    in_quarters = {order: tiling.tiling(conv, (16, 1, 16, 16), order).times for order in NESTS}
    assert in_quarters == {"weight": (1, 4, 1, 3), "input": (4, 1, 1, 3), "output": (4, 4, 1, 0)}
    halo = tiling.tiling(Conv((10, 10), 1, 1, (3, 3)), (2, 8, 1, 1), "weight").times
    assert halo == (1, 1.6, 1, 0)  # 4 x 4 rows of 10
    padding_only = tiling.best(Conv((1, 1), 1, 1, stride=(2, 2), pads=(1, 1, 1, 1)))
    assert padding_only.times == (1, 0, 1, 0)


# -- the choice --------------------------------------------------------------------------------------------------------


def test_the_choice_is_within_ten_percent_of_everything_on_fifty_random_layers():
    rng, ratios, cut = random.Random(20), [], 0
    while len(ratios) < 50:
        conv = random_conv(rng)
        smallest = tiling.tiling(conv, (1, 1, 1, 1), "output").vtcm
        largest = tiling.tiling(conv, conv.whole, "output").vtcm
        vtcm = smallest * (largest / smallest) ** rng.random()
        least = walked_everywhere(conv, vtcm)
        if math.isinf(least):
            with pytest.raises(ValueError, match="no tile"):
                tiling.best(conv, vtcm)
            continue
        found = tiling.best(conv, vtcm)
        assert found.vtcm <= vtcm
        ratios.append(found.moved.total / least)
        cut += found.moved.total > tiling.lower_bound(conv).total
    assert cut > 20  # layers that no tiling moves once only
    assert min(ratios) >= 1 and max(ratios) <= 1.1
    assert sum(ratio == 1 for ratio in ratios) >= 48


LAYERS = {
    "3 x 3": Conv((56, 56), 64, 128, (3, 3), pads=(1, 1, 1, 1)),
    "stride 2": Conv((112, 112), 64, 128, (3, 3), (2, 2), (1, 1, 1, 1), precision=PRECISIONS["w8a16"]),
    "shortcut": Conv((56, 56), 256, 512, stride=(2, 2)),
    "depthwise": Conv((112, 112), 96, 96, (3, 3), pads=(1, 1, 1, 1), groups=96),
    "prompt": matmul(128, 4096, 4096, precision=PRECISIONS["w4a16"]),
    "token": matmul(1, 4096, 11008, precision=PRECISIONS["w4a16"]),
    "square": matmul(1024, 1024, 1024),
}


@functools.cache
def chosen(name: str, vtcm: int, order: str | None = None) -> tiling.Tiling:
    return tiling.best(LAYERS[name], vtcm, order)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(LAYERS)), st.sampled_from((2**17, 2**19, 2**21)), st.sampled_from(list(NESTS)), st.data())
def test_nothing_that_fits_beats_the_choice_on_real_layers(name, vtcm, order, data):
    conv = LAYERS[name]
    tile = [max(1, int(size / 2 ** data.draw(st.floats(0, math.log2(size))))) for size in conv.whole]
    other = tiling.tiling(conv, tile, order)
    if other.vtcm <= vtcm:
        assert chosen(name, vtcm, order).moved.total <= other.moved.total * 1.001  # halo in the padding
        assert chosen(name, vtcm).moved.total <= chosen(name, vtcm, order).moved.total


@pytest.mark.parametrize("name", LAYERS)
def test_more_room_never_moves_more_until_every_byte_moves_once(name):
    conv = LAYERS[name]
    bound, whole = tiling.lower_bound(conv), tiling.tiling(conv, conv.whole, "output")
    rooms = [2**power for power in range(14, 23, 2)] + [whole.vtcm]
    totals = [tiling.best(conv, room).moved.total for room in rooms]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == bound.total
    assert totals[0] > bound.total or name == "token"  # whose inputs fit beside a few weights
    assert tiling.best(conv, whole.vtcm).vtcm <= whole.vtcm


@pytest.mark.parametrize("vtcm", [2**14, 2**16, 2**18])
def test_matrix_products_stay_above_the_bound_for_every_schedule(vtcm):
    """T. M. Smith et al., A Tight I/O Lower Bound for Matrix Multiplication, arXiv 1702.02017: 2mnk / sqrt(S) - 2S."""
    side = 1024
    found = tiling.best(matmul(side, side, side), vtcm).moved.total
    bound = 2 * side**3 / math.sqrt(vtcm)
    # Double buffers of 32-bit sums leave an eighth of the room for results, so sides a root of eight smaller.
    assert bound - 2 * vtcm < found < 1.1 * math.sqrt(8) * bound


def test_of_equal_tilings_the_one_that_cuts_least_is_taken():
    rng, tied = random.Random(3), 0
    for _ in range(20):
        conv = replace(random_conv(rng, 5), groups=1)
        least, whole = (tiling.tiling(conv, tile, "output").vtcm for tile in ((1, 1, 1, 1), conv.whole))
        vtcm = max(least, whole / rng.choice((1.5, 2, 3)))
        tiles = list(itertools.product(*(range(1, size + 1) for size in conv.whole)))
        for order in NESTS:
            found = tiling.best(conv, vtcm, order)
            others = [tiling.tiling(conv, tile, order) for tile in tiles]
            equal = [other.counts for other in others if other.vtcm <= vtcm and other.moved.total == found.moved.total]
            cuts = {(counts.depth, math.prod(counts)) for counts in equal}  # the depth first: sums are never moved
            assert min(cuts) == (found.counts.depth, math.prod(found.counts))
            tied += len(cuts) > 1
    assert tied > 10
    assert tiling.best(Conv((400, 400), 64, 64)).tile.columns == 400  # strips of whole rows


# -- pictures ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(convs(largest=8, channels=3), st.sampled_from(list(NESTS)), st.data())
def test_rectangles_of_inputs_hold_what_torch_finds_to_matter(conv, order, data):
    tile = [data.draw(st.integers(1, size)) for size in conv.whole]
    found = tiling.tiling(conv, tile, order)
    outs, ins = tiling.rectangles(found, "outputs"), tiling.rectangles(found, "inputs")
    covered = np.zeros(conv.size, int)
    for out, box in zip(outs, ins, strict=True):
        covered[_slices(out)] += 1
        image = torch.zeros(1, 1, *conv.image, requires_grad=True)
        padded = torch.nn.functional.pad(image, [conv.pads[i] for i in (1, 3, 0, 2)])
        result = torch.nn.functional.conv2d(padded, torch.ones(1, 1, *conv.kernel), stride=conv.stride)
        result[0, 0][_slices(out)].sum().backward()
        rows, columns = image.grad[0, 0].nonzero(as_tuple=True)
        top, left = int(rows.min()), int(columns.min())
        assert box == (top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1)
    assert (covered == 1).all()


def _slices(rectangle: tuple[int, int, int, int]) -> tuple[slice, slice]:
    top, left, height, width = rectangle
    return slice(top, top + height), slice(left, left + width)


@pytest.mark.parametrize("order", NESTS)
def test_rectangles_of_weights_come_in_the_order_of_the_loops(order):
    found = tiling.tiling(matmul(8, 6, 10), (2, 1, 4, 3), order)
    across = [(0, 0, 4, 3), (4, 0, 4, 3), (8, 0, 2, 3), (0, 3, 4, 3), (4, 3, 4, 3), (8, 3, 2, 3)]
    assert tiling.rectangles(found, "weights") == (across if order == "input" else sorted(across))


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (shapes.mobilenet_v2, (1, 3, 224, 224)),
        (zoo.text_recognizer, (1, 3, 48, 320)),
    ],
)
def test_networks_have_the_layers_that_the_time_model_counts(build, shape):
    network = graph.prepare(build(), {"x": shape})
    ours = list(tiling.from_onnx(network).values())
    theirs = [layer for layer in roofline.from_onnx(network).layers if layer.macs]
    assert [conv.groups > 1 and conv.whole.depth == 1 for conv in ours] == [one.kind == "depthwise" for one in theirs]
    for conv, layer in zip(ours, theirs, strict=True):
        results = math.prod(conv.size) * conv.channels
        assert results * conv.whole.depth * math.prod(conv.kernel) == layer.macs
        assert results == layer.outputs
        assert math.prod(conv.image) * conv.depth + (0 if layer.weights else 1) <= layer.inputs


def test_products_of_two_activations_read_both_at_the_width_of_activations():
    text = """<ir_version: 10, opset_import: ["": 21]>
        g (float[1,2,5,8] q, float[1,2,8,7] k, float[3,4] m, float[5,8] p)
        => (float[1,2,5,7] y, float[5,3] z, float[5,2,6] v, float[1,2,5,7] o) {
        y = MatMul (q, k)
        w = Constant <value = float[4,5] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20}> ()
        z = Gemm <transA = 1, transB = 1> (w, m)
        s = Constant <value = int64[2] {7, 6}> ()  c = ConstantOfShape (s)
        n = Constant <value = int64[3] {5, 2, 7}> ()  u = Reshape (y, n)
        v = MatMul (u, c)
        o = MatMul (p, k)
    }"""
    bits = PRECISIONS["w4a16"]
    assert tiling.from_onnx(parser.parse_model(text), bits) == {
        "y": matmul(5, 8, 7, 2, Precision(16, 16)),
        "z": matmul(5, 4, 3, 1, Precision(16, 16)),
        "v": matmul(10, 7, 6, 1, bits),
        "o": matmul(5, 8, 7, 2, Precision(16, 16)),
    }


@pytest.mark.parametrize(
    ("shape", "more", "words"),
    [
        ("2, 1, 8, 8", "", "of one image"),
        ("1, 1, 8, 8", "dilations = [2, 2]", "not dilated"),
        ("1, 1, 8, 8", 'auto_pad = "SAME_UPPER"', "its pads given"),
        ("N, 1, 8, 8", "", "sizes of what makes 'y' are not known"),
    ],
)
def test_networks_that_cannot_be_counted_are_refused(shape, more, words):
    body = "s = Constant <value = int64[4] {1, 1, 3, 3}> () w = ConstantOfShape (s)"
    attributes = f"<{more}>" if more else ""
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[{shape}] x) => (float[a, b, c, d] y)'
    model = parser.parse_model(f"{text} {{ {body} y = Conv {attributes} (x, w) }}")
    with pytest.raises(ValueError, match=words):
        tiling.from_onnx(model)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": (0, 8)}, "whole numbers"),
        ({"image": (8, 8.0)}, "whole numbers"),
        ({"image": (8,)}, "whole numbers"),
        ({"pads": (0, 0, -1, 0)}, "whole numbers"),
        ({"pads": (0, 0)}, "whole numbers"),
        ({"groups": 3}, "groups must divide"),
        ({"kernel": (9, 1)}, "must fit into the image"),
    ],
)
def test_impossible_layers_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(Conv((8, 8), 4, 4), **change)


def test_impossible_tilings_are_refused():
    conv = matmul(8, 8, 8)
    for tile, order in (((8, 1, 8), "output"), ((9, 1, 8, 8), "output"), ((8, 1, 0, 8), "input"), (conv.whole, "row")):
        with pytest.raises(ValueError, match="needs a tile from 1"):
            tiling.tiling(conv, tile, order)
    for room in (0, math.nan, 3):
        with pytest.raises(ValueError, match="no tile of this layer fits"):
            tiling.best(conv, room)
    with pytest.raises(ValueError, match="one of weight, input, output"):
        tiling.best(conv, order="row")
    with pytest.raises(ValueError, match="the tensor is one of"):
        tiling.rectangles(tiling.best(conv), "sums")
