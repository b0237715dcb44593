"""The equations against ONNX, ONNX Runtime, torch, torchao, and their own laws."""

import functools
import math
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qtools import _fused
from qtools.affine import (
    Grid,
    QParams,
    block_ranges,
    choose_and_quantize,
    choose_qparams,
    dequantize,
    fake_quantize,
    pack_int4,
    qparams_from_range,
    quantize,
    unpack_int4,
)
from qtools.qdq import quantizer_model

BLOCKS = [(), (-1, -1), (1, -1), (-1, 1), (1, 1), (1, 7), (1, 128), (5, -1), (5, 7), (3, 1), (1000, 1000)]
GRIDS = [
    Grid(bits, signed, symmetric, narrow)
    for bits in (2, 3, 4, 8, 12, 16)
    for signed in (False, True)
    for symmetric in (False, True)
    for narrow in (False, True)
]
ONNX_TYPES = {f"{'s' if signed else 'u'}{bits}": Grid(bits, signed) for bits in (4, 8, 16) for signed in (False, True)}


def with_blocks(grid: Grid, block_size: tuple[int, ...]) -> Grid:
    return Grid(grid.bits, grid.signed, grid.symmetric, grid.narrow_range, block_size)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# -- against ONNX ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONNX_TYPES)
@pytest.mark.parametrize("block_size", [(), (-1, -1), (1, -1), (-1, 1), (1, 100), (100, 1)], ids=str)
def test_codes_equal_onnxruntime_on_a_million_values(name, block_size):
    grid = with_blocks(ONNX_TYPES[name], block_size)
    x = numbers(1000, 1000, seed=1) * np.linspace(0.1, 3, 1000, dtype=np.float32)
    qparams = choose_qparams(x, grid)
    # Narrower than the data on purpose: saturation must agree too.
    qparams = QParams(grid, qparams.scale * np.float32(0.7), qparams.zero_point)
    model = quantizer_model(qparams, x.shape).SerializeToString()
    theirs = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    ours = quantize(x, qparams)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ONNX_TYPES)
@pytest.mark.parametrize("block_size", [(), (1, -1), (1, 8)], ids=str)
def test_codes_equal_onnx_reference(name, block_size):
    grid = with_blocks(ONNX_TYPES[name], block_size)
    x = numbers(16, 32)
    x[0, :3] = 0.5, -0.0, 40.0
    qparams = choose_qparams(x, grid)
    theirs = ReferenceEvaluator(quantizer_model(qparams, x.shape)).run(None, {"x": x})[0]
    np.testing.assert_array_equal(quantize(x, qparams), theirs.astype(grid.dtype))


def test_ties_go_to_even_before_the_zero_point_is_added():
    qparams = QParams(Grid(8), np.float32(1), np.int32(101))
    ties = np.array([-1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    assert quantize(ties, qparams).tolist() == [99, 101, 101, 103, 103]
    assert quantize(ties, qparams, rule="article").tolist() == [100, 100, 102, 102, 104]


# -- against torch and torchao ---------------------------------------------------------------------------------------


def test_fake_quantize_equals_torch_where_torch_divides_exactly():
    # torch multiplies by 1/scale; with a power of two both give the same number.
    x = torch.from_numpy(numbers(64, 64))
    qparams = QParams(
        Grid(8, block_size=(-1, -1)), torch.full((1, 1), 2.0**-5), torch.full((1, 1), 120, dtype=torch.int32)
    )
    theirs = torch.fake_quantize_per_tensor_affine(x, 2.0**-5, 120, 0, 255)
    assert torch.equal(fake_quantize(x, qparams), theirs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [(1, -1), (1, 32), (-1, -1)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("half_range", "SYMMETRIC"), ("no_clipping", "SYMMETRIC_NO_CLIPPING_ERR"), (None, "ASYMMETRIC")],
)
def test_scale_and_codes_equal_torchao(bits, block_size, ours, theirs):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = torch.from_numpy(numbers(48, 96, seed=3))
    grid = Grid(bits, signed=True, symmetric=ours is not None, block_size=block_size)
    qparams = choose_qparams(x, grid, symmetric_scale=ours or "qmax")
    block = tuple(n if b == -1 else b for n, b in zip(x.shape, block_size))
    limits = dict(quant_min=grid.qmin, quant_max=grid.qmax)
    scale, zero_point = primitives.choose_qparams_affine(
        x,
        getattr(primitives.MappingType, theirs),
        block,
        torch.int8,
        **limits,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    torch.testing.assert_close(qparams.scale.reshape(scale.shape), scale, rtol=2e-7, atol=0)
    mine = QParams(grid, scale.reshape(qparams.scale.shape), zero_point.reshape(qparams.scale.shape).to(torch.int32))
    codes = primitives.quantize_affine(x, block, scale, zero_point, torch.int8, **limits)
    assert torch.equal(quantize(x, mine, rule="torchao"), codes)


@pytest.mark.parametrize(("bits", "rule"), [(8, "qmax"), (4, "half_range")])
def test_symmetric_scales_equal_onnxruntime(bits, rule):
    from onnx import TensorProto
    from onnxruntime.quantization import quant_utils

    x = numbers(1000)
    ends = quant_utils.get_qmin_qmax_for_qType(TensorProto.INT8 if bits == 8 else TensorProto.INT4, symmetric=True)
    zero_point, scale = quant_utils.compute_scale_zp(x.min(), x.max(), *ends, symmetric=True)
    assert int(zero_point) == 0
    mine = choose_qparams(x, Grid(bits, signed=True, symmetric=True), symmetric_scale=rule)
    assert float(mine.scale) == pytest.approx(float(scale), rel=1e-6)


def test_groups_of_32_equal_gguf_up_to_its_half_precision_scale():
    package = pytest.importorskip("gguf")
    x = numbers(4, 64)
    grid = Grid(8, signed=True, symmetric=True, block_size=(1, 32))
    codes, qparams = choose_and_quantize(x, grid)
    kind = package.GGMLQuantizationType.Q8_0
    stored = package.quants.quantize(x, kind).reshape(-1, 34)
    np.testing.assert_allclose(stored[:, :2].copy().view(np.float16).ravel(), qparams.scale.ravel(), rtol=1e-3)
    # It rounds halves away from zero, and the reciprocal of the unrounded scale: a code may be the neighbour.
    assert np.abs(stored[:, 2:].view(np.int8).reshape(x.shape) - codes.astype(int)).max() <= 1


# -- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(x=hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_laws_of_the_grid(grid, x):
    qparams = choose_qparams(x, grid)
    # Zero is exactly representable.
    assert fake_quantize(np.zeros(1, np.float32), qparams)[0] == 0
    codes = quantize(x, qparams)
    assert codes.min() >= grid.qmin and codes.max() <= grid.qmax
    # Quantizing twice changes nothing.
    once = dequantize(codes, qparams)
    np.testing.assert_array_equal(quantize(once, qparams), codes)
    # No value inside the range moves by more than half a step (a whole one where the zero point's rounding moves the
    # ends), up to the precision of float32.
    step = float(qparams.scale) * (0.5 if grid.symmetric else 1)
    assert np.all(np.abs(once.astype(float) - x) <= step * (1 + 1e-4) + np.abs(x) * 2.0**-22)
    # Order is kept.
    assert np.all(np.diff(codes[np.argsort(x)].astype(int)) >= 0)


@pytest.mark.parametrize("rule", ["qmax", "half_range", "no_clipping"])
def test_symmetric_scale_rules(rule):
    wanted = {"qmax": 4 / 127, "half_range": 4 / 127.5, "no_clipping": max(3 / 127, 4 / 128)}[rule]
    x = np.array([3, -4], np.float32)
    assert float(choose_qparams(x, Grid(8, True, True), symmetric_scale=rule).scale) == pytest.approx(wanted, rel=1e-7)
    assert float(choose_qparams(x, Grid(8, True, True, True), symmetric_scale=rule).scale) == pytest.approx(
        4 / 127, rel=1e-7
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_range_of_codes(grid):
    assert grid.qmax - grid.qmin == 2**grid.bits - 1 - grid.narrow_range
    assert grid.qmin <= grid.midpoint <= grid.qmax
    assert np.iinfo(grid.dtype).min <= grid.qmin and grid.qmax <= np.iinfo(grid.dtype).max


@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_every_block_is_quantized_as_if_alone(block_size, kind):
    x = numbers(11, 300)
    grid = Grid(4, block_size=block_size)
    data = torch.from_numpy(x) if kind == "torch" else x
    qparams = choose_qparams(data, grid)
    codes = np.asarray(quantize(data, qparams))
    values = np.asarray(fake_quantize(data, qparams))
    rows, columns = [n if b == -1 else b for n, b in zip(x.shape, block_size or (-1, -1))]
    for i in range(0, 11, rows):
        for j in range(0, 300, columns):
            block = x[i : i + rows, j : j + columns]
            alone = choose_qparams(block, Grid(4))
            place = (i // rows, j // columns) if block_size else ()
            assert float(qparams.scale[place]) == float(alone.scale)
            np.testing.assert_array_equal(codes[i : i + rows, j : j + columns], quantize(block, alone))
            np.testing.assert_array_equal(values[i : i + rows, j : j + columns], fake_quantize(block, alone))


@pytest.mark.parametrize("block_size", [*BLOCKS, (-1, 1, -1), (1, 1, 2), (2, -1, 1), (1, -1, -1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("grid", [Grid(8), Grid(4, True, True), Grid(16, True), Grid(16)], ids=str)
def test_compiled_kernels_equal_the_plain_code(block_size, grid):
    shape = (6, 9, 13) if len(block_size) == 3 else (11, 300)
    grid = with_blocks(grid, block_size)
    x = numbers(*shape)
    plain = choose_qparams(x, grid)
    low, high = _fused.block_ranges(x, block_size)
    np.testing.assert_array_equal([low, high], block_ranges(x, block_size))
    codes, _ = _fused.choose_and_quantize(x, grid, "qmax", None)
    tight = QParams(grid, plain.scale * np.float32(0.8), plain.zero_point)
    np.testing.assert_array_equal(codes, quantize(x, plain))
    np.testing.assert_array_equal(_fused.quantize(x, tight), quantize(x, tight))
    np.testing.assert_array_equal(_fused.fake_quantize(x, tight), fake_quantize(x, tight))
    np.testing.assert_array_equal(_fused.dequantize(codes, tight), dequantize(codes, tight))


@pytest.mark.parametrize("eps", [None, 2.0**-3])
@pytest.mark.parametrize("rule", ["qmax", "half_range", "no_clipping"])
@pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits in (2, 8, 16)], ids=str)
def test_compiled_scales_equal_the_plain_ones(grid, rule, eps):
    x = numbers(40, 64) * np.logspace(-45, 37, 40, dtype=np.float32)[:, None]
    x[3], x[4], x[5] = 0, np.abs(x[5]), -np.abs(x[5])
    grid = with_blocks(grid, (1, 16))
    _, chosen = _fused.choose_and_quantize(x, grid, rule, eps)
    plain = choose_qparams(x, grid, symmetric_scale=rule, eps=eps)
    np.testing.assert_array_equal(chosen.scale, plain.scale)
    np.testing.assert_array_equal(chosen.zero_point, plain.zero_point)


@pytest.mark.parametrize("size", [8, 1 << 20])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_results_go_where_they_are_told(size, kind):
    make = torch.from_numpy if kind == "torch" else np.asarray
    x = make(numbers(size))
    codes, qparams = choose_and_quantize(x, Grid(8))
    for function, argument, dtype in [
        (quantize, x, np.uint8), (fake_quantize, x, np.float32), (dequantize, codes, np.float32)
    ]:  # fmt: skip
        out = make(np.zeros(size, dtype))
        assert function(argument, qparams, out=out) is out
        np.testing.assert_array_equal(np.asarray(out), np.asarray(function(argument, qparams)))
        with pytest.raises(ValueError, match="out must be"):
            function(argument, qparams, out=make(np.zeros(size, np.int32)))
        assert function(argument, qparams, out=out) is out
        with pytest.raises(ValueError, match="out must be contiguous"):
            function(argument, qparams, out=make(np.zeros(2 * size, dtype))[::2])
    half = np.float16 if kind == "numpy" else torch.float16
    out = make(np.zeros(size, np.float16))
    assert dequantize(codes, qparams, half, out=out) is out
    out = make(np.zeros(size, np.uint8))
    assert choose_and_quantize(x, Grid(8), out=out)[0] is out
    np.testing.assert_array_equal(np.asarray(out), np.asarray(codes))


def test_a_large_array_with_blocks_on_four_axes_takes_the_plain_road():
    x = numbers(32, 32, 32, 33)
    grid = Grid(8, block_size=(2, 3, 4, 5))
    codes, qparams = choose_and_quantize(x, grid)
    block = x[30:, 30:, 28:, 30:]
    assert qparams.scale.shape == (16, 11, 8, 7)
    np.testing.assert_array_equal(codes[30:, 30:, 28:, 30:], quantize(block, choose_qparams(block, Grid(8))))


def test_large_arrays_take_the_compiled_road_and_agree(monkeypatch):
    x = numbers(1100, 1000)
    grid = Grid(4, True, True, block_size=(1, 128))
    fast = choose_and_quantize(x, grid)
    from_torch = choose_and_quantize(torch.from_numpy(x), grid)
    monkeypatch.setattr("qtools.affine._FUSED_FROM", math.inf)
    slow = choose_and_quantize(x, grid)
    np.testing.assert_array_equal(fast[0], slow[0])
    np.testing.assert_array_equal(fast[1].scale, slow[1].scale)
    assert isinstance(from_torch[0], torch.Tensor)
    np.testing.assert_array_equal(from_torch[0].numpy(), slow[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_numpy_and_torch_give_the_same_codes_in_every_float_type(dtype):
    x = numbers(7, 50)
    array = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensor = torch.from_numpy(x).to(getattr(torch, dtype))
    grid = Grid(8, block_size=(1, 16))
    codes, qparams = choose_and_quantize(array, grid)
    codes_t, qparams_t = choose_and_quantize(tensor, grid)
    assert isinstance(codes_t, torch.Tensor) and isinstance(codes, np.ndarray)
    np.testing.assert_array_equal(codes, codes_t.numpy())
    np.testing.assert_array_equal(qparams.scale, qparams_t.scale.numpy())
    assert str(qparams.scale.dtype) == ("float64" if dtype == "float64" else "float32")
    assert fake_quantize(array, qparams).dtype == array.dtype
    assert fake_quantize(tensor, qparams_t).dtype == tensor.dtype


@given(codes=st.lists(st.integers(-8, 7), max_size=33))
def test_int4_survives_packing(codes):
    packed = pack_int4(np.array(codes, np.int8))
    assert packed.size == -(-len(codes) // 2)
    assert unpack_int4(packed, (len(codes),), signed=True).tolist() == codes


def test_int4_packing_equals_onnx():
    codes = np.arange(-8, 8).astype(np.int8)
    raw = helper.make_tensor("w", TensorProto.INT4, [16], codes.tolist()).int32_data
    assert pack_int4(codes).tolist() == list(raw)
    assert unpack_int4(pack_int4(codes + 8), (4, 4), signed=False).ravel().tolist() == list(range(16))


@pytest.mark.parametrize("size", [8, 1024])
def test_scales_of_any_kind_give_the_same_result_small_and_large(size):
    x = torch.from_numpy(numbers(size, size))
    grid = Grid(8, True, True, block_size=(1, -1))
    plain = choose_qparams(x, grid)
    codes = quantize(x, plain)
    values = dequantize(codes, plain)
    learned = QParams(grid, plain.scale.clone().requires_grad_(), plain.zero_point)
    assert torch.equal(quantize(x, learned), codes)
    assert torch.equal(dequantize(codes, learned).detach(), values)
    wide = QParams(grid, plain.scale.double(), plain.zero_point)
    assert torch.equal(quantize(x, wide), codes)
    torch.testing.assert_close(fake_quantize(x, wide), values, rtol=1e-7, atol=0)


def test_compiled_kernels_are_found_in_the_cache_again(tmp_path):
    program = (
        "import numpy as np; from qtools import _fused; from qtools.affine import *;"
        "x = np.ones((1024, 1024), np.float32); c, p = choose_and_quantize(x, Grid(8, block_size=(1, -1)));"
        "quantize(x, p); fake_quantize(x, p); dequantize(c, p);"
        "names = ('_choose_rows', '_quantize_rows', '_fake_rows', '_dequantize_rows');"
        "print(sum(getattr(_fused, n).stats.cache_misses.total() for n in names))"
    )
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = functools.partial(subprocess.run, [sys.executable, "-c", program], env=env, capture_output=True, check=True)
    assert [int(run().stdout) for _ in range(2)] == [4, 0]


def test_an_empty_batch_has_no_codes():
    qparams = choose_qparams(numbers(6, 4), Grid(8, block_size=(-1, 1)))
    assert quantize(numbers(0, 4), qparams).shape == (0, 4)


def test_a_range_in_half_precision_is_worked_out_in_single():
    qparams = qparams_from_range(np.float16(-1), np.float16(1), Grid(16))
    assert qparams.scale.dtype == np.float32 and float(qparams.scale) == pytest.approx(2 / 65535)


# -- the door --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 1 << 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block_size", [(), (4,)])
def test_nan_and_infinity_have_no_range(size, bad, block_size):
    x = np.ones(size, np.float32)
    x[7] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        choose_qparams(x, Grid(8, block_size=block_size))
    with pytest.raises(ValueError, match="NaN or infinity"):
        choose_and_quantize(x, Grid(8, block_size=block_size))


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_infinity_saturates_and_nan_is_refused(size):
    qparams = QParams(Grid(8), np.float32(1), np.int32(0))
    x = np.zeros(size, np.float32)
    x[:2] = np.inf, -np.inf
    assert quantize(x, qparams)[:2].tolist() == [255, 0]
    x[3] = np.nan
    for function in (quantize, fake_quantize):
        with pytest.raises(ValueError, match="NaN"):
            function(x, qparams)


@pytest.mark.parametrize("grid", [Grid(8), Grid(8, True, True), Grid(4, True), Grid(8, False, True)], ids=str)
@pytest.mark.parametrize(
    "x",
    [
        np.zeros(5),
        np.full(5, 2.5),
        np.full(5, -2.5),
        np.linspace(1, 2, 9),
        np.linspace(-3, -1, 9),
        np.full(3, 1e-41),
        [-2.9e38, 2.9e38],
        [3.0],
    ],
    ids=["zero", "constant", "constant negative", "positive", "negative", "subnormal", "huge", "single"],
)
def test_odd_data_gets_a_right_answer(grid, x):
    x = np.asarray(x, np.float32)
    qparams = choose_qparams(x, grid)
    error = np.abs(fake_quantize(x, qparams).astype(float) - x)
    assert error.max() <= float(qparams.scale) * 0.51


def test_a_grid_whose_ends_overflow_is_refused():
    with pytest.raises(ValueError, match="too wide for 4 bits"):
        choose_qparams(np.array([-3.4e38, 3.4e38], np.float32), Grid(4))


def test_a_dead_channel_gets_scale_one():
    qparams = choose_qparams(np.array([[0, 0], [1, -1]], np.float32), Grid(8, True, True, block_size=(1, -1)))
    assert qparams.scale[0, 0] == 1 and qparams.scale[1, 0] == np.float32(1 / 127)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (np.ones(3, np.int32), TypeError),
        (np.array([1, "a"], object), TypeError),
        (np.ones(3, complex), TypeError),
        (torch.ones(3, dtype=torch.int64), TypeError),
        ([1.0, 2.0], TypeError),
        (np.empty(0, np.float32), ValueError),
        (np.empty((0, 3), np.float32), ValueError),
    ],
)
def test_what_is_not_a_tensor_of_reals_is_refused(x, error):
    with pytest.raises(error, match=r"expected|empty") as caught:
        choose_qparams(x, Grid(8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [1, 0, -4, 17, 33, 2.5, "8", True, None])
def test_bits_outside_2_to_16_are_refused(bits):
    with pytest.raises((ValueError, TypeError), match="bits must be"):
        Grid(bits)


@pytest.mark.parametrize("block_size", [(0,), (-2,), (1, 0), (1.5,), ("a",)])
def test_bad_block_sizes_are_refused(block_size):
    with pytest.raises((ValueError, TypeError), match="block_size"):
        Grid(8, block_size=block_size)


@pytest.mark.parametrize("size", [4, 1 << 20])
def test_bad_options_are_refused_whatever_the_size(size):
    x = np.zeros(size, np.float32)
    for function in (choose_qparams, choose_and_quantize):
        for eps in (0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="eps must be positive"):
                function(x, Grid(8), eps=eps)
        with pytest.raises(ValueError, match="symmetric_scale must be one of"):
            function(x, Grid(8), symmetric_scale="max")
        with pytest.raises(TypeError, match="expected a NumPy or torch array"):
            function(np.ma.masked_array(x), Grid(8))


def test_a_scale_beyond_the_precision_of_the_data_is_refused():
    with pytest.raises(ValueError, match="out of the range of float32"):
        quantize(numbers(3), QParams(Grid(8), np.float64(1e-50), np.int32(0)))


def test_onnx_has_no_narrow_range_and_no_ill_fitting_scale():
    narrow = choose_qparams(numbers(3), Grid(8, True, True, True))
    with pytest.raises(ValueError, match="no narrow range"):
        quantizer_model(narrow, (3,))
    with pytest.raises(ValueError, match="does not fit"):
        quantizer_model(choose_qparams(numbers(4, 8), Grid(8, block_size=(1, -1))), (5, 8))


def test_the_wrong_rank_or_shape_is_refused():
    x = numbers(4, 6)
    for function in (choose_qparams, choose_and_quantize):
        with pytest.raises(ValueError, match="another rank"):
            function(x, Grid(8, block_size=(1, -1, -1)))
    qparams = choose_qparams(x, Grid(8, block_size=(1, -1)))
    for size in (5, 300_000):
        with pytest.raises(ValueError, match="does not fit"):
            quantize(numbers(size, 6), qparams)
    with pytest.raises(TypeError, match="integer codes"):
        dequantize(x, qparams)


@pytest.mark.parametrize(
    ("scale", "zero_point", "grid", "message"),
    [
        (0.0, 0, Grid(8), "greater than 0"),
        (-1.0, 0, Grid(8), "greater than 0"),
        (np.nan, 0, Grid(8), "finite"),
        (1.0, 256, Grid(8), "zero_point"),
        (1.0, -1, Grid(8), "zero_point"),
        (1.0, 1, Grid(8, True, True), "zero_point"),
        (1.0, 0, Grid(8, False, True), "zero_point"),
    ],
)
def test_impossible_parameters_are_refused(scale, zero_point, grid, message):
    with pytest.raises(ValueError, match=message):
        QParams(grid, np.float32(scale), np.int32(zero_point))
    with pytest.raises(ValueError, match="one shape"):
        QParams(grid, np.ones(2, np.float32), np.zeros(3, np.int32))


def test_a_reversed_range_and_an_unknown_option_are_refused():
    with pytest.raises(ValueError, match="low is above high"):
        qparams_from_range(np.float32(1), np.float32(-1), Grid(8))
    with pytest.raises(ValueError, match="symmetric_scale must be one of"):
        choose_qparams(numbers(3), Grid(8, True, True), symmetric_scale="max")
    with pytest.raises(ValueError, match="rule must be one of"):
        quantize(numbers(3), QParams(Grid(8), np.float32(1), np.int32(0)), rule="floor")


@pytest.mark.parametrize("codes", [np.array([16]), np.array([-9]), np.array([-1, 8])])
def test_codes_beyond_four_bits_are_refused(codes):
    with pytest.raises(ValueError, match="4-bit codes"):
        pack_int4(codes)


def test_unpacking_the_wrong_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match="5 4-bit codes take 3 bytes, got 2"):
        unpack_int4(np.zeros(2, np.uint8), (5,), signed=True)
