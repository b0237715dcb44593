"""Every granularity on the weights of real networks, against torchao; LPBQ and the cost of scales."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtools import zoo
from qtools.affine import (
    Grid,
    QParams,
    bits_per_weight,
    blocks_of,
    choose_lpbq,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)
from qtools.metrics import mse, sqnr_db
from qtools.ptq import graph

GRANULARITIES = {"tensor": (-1, -1), "channel": (1, -1), "group 128": (1, 128), "group 32": (1, 32)}
NETWORKS = {
    "digits": (zoo.digits_cnn, {}),
    "recognizer": (zoo.text_recognizer, {"x": (1, 3, 48, 320)}),
    "classifier": (zoo.direction_classifier, {"x": (1, 3, 48, 192)}),
    "efficientnet": (zoo.efficientnet_lite0, {}),
}


@pytest.fixture(scope="module", params=NETWORKS)
def matrices(request):
    network, shapes = NETWORKS[request.param]
    return {name: weight.rows for name, weight in graph.weights(graph.prepare(network(), shapes)).items()}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("bits", "ours", "theirs"),
    [(4, "half_range", "SYMMETRIC"), (8, "no_clipping", "SYMMETRIC_NO_CLIPPING_ERR"), (4, None, "ASYMMETRIC")],
)
def test_errors_on_real_weights_equal_torchao(matrices, granularity, bits, ours, theirs):
    """Same definition of the scale, same rounding rule: MSE and SQNR within one part in a million."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    blocks = GRANULARITIES[granularity]
    grid = Grid(bits, signed=True, symmetric=ours is not None, block_size=blocks)
    limits = dict(quant_min=grid.qmin, quant_max=grid.qmax)
    for name, w in matrices.items():
        qparams = choose_qparams(w, grid, symmetric_scale=ours or "qmax")
        mine = dequantize(quantize(w, qparams, rule="torchao"), qparams)
        # torchao wants whole blocks: a short last one is filled up with its own last value, then cut off again.
        sizes = tuple(size for _, size in blocks_of(w.shape, blocks))
        filled = torch.from_numpy(np.pad(w, [(0, -n % size) for n, size in zip(w.shape, sizes)], mode="edge"))
        scale, zero_point = primitives.choose_qparams_affine(
            filled, getattr(primitives.MappingType, theirs), sizes, torch.int8, **limits,
            eps=1e-30, scale_dtype=torch.float32, zero_point_dtype=torch.int32,
        )  # fmt: skip
        codes = primitives.quantize_affine(filled, sizes, scale, zero_point, torch.int8, **limits)
        back = primitives.dequantize_affine(codes, sizes, scale, zero_point, torch.int8, **limits)
        back = back.numpy()[: w.shape[0], : w.shape[1]]
        assert math.isclose(mse(w, mine), mse(w, back), rel_tol=1e-6), name
        assert math.isclose(sqnr_db(w, mine), sqnr_db(w, back), rel_tol=1e-6), name


def test_worst_layer_of_the_recognizer_is_what_one_scale_does_to_it():
    network = graph.prepare(zoo.text_recognizer(), {"x": (1, 3, 48, 320)})
    w = graph.weights(network)["p2o.Conv.32"].rows

    def quality(blocks):
        return sqnr_db(w, fake_quantize(w, choose_qparams(w, Grid(8, True, True, True, blocks))))

    assert quality((-1, -1)) == pytest.approx(9.4, abs=0.05)
    assert quality((1, -1)) == pytest.approx(30.5, abs=0.05)
    assert quality((1, 128)) > quality((1, -1)) + 5


@given(rows=st.integers(1, 5), depth=st.integers(1, 300), size=st.integers(1, 140), seed=st.integers(0, 99))
def test_finer_scales_never_reach_further_than_half_their_own_step(rows, depth, size, seed):
    w = np.random.default_rng(seed).standard_normal((rows, depth)).astype(np.float32)
    qparams = choose_qparams(w, Grid(4, True, True, True, (1, size)))
    steps = np.repeat(qparams.scale, size, axis=1)[:, :depth]
    assert qparams.scale.shape == (rows, -(-depth // size))
    assert np.all(np.abs(fake_quantize(w, qparams) - w) <= steps * (0.5 + 1e-5))
    # The largest value of every group is on the grid's last code: the group has a scale of its own.
    codes = np.abs(quantize(w, qparams).astype(int))
    assert all((codes[:, start : start + size].max(axis=1) == 7).all() for start in range(0, depth, size))


def test_a_loud_channel_costs_the_others_nothing_with_a_scale_each():
    w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    loud = w.copy()
    loud[3] *= 100
    for blocks, suffers in (((-1, -1), True), ((1, -1), False), ((1, 16), False)):
        grid = Grid(8, True, True, True, blocks)
        quiet = [i for i in range(8) if i != 3]
        before = mse(w[quiet], fake_quantize(w, choose_qparams(w, grid))[quiet])
        after = mse(loud[quiet], fake_quantize(loud, choose_qparams(loud, grid))[quiet])
        assert (after > 100 * before) if suffers else (after == before)


# -- LPBQ ------------------------------------------------------------------------------------------------------------


@given(channels=st.integers(1, 6), blocks=st.integers(2, 9), seed=st.integers(0, 99))
def test_lpbq_scales_are_small_integers_times_one_float_per_channel(channels, blocks, seed):
    w = np.random.default_rng(seed).laplace(size=(channels, blocks * 8)).astype(np.float32)
    grid = Grid(4, True, True, block_size=(1, 8))
    plain, lpbq = choose_qparams(w, grid), choose_lpbq(w, grid)
    assert lpbq.block_scale.dtype == np.uint8 and lpbq.channel_scale.shape == (channels, 1)
    assert lpbq.block_scale.min() >= 1 and (lpbq.block_scale.max(axis=1) == 16).all()
    np.testing.assert_array_equal(lpbq.qparams.scale, lpbq.block_scale * lpbq.channel_scale)
    # Rounded to the nearest sixteenth of the channel's largest, and never to nothing.
    off = np.abs(lpbq.qparams.scale - plain.scale) / lpbq.channel_scale
    assert np.all((off <= 0.5 + 1e-5) | (lpbq.block_scale == 1))


def test_lpbq_on_torch_is_lpbq_on_numpy():
    w = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    grid = Grid(4, True, True, block_size=(1, 16))
    ours, theirs = choose_lpbq(w, grid), choose_lpbq(torch.from_numpy(w), grid)
    assert np.array_equal(ours.block_scale, theirs.block_scale.numpy())
    assert np.array_equal(ours.qparams.scale, theirs.qparams.scale.numpy())


def test_lpbq_keeps_a_row_whose_other_blocks_are_all_zero():
    w = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32) * 0.02
    w[:, :32] = 0
    w[2] = 0
    grid = Grid(4, True, True, block_size=(1, 32))
    lpbq = choose_lpbq(w, grid)
    assert lpbq.block_scale[:2, 0].tolist() == [1, 1] and lpbq.block_scale[:2].max() == 16
    assert sqnr_db(w, fake_quantize(w, lpbq.qparams)) > sqnr_db(w, fake_quantize(w, choose_qparams(w, grid))) - 1
    assert not fake_quantize(w, lpbq.qparams)[2].any()


def test_no_block_of_lpbq_gets_the_integer_zero():
    w = np.full((1, 64), 1e-6, np.float32)
    w[0, 0] = 1.0
    assert choose_lpbq(w, Grid(4, True, True, block_size=(1, 32))).block_scale.tolist() == [[16, 1]]


@pytest.mark.parametrize(
    ("grid", "shape", "scale_bits"),
    [
        (Grid(4, True, True, block_size=(1, -1)), (4, 32), 4),
        (Grid(4, block_size=(1, 8)), (4, 32), 4),
        (Grid(4), (4, 32), 4),
        (Grid(4, True, True, block_size=(1, 8)), (4, 32), 8),
        (Grid(4, True, True, block_size=(1, 32)), (4, 32), 4),
        (Grid(4, True, True, block_size=(1, 8, 1, 1)), (4, 32, 3, 3), 4),
    ],
)
def test_lpbq_of_what_is_not_rows_of_blocks_is_refused(grid, shape, scale_bits):
    with pytest.raises(ValueError, match="LPBQ needs"):
        choose_lpbq(np.ones(shape, np.float32), grid, scale_bits=scale_bits)


# -- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "symmetric", "scale_bits", "expected"),
    [
        ((-1, -1), True, 16, 4 + 16 / (64 * 4096)),
        ((1, -1), True, 16, 4 + 16 / 4096),
        ((1, 128), True, 16, 4.125),
        ((1, 32), True, 16, 4.5),  # GGUF's Q4_0
        ((1, 32), False, 16, 4.625),
        ((1, 128), True, 32, 4.25),
        ((1, 100), True, 16, 4 + 41 * 16 / 4096),  # the last group of 96 has a whole scale
    ],
)
def test_bits_per_weight(blocks, symmetric, scale_bits, expected):
    grid = Grid(4, signed=True, symmetric=symmetric, block_size=blocks)
    assert bits_per_weight(grid, (64, 4096), scale_bits=scale_bits) == pytest.approx(expected)


def test_bits_per_weight_of_gguf_blocks():
    gguf = pytest.importorskip("gguf")
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_0]
    grid = Grid(4, signed=True, symmetric=True, block_size=(1, elements))
    assert bits_per_weight(grid, (32, 4096)) == 8 * size / elements


def test_bits_per_weight_of_lpbq_counts_both_kinds_of_scale():
    grid = Grid(4, True, True, block_size=(1, 32))
    assert bits_per_weight(grid, (64, 4096), scale_bits=4, channel_bits=32) == pytest.approx(4 + 4 / 32 + 32 / 4096)


def test_an_empty_tensor_has_no_bits_per_weight():
    with pytest.raises(ValueError, match="no weights"):
        bits_per_weight(Grid(4), (0, 3))


def test_parameters_of_another_shape_are_refused():
    qparams = QParams(Grid(4, True, True, block_size=(1, 32)), np.ones((4, 3), np.float32), np.zeros((4, 3), np.int32))
    with pytest.raises(ValueError, match="does not fit"):
        fake_quantize(np.ones((4, 64), np.float32), qparams)
