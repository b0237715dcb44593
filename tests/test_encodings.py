"""Encodings files: what AIMET wrote comes out the same, every conversion keeps the codes, bad files are refused."""

import gzip
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtools import encodings
from qtools.affine import LPBQ, Grid, QParams, choose_lpbq, choose_qparams, dequantize, quantize
from qtools.encodings import Encoding, Encodings, Overrides, Rule, compare, dumps, loads, merge, write

GOLDEN = sorted((Path(__file__).parent / "data" / "encodings").glob("*.gz"))
WRITABLE = [(v, f) for v in ("0.6.1", "1.0.0", "2.0.0", "2.1.0") for f in ("aimet-torch", "aimet-onnx")]
GRIDS = st.builds(
    Grid,
    bits=st.sampled_from([2, 4, 8, 16]),
    signed=st.booleans(),
    symmetric=st.booleans(),
    narrow_range=st.booleans(),
    block_size=st.sampled_from([(), (-1, -1), (1, -1), (-1, 1), (1, 4), (4, 1), (1, 3), (3, 1)]),
)


def golden(path):
    _, flavour, version = path.name.removesuffix(".encodings.gz").rsplit("_", 2)
    return gzip.decompress(path.read_bytes()).decode(), version, flavour


def tensor(seed=0, shape=(8, 12)):
    return np.random.default_rng(seed).laplace(size=shape).astype(np.float32)


def same(a, b):
    """Equal in everything that decides a code."""
    return (a.bits, a.signed, a.block_size) == (b.bits, b.signed, b.block_size) and (
        a.scale is b.scale is None
        or (np.array_equal(a.scale.ravel(), b.scale.ravel()) and np.array_equal(a.offset.ravel(), b.offset.ravel()))
    )


def through(encoding, version, flavour="aimet-torch", name="w"):
    """The encoding out of a file it was written to."""
    read = loads(dumps(Encodings(params={name: encoding}), version, flavour), params=[name])
    return read.params[name]


def entry_of(encoding, version, **options):
    content = json.loads(dumps(Encodings(params={"w": encoding}), version, **options))
    section = content["encodings"] if version[0] == "2" else content["param_encodings"]
    return section["w"] if version == "0.6.1" else section[0]


def wrap(entry, version="1.0.0", section="activation_encodings"):
    if version[0] == "2":
        return json.dumps({"version": version, "encodings": [entry]})
    sections = {key: {} if version == "0.6.1" else [] for key in ("activation_encodings", "param_encodings")}
    sections[section] = {"x": entry} if version == "0.6.1" else [entry]
    return json.dumps({"version": version, **sections})


def first(text, **options):
    read = loads(text, **options)
    return next(iter((read.activations | read.params).values()))


# -- files that AIMET wrote ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name)
def test_files_of_aimet_come_out_byte_for_byte(path, tmp_path):
    text, version, flavour = golden(path)
    read = loads(text)
    assert json.loads(dumps(read, version, flavour)) == json.loads(text)
    assert write(read, tmp_path / "a" / "x.encodings", version, flavour) == []
    assert (tmp_path / "a" / "x.encodings").read_text() == text
    assert read.meta["producer"] == {"package": flavour, "version": "2.42.0"}


def test_there_are_seven_of_them():
    assert len(GOLDEN) == 7


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name)
@pytest.mark.parametrize(("version", "flavour"), WRITABLE)
def test_conversions_between_versions_keep_every_code(path, version, flavour):
    before = loads(golden(path)[0])
    # 0.6.1 and 1.0.0 do not name the axis of these convolutions, which 2.x has to.
    before = before.placed({name: ((e.scale.size, 1, 1, 1), 0) for name, e in before.params.items() if e.axis is None})
    after = loads(dumps(before, version, flavour), params=before.params)
    assert after.activations.keys() == before.activations.keys() and after.params.keys() == before.params.keys()
    for kind in ("activation", "param"):
        assert all(same(e, after.of(kind)[name]) for name, e in before.of(kind).items())
    assert [d for d in compare(before, after) if d.size] == []


@pytest.mark.parametrize("package", ["torch", "onnx"])
def test_versions_of_one_network_say_the_same(package):
    files = {golden(p)[1]: loads(golden(p)[0]) for p in GOLDEN if f"aimet-{package}" in p.name}
    for version, read in files.items():
        of_interest = {n: e for n, e in (read.activations | read.params).items() if e.bits == 8}
        for name, e in (files["1.0.0"].activations | files["1.0.0"].params).items():
            assert same(e, of_interest[name]), (version, name)


def test_dead_channels_of_a_real_file_are_pointed_out():
    read = {golden(p)[1:]: loads(golden(p)[0]) for p in GOLDEN}
    found = encodings.suspicious(read["1.0.0", "aimet-onnx"])
    assert len(found) == 7 and all("smallest that AIMET writes" in line for line in found)
    assert encodings.suspicious(read["1.0.0", "aimet-torch"]) == []


# -- entries as documented -------------------------------------------------------------------------------------------

ACTIVATION = Encoding(8, False, False, 0.02, 100)
WEIGHT = Encoding(8, True, True, [0.01, 0.02], axis=0)
BLOCKS = Encoding(4, True, True, np.arange(1, 9).reshape(4, 2) / 100, axis=0, block_axis=1, block_size=4)
PRODUCT = Encoding(
    4, axis=0, block_axis=1, block_size=32, block_scale=[[16, 8], [4, 16]], channel_scale=np.array([0.001, 0.002])
)
LPBQ_1 = {"dtype": "INT", "enc_type": "LPBQ", "compressed_bw": 4, "bw": 8, "is_sym": True, "scale": [0.001, 0.002],
          "per_block_int_scale": [16, 8, 4, 16], "offset": [-128, -128], "block_size": 32}  # fmt: skip
LPBQ_20 = {"output_dtype": "int4", "per_channel_float_scale": [[0.001], [0.002]],
           "per_block_int_scale": [[16, 8], [4, 16]], "axis": 1, "block_size": 32}  # fmt: skip
LPBQ_21 = {"output_dtype": "int4", "y_scale": {"x": [[16, 8], [4, 16]], "x_scale": [0.001, 0.002], "axis": 0},
           "axis": 1, "block_size": 32}  # fmt: skip
DOCUMENTED = [
    ("0.6.1", ACTIVATION, [{"min": -2.0, "max": 3.1, "scale": 0.02, "offset": -100, "bitwidth": 8, "dtype": "int",
                            "is_symmetric": "False"}]),
    ("0.6.1", WEIGHT, [{"min": -1.28 * k, "max": 1.27 * k, "scale": 0.01 * k, "offset": -128, "bitwidth": 8,
                        "dtype": "int", "is_symmetric": "True"} for k in (1, 2)]),
    ("1.0.0", ACTIVATION, {"dtype": "INT", "bw": 8, "is_sym": False, "scale": [0.02], "offset": [-100],
                           "enc_type": "PER_TENSOR"}),
    ("1.0.0", WEIGHT, {"dtype": "INT", "bw": 8, "is_sym": True, "scale": [0.01, 0.02], "offset": [-128, -128],
                       "enc_type": "PER_CHANNEL"}),
    ("2.0.0", ACTIVATION, {"output_dtype": "uint8", "y_scale": 0.02, "y_zero_point": 100}),
    ("2.0.0", WEIGHT, {"output_dtype": "int8", "y_scale": [0.01, 0.02], "axis": 0}),
    ("1.0.0", BLOCKS, {"dtype": "INT", "bw": 4, "is_sym": True, "scale": [k / 100 for k in range(1, 9)],
                       "offset": [-8] * 8, "enc_type": "PER_BLOCK", "block_size": 4}),
    ("2.0.0", BLOCKS, {"output_dtype": "int4", "y_scale": [[0.01, 0.02], [0.03, 0.04], [0.05, 0.06], [0.07, 0.08]],
                       "axis": 1, "block_size": 4}),
    ("1.0.0", PRODUCT, LPBQ_1),
    ("2.0.0", PRODUCT, LPBQ_20),
    ("2.1.0", PRODUCT, LPBQ_21),
    ("0.6.1", Encoding(16), [{"bitwidth": 16, "dtype": "float"}]),
    ("1.0.0", Encoding(16), {"dtype": "FLOAT", "bw": 16, "enc_type": "PER_TENSOR"}),
]  # fmt: skip


@pytest.mark.parametrize(("version", "encoding", "documented"), DOCUMENTED)
def test_documented_entries_are_written_and_read(version, encoding, documented):
    written = entry_of(encoding, version)
    if version == "0.6.1":
        assert [pytest.approx(channel) for channel in documented] == written
    else:
        assert written == {"name": "w", **documented}
    documented = documented if version == "0.6.1" else {"name": "x", **documented}
    read = first(wrap(documented, version))
    assert same(read, encoding) and read.symmetric == encoding.symmetric
    if version[0] == "2":
        assert (read.axis, read.block_axis) == (encoding.axis, encoding.block_axis)


@pytest.mark.parametrize(("version", "flavour"), WRITABLE)
def test_lpbq_survives(version, flavour):
    if version == "0.6.1":
        with pytest.raises(ValueError, match=r"^w: 0\.6\.1 has no entry for blocks; write 1\.0\.0 or 2\.0\.0$"):
            through(PRODUCT, version, flavour)
        return
    read = through(PRODUCT, version, flavour)
    assert same(read, PRODUCT) and read.granularity == "LPBQ" and read.scale_bits == 4
    np.testing.assert_array_equal(read.block_scale, PRODUCT.block_scale)


def test_what_aimet_onnx_calls_symmetric_is_signed():
    """Unsigned symmetric codes are where the two packages part."""
    middle = Encoding(8, signed=False, symmetric=True, scale=0.02)
    assert (int(middle.zero_point), int(middle.offset)) == (128, -128)
    for version, key, yes, no in (("0.6.1", "is_symmetric", "True", "False"), ("1.0.0", "is_sym", True, False)):
        torch_says, onnx_says = (entry_of(middle, version, flavour=f"aimet-{p}") for p in ("torch", "onnx"))
        torch_says, onnx_says = ((e[0] if version == "0.6.1" else e) for e in (torch_says, onnx_says))
        assert (torch_says[key], onnx_says[key]) == (yes, no)
        offset = onnx_says["offset"] if version == "0.6.1" else onnx_says["offset"][0]
        assert offset == -128 and isinstance(offset, float)
        assert same(through(middle, version, "aimet-onnx"), middle)
        assert through(middle, version, "aimet-torch").dtype == "int8"
    lost = encodings.losses(Encodings(params={"w": middle}), "1.0.0", "aimet-torch")
    assert lost == ["w: the unsigned codes are read back as signed ones of the same values"]


def test_symmetric_without_negatives_stays_unsigned():
    entry = {
        "name": "x",
        "dtype": "INT",
        "bw": 8,
        "is_sym": True,
        "scale": [0.1],
        "offset": [0],
        "enc_type": "PER_TENSOR",
    }
    read = first(wrap(entry))
    assert (read.dtype, read.symmetric, int(read.zero_point)) == ("uint8", True, 0)
    assert entry_of(read, "1.0.0") == {**entry, "name": "w"}
    assert read.qparams().grid == Grid(8)


def test_offsets_are_those_of_aimet_onnx_only_if_all_are_floats():
    channel = {"bitwidth": 8, "is_symmetric": "True", "scale": 0.1}
    dtypes = {}
    for offsets in ((0, 0), (0, 0.0), (0.0, 0.0)):
        dtypes[str(offsets)] = first(wrap([channel | {"offset": offset} for offset in offsets], "0.6.1")).dtype
    assert dtypes == {"(0, 0)": "uint8", "(0, 0.0)": "uint8", "(0.0, 0.0)": "int8"}


def test_casing_and_strings_do_not_matter():
    texts = [wrap({"name": "x", "dtype": d, "bw": 16, "enc_type": "PER_TENSOR"}) for d in ("FLOAT", "FP", "float")]
    assert {first(text).dtype for text in texts} == {"float16"}
    entry = {"bitwidth": 8, "dtype": "INT", "min": 0, "max": 2.55, "scale": 0.01, "offset": 0}
    flags = [{"is_symmetric": flag} for flag in ("False", "false", False)] + [{}]
    assert all(same(first(wrap([entry | flag], "0.6.1")), Encoding(8, False, False, 0.01, 0)) for flag in flags)
    del entry["dtype"]
    bare = json.dumps({"activation_encodings": {"x": [entry]}, "param_encodings": {}})
    assert loads(bare).version is None and first(bare).dtype == "uint8"


def test_floats_are_left_out_of_2_and_that_is_said(tmp_path):
    both = Encodings({"x": Encoding(16), "y": ACTIVATION}, meta={"quantizer_args": {}})
    assert write(both, tmp_path / "e.json", "2.0.0") == [
        "x: left out, as 2.0.0 has no entry for a float16",
        "quantizer_args: left out, as 2.0.0 has no place for it",
    ]
    assert encodings.read(tmp_path / "e.json").activations.keys() == {"y"}


def test_2_tells_parameters_by_sign_and_axis_unless_told():
    text = dumps(Encodings({"x": ACTIVATION, "s": Encoding(8, scale=0.1)}, {"w": WEIGHT}), "2.0.0")
    assert loads(text).params.keys() == {"s", "w"}
    assert loads(text, params=["w"]).params.keys() == {"w"}


# -- the legacy converter's reading ----------------------------------------------------------------------------------


def test_scale_and_offset_from_the_range_as_documented():
    """The vectors of Qualcomm's documentation: step 0.009020, zero at 200; [-5.1, 5.1] becomes [-5.12, 5.08]."""
    bare = {"bitwidth": 8, "min": -1.8, "max": 0.5}
    read = first(wrap([bare], "0.6.1"))
    assert float(read.scale) == pytest.approx(0.009020, abs=5e-7) and int(read.zero_point) == 200
    data = np.array([-1.8, -1.0, 0, 0.5], np.float32)
    codes = quantize(data, read.qparams())
    assert codes.tolist() == [0, 89, 200, 255]
    np.testing.assert_allclose(dequantize(codes, read.qparams()), [-1.8039, -1.0011, 0, 0.4961], atol=1e-4)
    low, high = (entry_of(read, "0.6.1")[0][key] for key in ("min", "max"))
    assert (round(low, 6), round(high, 6)) == (-1.803922, 0.496078)
    wide = first(wrap([bare | {"min": -5.1, "max": 5.1}], "0.6.1"))
    assert (float(wide.scale), int(wide.zero_point)) == (pytest.approx(0.04), 128)
    flat = first(wrap([bare | {"min": 0, "max": 0}], "0.6.1"))
    assert float(flat.scale) == pytest.approx(1e-4 / 255)


def test_offsets_of_the_other_sign_are_recomputed_when_asked():
    entry = {"bitwidth": 8, "min": -1.27, "max": 1.28, "scale": 0.01, "offset": 127}
    with pytest.raises(
        ValueError, match=r"^activation_encodings/x/0/offset: expected a whole number from -255 to 0, got 127"
    ):
        loads(wrap([entry], "0.6.1"))
    assert int(first(wrap([entry], "0.6.1"), recompute=True).zero_point) == 127


def test_a_range_that_contradicts_the_scale_is_noted():
    entry = {"bitwidth": 8, "min": -1.28, "max": 1.27, "scale": 0.02, "offset": -128}
    assert encodings.suspicious(loads(wrap([entry], "0.6.1"))) == [
        "activation_encodings/x/0: scale and offset are not those of min and max, which converters go by"
    ]
    assert float(first(wrap([entry], "0.6.1"), recompute=True).scale) == pytest.approx(0.01)
    near = {"bitwidth": 8, "min": -1.28, "max": 1.275, "scale": 0.01, "offset": -128}
    assert loads(wrap([near], "0.6.1")).notes and not loads(wrap([near | {"max": 1.27}], "0.6.1")).notes


# -- to and from affine ----------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    grid=GRIDS,
    seed=st.integers(0, 99),
    written=st.sampled_from(WRITABLE),
    scaled=st.floats(1e-3, 1e3),
    wide=st.booleans(),
)
def test_codes_are_the_same_after_any_file(grid, seed, written, scaled, wide):
    version, flavour = written
    w = (tensor(seed) * scaled).astype(np.float64 if wide else np.float32)
    before = choose_qparams(w, grid)
    encoding = Encoding.from_qparams(before)
    if version == "0.6.1" and encoding.block_size:
        return
    read = through(encoding, version, flavour)
    after = read.qparams(w.shape, encoding.axis, narrow_range=grid.narrow_range)
    # aimet-torch's flag does not say whether codes are signed; then they are shifted, and mean the same.
    shift = 0 if read.signed == encoding.signed else 1 << grid.bits - 1
    assert not shift or (flavour == "aimet-torch" and version[0] != "2" and grid.signed != grid.symmetric)
    if shift and grid.narrow_range:
        return
    codes = quantize(w, after).astype(int) + (shift if read.signed else -shift)
    np.testing.assert_array_equal(codes, quantize(w, before))
    if not shift:
        # A file holds no width: a scale of 64 bits that 32 bits can hold as well is read as one of 32.
        tolerance = 0 if after.scale.dtype == before.scale.dtype else 1e-7
        real, again = (dequantize(quantize(w, qparams), qparams) for qparams in (before, after))
        np.testing.assert_allclose(again, real, rtol=tolerance)
        assert wide or not tolerance


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 99), bits=st.sampled_from([4, 8]), rows=st.booleans(), written=st.sampled_from(WRITABLE[2:]))
def test_lpbq_is_the_same_after_any_file(seed, bits, rows, written):
    w = tensor(seed)
    before = choose_lpbq(w, Grid(bits, True, True, block_size=(1, 4) if rows else (4, 1)))
    after = through(Encoding.from_qparams(before), *written).qparams(w.shape, 0 if rows else 1)
    assert isinstance(after, LPBQ) and after.qparams.grid == before.qparams.grid
    for field in ("block_scale", "channel_scale"):
        np.testing.assert_array_equal(getattr(after, field), getattr(before, field), strict=True)
    np.testing.assert_array_equal(after.qparams.scale, before.qparams.scale, strict=True)
    np.testing.assert_array_equal(quantize(w, after.qparams), quantize(w, before.qparams))


@pytest.mark.parametrize("blocks", [(1, -1, -1, -1), (-1, 1, -1, -1), (1, 4, -1, -1), (4, 1, -1, -1), (1, 4, 3, 3)])
@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_convolutions_keep_their_codes(blocks, version):
    w = tensor(3, (8, 12, 3, 3))
    before = choose_qparams(w, Grid(8, True, True, block_size=blocks))
    encoding = Encoding.from_qparams(before)
    after = through(encoding, version).qparams(w.shape, encoding.axis)
    np.testing.assert_array_equal(quantize(w, after), quantize(w, before))


def test_torch_parameters_are_taken_too():
    w = torch.from_numpy(tensor())
    before = choose_qparams(w, Grid(8, True, True, block_size=(1, -1)))
    after = through(Encoding.from_qparams(before), "2.0.0").qparams(w.shape)
    assert torch.equal(quantize(w, after), quantize(w, before))


def test_an_unknown_axis_is_found_or_asked_for():
    channels = Encoding(8, scale=np.full(8, 0.1))
    assert channels.qparams((8, 12)).grid.block_size == (1, -1)
    assert channels.qparams((12, 8)).grid.block_size == (-1, 1)
    assert channels.qparams((12, 8), -1).grid.block_size == (-1, 1)
    for shape, axis in (((8, 8), None), ((12, 12), None), ((12, 8), 0), ((8, 12), 1), ((), None), ((8,), 3)):
        with pytest.raises(ValueError, match=r"scales of shape \(8,\)"):
            channels.qparams(shape, axis)
    with pytest.raises(
        ValueError, match=r"^w: 2\.0\.0 names the channel axis, which is unknown; see Encodings\.placed$"
    ):
        dumps(Encodings(params={"w": channels}), "2.0.0")
    placed = Encodings(params={"w": channels}).placed({"w": ((12, 8), 1), "elsewhere": ((1,), 0)})
    assert json.loads(dumps(placed, "2.0.0"))["encodings"][0]["axis"] == 1
    with pytest.raises(ValueError, match=r"^w: scales of shape \(8,\)"):
        Encodings(params={"w": channels}).placed({"w": ((3, 3), 0)})


def test_blocks_of_a_flat_list_need_the_shape():
    flat = Encoding(4, scale=np.arange(1, 9) / 100, block_size=4)
    assert flat.qparams((4, 8), 0).scale.shape == (4, 2)
    assert (
        flat.qparams((2, 16), 0).scale.tolist()
        == np.float64([[0.01, 0.02, 0.03, 0.04], [0.05, 0.06, 0.07, 0.08]]).tolist()
    )
    assert flat.qparams((16, 2), 1).scale[:, 0].tolist() == [0.01, 0.02, 0.03, 0.04]
    stacked = flat.placed((1, 16, 2), 2)  # a batch of matrices, (in, out)
    assert (stacked.axis, stacked.block_axis, stacked.scale.shape) == (2, 1, (2, 4))
    with pytest.raises(ValueError, match="in more than one way"):
        flat.qparams((4, 8))


@pytest.mark.parametrize("blocks", [(2, 4), (1, 1), (-1, 4)])
def test_blocks_that_no_file_holds_are_refused(blocks):
    with pytest.raises(ValueError, match="no encodings file holds scales of shape"):
        Encoding.from_qparams(choose_qparams(tensor(), Grid(8, block_size=blocks)))


def test_a_float_and_a_bias_are_no_qparams():
    with pytest.raises(ValueError, match="a tensor in float16 is not quantized"):
        Encoding(16).qparams((3,))
    bias = Encoding(32, scale=np.full(3, 1e-6), axis=0)
    with pytest.raises(ValueError, match="bits must be 2 to 16"):
        bias.qparams((3,))
    assert all(same(through(bias, *written), bias) for written in WRITABLE)


@pytest.mark.parametrize(
    "fields",
    [
        dict(bits=1, scale=1), dict(bits=33, scale=1), dict(bits=8), dict(bits=8, scale=0.0), dict(bits=8, scale=-1),
        dict(bits=8, scale=np.nan), dict(bits=8, scale=np.inf), dict(bits=8, scale=1e39),
        dict(bits=8, scale=[1], zero_point=0), dict(bits=4, block_scale=[[1]], channel_scale=[1, 2], block_size=4),
        dict(bits=8, scale=1, zero_point=128, symmetric=False), dict(bits=8, scale=1, zero_point=1),
        dict(bits=8, scale=[[1]]), dict(bits=4, block_scale=[[17]], channel_scale=[1], block_size=4),
        dict(bits=4, block_scale=[[1]], channel_scale=[1]),
    ],
)  # fmt: skip
def test_parts_that_make_no_encoding_are_refused(fields):
    with pytest.raises(ValueError):
        Encoding(**fields)


# -- overrides -------------------------------------------------------------------------------------------------------

ARTICLE = """{"activation_encodings": {
 "/model/layer.0/attention/Softmax_output_0": {"dtype": "int16", "is_symmetric": true}},
"param_encodings": {"model.embed_tokens.weight": {"dtype": "int8", "is_symmetric": true},
 "model.layers.*.self_attn.q_proj.weight": {"dtype": "int4", "is_symmetric": true}},
"supergroups": [{"op_list": ["Conv", "Relu"], "fuse": true}]}"""
LLAMA = """{"param_encodings": {"model.layers.*.self_attn.*_proj.weight": {"dtype": "int4", "group_size": 128}},
"activation_encodings": {".*Softmax.*": {"dtype": "int16"}}}"""


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("model.layers.*.q.weight", ["model.layers.0.q.weight", "model.layers.0.x.q.weight"],
         ["model.layers.q.weight", "model.layersX.q.weight", "model.layers.0.q.weights", "model.layers.0.qAweight"]),
        (".*Softmax.*", ["/a/Softmax_output_0", "Softmax"], ["softmax"]),
        ("/model/.*Softmax.*", ["/model/Softmax_0", "/model/a/Softmax"], ["/other/Softmax"]),
        ("a.*_proj", ["a.q_proj", "aq_proj"], ["a.q_proj.weight"]),
        ("*a*a", ["aa", "xaya"], ["a", "aab"]),
        ("w[0].*", ["w[0].x"], ["w0.x"]),
        (".*.weight", ["a.weight", ".weight"], ["weight"]),
        ("conv1", ["conv1"], ["conv11", "xconv1"]),
        ("*", ["", "x"], []),
    ],
)  # fmt: skip
def test_patterns(pattern, yes, no):
    rule = Rule(pattern, 8, None, "param")
    assert [name for name in yes + no if rule.matches(name)] == yes


def test_patterns_cannot_be_made_to_take_forever():
    assert not Rule("*a" * 2000 + "b", 8, None, "param").matches("a" * 100_000)


def test_overrides_of_the_article(tmp_path):
    (tmp_path / "o.json").write_text(ARTICLE)
    read = encodings.read_overrides(tmp_path / "o.json")
    assert read == Overrides(
        (
            Rule("/model/layer.0/attention/Softmax_output_0", 16, True, "activation"),
            Rule("model.embed_tokens.weight", 8, True, "param"),
            Rule("model.layers.*.self_attn.q_proj.weight", 4, True, "param"),
        ),
        ({"op_list": ["Conv", "Relu"], "fuse": True},),
    )
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qk"]
    chosen, report = encodings.apply_rules(read.rules, ["/model/Softmax"], names)
    assert chosen == {"activation": {}, "param": {name: read.rules[2] for name in names if "q_proj" in name}}
    assert report.unmatched == list(read.rules[:2]) and report.matched == [(read.rules[2], [names[0], names[2]])]
    assert str(report).splitlines()[1:] == [
        "/model/layer.0/attention/Softmax_output_0: matches no activation",
        "model.embed_tokens.weight: matches no param",
    ]


def test_overrides_of_the_articles_llama(tmp_path):
    (tmp_path / "o.json").write_text(LLAMA)
    rules = encodings.read_overrides(tmp_path / "o.json").rules
    assert rules[0] == Rule(".*Softmax.*", 16, None, "activation")
    assert rules[1] == Rule("model.layers.*.self_attn.*_proj.weight", 4, None, "param", 128)
    chosen, _ = encodings.apply_rules(rules, ["/l/Softmax_0"], ["model.layers.7.self_attn.v_proj.weight", "lm_head"])
    assert [len(side) for side in chosen.values()] == [1, 1]


def test_the_exact_name_wins_then_the_later_rule():
    rules = [Rule(p, bits, True, "param") for p, bits in (("a.w", 2), ("*.w", 4), ("a.*", 8), ("*w", 16))]
    chosen, report = encodings.apply_rules(rules, params=["a.w", "b.w", "a.x"])
    assert {name: rule.bits for name, rule in chosen["param"].items()} == {"a.w": 2, "b.w": 16, "a.x": 8}
    assert report.matched[1] == (rules[1], []) and "*.w: overruled everywhere" in str(report)


def test_merging_a_real_file():
    base = Encodings({"x": ACTIVATION, "y": ACTIVATION}, {"w": WEIGHT}, meta={"producer": 1})
    over = Encodings({"x": Encoding(16), "new": ACTIVATION}, {"v*": WEIGHT})
    merged, report = merge(base, over)
    assert {name: e.dtype for name, e in merged.activations.items()} == {"x": "float16", "y": "uint8", "new": "uint8"}
    assert merged.params == base.params and merged.meta == base.meta and base.activations["x"] is ACTIVATION
    assert [rule.pattern for rule in report.unmatched] == ["v*"]
    merged, report = merge(base, over, names=["x", "y", "w"])
    assert "new" not in merged.activations and [rule.pattern for rule in report.unmatched] == ["new", "v*"]


def test_merging_types_keeps_the_range():
    base = Encodings({"x": ACTIVATION, "f": Encoding(16)}, {"w": WEIGHT, "b": BLOCKS, "p": PRODUCT})
    rules = [Rule("x", 16, None, "activation"), Rule("f", 8, None, "activation"), Rule("w", 4, True, "param")]
    rules += [Rule("b", 8, True, "param", 4), Rule("p", 8, True, "param")]
    merged, report = merge(base, Overrides(tuple(rules)))
    assert set(report.pending) == {"f", "p"} and "f: to be calibrated" in str(report)
    x, w = merged.activations["x"], merged.params["w"]
    assert x.dtype == "uint16" and float(x.scale) == pytest.approx(5.1 / 65535)
    assert w.dtype == "int4" and w.scale == pytest.approx([1.27 / 7, 2.54 / 7])
    assert merged.params["b"].granularity == "block" and merged.params.keys() == {"w", "b"}
    assert merge(base, [Rule("w", 8, None, "param")])[0].params["w"] is WEIGHT
    assert set(merge(base, Overrides((Rule("w", 4, None, "param", 128),)))[1].pending) == {"w"}


def test_an_override_moves_a_tensor_to_its_own_side():
    merged, _ = merge(Encodings(params={"s": Encoding(8, scale=0.1)}), Encodings({"s": ACTIVATION}))
    assert merged.activations.keys() == {"s"} and not merged.params


def test_overrides_with_scales_are_read_from_any_version(tmp_path):
    for version in encodings.VERSIONS:
        write(Encodings({"x": ACTIVATION}, {"w": WEIGHT}), tmp_path / "o", version)
        rules = encodings.read_overrides(tmp_path / "o").rules
        assert [(rule.pattern, rule.kind, rule.bits) for rule in rules] == [("x", "activation", 8), ("w", "param", 8)]
        assert same(rules[1].encoding, WEIGHT)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            ARTICLE.replace('"int4"', '"int1"'),
            "param_encodings/model.layers.*.self_attn.q_proj.weight/dtype: expected a type",
        ),
        (ARTICLE.replace('"int4"', "4"), "q_proj.weight/dtype: expected a string, got 4"),
        (ARTICLE.replace("[{", "{").replace("}]}", "}}"), "supergroups: expected a list, got an object"),
        (ARTICLE.replace('"Conv"', "1"), "supergroups/0/op_list/0: expected a string, got 1"),
        (LLAMA.replace("128", "0"), "group_size: expected a whole number from 1 to"),
    ],
)
def test_bad_overrides_are_refused(text, said, tmp_path):
    (tmp_path / "o.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        encodings.read_overrides(tmp_path / "o.json")


# -- comparing -------------------------------------------------------------------------------------------------------


def test_equal_files_have_no_differences():
    for path in GOLDEN:
        read = loads(golden(path)[0])
        assert compare(read, read) == []


def test_differences_come_largest_first():
    a = Encodings({"x": ACTIVATION, "only": ACTIVATION, "z": ACTIVATION}, {"w": WEIGHT, "k": WEIGHT})
    b = Encodings({"x": replace(ACTIVATION, scale=0.04), "z": replace(ACTIVATION, zero_point=164)})
    b.params = {"w": replace(WEIGHT, bits=4), "k": Encoding(8, False, False, WEIGHT.scale, [128, 128])}
    lines = [str(difference) for difference in compare(a, b)]
    assert lines[0] == "only: encoding uint8 against none"
    assert lines[1:4] == ["w: type int8 against int4", "x: scale 0.02 against 0.04", "z: zero point 100 against 164"]
    assert lines[4:] == ["k: type int8 against uint8", "k: symmetric True against False"]
    assert [d.size for d in compare(a, b)][1:] == [4, 1, 0.25, 0, 0]


def test_other_granularity_is_the_largest_difference():
    a, b = (Encodings(params={"w": e}) for e in (WEIGHT, Encoding(8, scale=0.01)))
    assert str(compare(a, b)[0]) == "w: granularity channel (2) against tensor (1)"
    assert str(compare(a, Encodings(params={"w": Encoding(16)}))[0]) == "w: type int8 against float16"


# -- bad files -------------------------------------------------------------------------------------------------------

GOOD_0 = [
    {"min": -2.0, "max": 3.1, "scale": 0.02, "offset": -100, "bitwidth": 8, "dtype": "int", "is_symmetric": "False"}
]
GOOD_1 = {"name": "x", "dtype": "INT", "bw": 8, "is_sym": True, "scale": [0.1, 0.2], "offset": [-128, -128],
          "enc_type": "PER_CHANNEL"}  # fmt: skip
GOOD_2 = {"name": "x", "output_dtype": "uint8", "y_scale": [0.1, 0.2], "y_zero_point": [3, 4], "axis": 0}


def bad_0(**fields):
    return wrap([GOOD_0[0] | fields], "0.6.1")


def bad_1(**fields):
    return wrap(GOOD_1 | fields)


def bad_2(**fields):
    return wrap(GOOD_2 | fields, "2.0.0")


A = "activation_encodings/x"
BAD = [
    (bad_0(scale="NaN"), f"{A}/0/scale: expected a positive finite number, got 'NaN'"),
    (bad_0(scale=float("nan")), f"{A}/0/scale: expected a positive finite number, got nan"),
    (bad_0(scale=float("inf")), f"{A}/0/scale: expected a positive finite number, got inf"),
    (bad_0(scale=0.5).replace("0.5", "1e999"), f"{A}/0/scale: expected a positive finite number, got inf"),
    (bad_0(scale=0), f"{A}/0/scale: expected a positive finite number, got 0"),
    (bad_0(scale=-0.1), f"{A}/0/scale: expected a positive finite number, got -0.1"),
    (bad_0(scale=True), f"{A}/0/scale: expected a positive finite number, got True"),
    (bad_0(scale=10**400), f"{A}/0/scale: expected a positive finite number, got 1000000"),
    (bad_0(scale=[0.1]), f"{A}/0/scale: expected a positive finite number, got a list"),
    (bad_0(min=None), f"{A}/0/min: expected a finite number, got None"),
    (bad_0(min=9), f"{A}/0/max: expected at least 9.0, the min, got 3.1"),
    (bad_0(offset=-256), f"{A}/0/offset: expected a whole number from -255 to 0, got -256"),
    (bad_0(offset=-1.5), f"{A}/0/offset: expected a whole number from -255 to 0, got -1.5"),
    (bad_0(bitwidth=1), f"{A}/0/bitwidth: expected a whole number from 2 to 32, got 1"),
    (bad_0(bitwidth=33), f"{A}/0/bitwidth: expected a whole number from 2 to 32, got 33"),
    (bad_0(bitwidth="8"), f"{A}/0/bitwidth: expected a whole number from 2 to 32, got '8'"),
    (bad_0(dtype="float"), f"{A}/0/bitwidth: expected 16 or 32 for a float, got 8"),
    (bad_0(dtype="int8"), f"{A}/0/dtype: expected one of INT, FLOAT, FP, got 'int8'"),
    (bad_0(is_symmetric="perhaps"), f"{A}/0/is_symmetric: expected one of TRUE, FALSE, got 'perhaps'"),
    (bad_0(is_symmetric=1), f"{A}/0/is_symmetric: expected a string, got 1"),
    (wrap([], "0.6.1"), f"{A}: expected one entry or more, all alike"),
    (wrap([*GOOD_0, GOOD_0[0] | {"bitwidth": 16}], "0.6.1"), f"{A}: expected one entry or more, all alike"),
    (wrap({}, "0.6.1"), f"{A}: expected a list, got an object"),
    (wrap([[]], "0.6.1"), f"{A}/0: expected an object, got a list"),
    (wrap([{"bitwidth": 8, "scale": 1, "offset": 0, "max": 1}], "0.6.1"), f"{A}/0/min: is missing"),
    (wrap([{"scale": 1, "offset": 0}], "0.6.1"), f"{A}/0/bitwidth: is missing"),
    (bad_1(scale=[0.1, "0.2"]), f"{A}/scale/1: expected a positive finite number, got '0.2'"),
    (bad_1(scale=[]), f"{A}/scale: expected numbers in lists of one length, got a list"),
    (bad_1(scale=[[0.1], [0.2]]), f"{A}/scale: expected a flat list"),
    (bad_1(scale=[[0.1], [0.2, 0.3]]), f"{A}/scale: expected numbers in lists of one length, got a list"),
    (bad_1(scale=0.1), f"{A}/scale: expected a flat list"),
    (bad_1(offset=[-128]), f"{A}/offset: expected numbers in the shape (2,), got (1,)"),
    (bad_1(offset=[-128, 1]), f"{A}/offset/1: expected a whole number from -255 to 0, got 1"),
    (bad_1(offset=[-128, False]), f"{A}/offset/1: expected a whole number from -255 to 0, got False"),
    (bad_1(enc_type="PER_TENSOR"), f"{A}/scale: expected a list of one number, got a list"),
    (bad_1(enc_type="PER_ROW"),
     f"{A}/enc_type: expected one of PER_TENSOR, PER_CHANNEL, PER_BLOCK, LPBQ, got 'PER_ROW'"),
    (bad_1(enc_type="PER_BLOCK"), f"{A}/block_size: is missing"),
    (bad_1(enc_type="PER_BLOCK", block_size=0), f"{A}/block_size: expected a whole number from 1"),
    (bad_1(zero_point_shift=0.5), f"{A}/zero_point_shift: expected a whole number from 0 to 0, got 0.5"),
    (bad_1(name=3), "activation_encodings/0/name: expected a string, got 3"),
    (wrap({k: v for k, v in GOOD_1.items() if k != "is_sym"}), f"{A}/is_sym: is missing"),
    (wrap(LPBQ_1 | {"name": "x", "per_block_int_scale": [16, 8, 4, 17]}),
     f"{A}/per_block_int_scale/3: expected a whole number"),
    (wrap(LPBQ_1 | {"name": "x", "per_block_int_scale": [16, 8, 4]}),
     f"{A}: expected blocks alike for all 2 channels, got 3"),
    (wrap(LPBQ_1 | {"name": "x", "offset": [-128, -127]}), f"{A}/offset: expected -128 and is_sym"),
    (wrap(LPBQ_1 | {"name": "x", "compressed_bw": 8}),
     f"{A}/compressed_bw: expected a whole number from 2 to 7, got 8"),
    (wrap([]), "activation_encodings/0: expected an object, got a list"),
    (bad_2(output_dtype="int1"), "encodings/x/output_dtype: expected a type like int8, uint16 or float16, got 'int1'"),
    (bad_2(output_dtype="uint99"), "encodings/x/output_dtype: expected a type like"),
    (bad_2(y_zero_point=[3]), "encodings/x/y_zero_point: expected numbers in the shape (2,), got (1,)"),
    (bad_2(y_zero_point=[3, 256]), "encodings/x/y_zero_point/1: expected a whole number from 0 to 255, got 256"),
    (bad_2(axis=None), "encodings/x/axis: expected a whole number from -8 to 7, got None"),
    (bad_2(axis=99), "encodings/x/axis: expected a whole number from -8 to 7, got 99"),
    (bad_2(y_scale=[[0.1], [0.2]], y_zero_point=[[1], [2]]), "encodings/x/block_size: is missing"),
    (bad_2(y_scale=[[0.1], [0.2]], y_zero_point=[[1], [2]], block_size=2, axis=2),
     "encodings/x/axis: expected a whole number"),
    (bad_2(y_scale={"y": 1}), "encodings/x/y_scale: expected a positive finite number, got an object"),
    (wrap(LPBQ_21 | {"name": "x", "y_scale": {"x": [[1]]}}, "2.1.0"), "encodings/x/y_scale/x_scale: is missing"),
    (bad_2(block_size=4), "encodings/x/y_scale: expected lists in a list, as there are blocks, got a list"),
    (wrap(LPBQ_20 | {"name": "x", "output_dtype": "uint4"}, "2.0.0"),
     "encodings/x/output_dtype: expected a signed type"),
    (wrap(LPBQ_21 | {"name": "x", "y_scale": {"x": [[1, 2]], "x_scale": [1, 2]}}, "2.1.0"),
     "encodings/x/y_scale/x_scale: expected a number for each of 1 channels"),
    ("", "the file is empty"),
    (" \n", "the file is empty"),
    (b"\xff\xfe{}", "the file is not UTF-8 from byte 0 on"),
    ('{"version": "1.0.0", ', "the file is not JSON: "),
    ("[" * 100_000, "the file is nested too deeply"),
    ('{"a":' * 100_000, "the file is nested too deeply"),
    ("[]", "the file: expected an object, got a list"),
    ("null", "the file: expected an object, got None"),
    ("1" * 5000, "the file is not JSON: "),
    ('{"version": "3.0.0"}', "version: expected one of 0.6.1, 1.0.0, 2.0.0, 2.1.0, got '3.0.0'"),
    ('{"version": null}', "version: expected one of 0.6.1, 1.0.0, 2.0.0, 2.1.0, got None"),
    ('{"version": ["1.0.0"]}', "version: expected one of 0.6.1, 1.0.0, 2.0.0, 2.1.0, got a list"),
    ("{}", "activation_encodings: is missing"),
    ('{"activation_encodings": {}}', "param_encodings: is missing"),
    ('{"version": "2.0.0"}', "encodings: is missing"),
    ('{"version": "1.0.0", "activation_encodings": {}, "param_encodings": []}',
     "activation_encodings: expected a list"),
    ('{"version": "1.0.0", "version": "2.0.0"}', "version: stands there twice"),
    ('{"activation_encodings": {"a/b": [{"min": 0, "min": 1}]}}', "activation_encodings/a/b/0/min: stands there twice"),
    ('{"a": {"b": 1, "b": 2}, "a": 3}', "stands there twice"),
    ('{"quantizer_args": {"x": 1e999}}', "quantizer_args: holds a number that is not finite"),
    ('{"quantizer_args": [NaN]}', "quantizer_args: holds a number that is not finite"),
    (json.dumps({"version": "1.0.0", "activation_encodings": [GOOD_1] * 2, "param_encodings": []}),
     "activation_encodings/1/name: 'x' stands there twice"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD, ids=range(len(BAD)))
def test_bad_files_are_refused_in_one_line_with_the_place(text, said, tmp_path):
    with pytest.raises(ValueError) as refused:
        loads(text)
    message = str(refused.value)
    assert type(refused.value) is ValueError and said in message and "\n" not in message and len(message) < 400
    (tmp_path / "bad").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(said)):
        encodings.read(tmp_path / "bad")


def test_the_good_ones_are_good():
    assert first(wrap(GOOD_0, "0.6.1")) and first(wrap(GOOD_1)) and first(wrap(GOOD_2, "2.0.0"))
    assert first(("\ufeff" + wrap(GOOD_1)).encode()) and first("\ufeff" + wrap(GOOD_1))


def test_files_without_end_are_not_read_to_the_end(monkeypatch):
    monkeypatch.setattr(encodings, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="the file is over 512 MB"):
        encodings.read("/dev/zero")


def test_odd_names_stay_on_one_line_and_survive():
    name = 'a\nb/"\\\ud800é\x00'
    text = dumps(Encodings({name: ACTIVATION}), "1.0.0")
    assert loads(text).activations.keys() == {name}
    with pytest.raises(ValueError) as refused:
        loads(text.replace("0.02", "-1"))
    assert "\n" not in str(refused.value) and str(refused.value).encode()


def test_nothing_is_written_when_refused(tmp_path):
    path = tmp_path / "e.json"
    for bad, options in (
        (Encodings(params={"w": BLOCKS}), ("0.6.1",)),
        (Encodings({"w": ACTIVATION}, {"w": ACTIVATION}), ("2.0.0",)),
        (Encodings(), ("3.0.0",)),
        (Encodings(), ("1.0.0", "snpe")),
        (Encodings(meta={"a": {1}}), ("1.0.0",)),
        (Encodings(meta={"a": float("nan")}), ("1.0.0",)),
    ):
        with pytest.raises(ValueError) as refused:
            write(bad, path, *options)
        assert "\n" not in str(refused.value) and list(tmp_path.iterdir()) == []


def test_ten_thousand_broken_files_load_or_are_refused_in_one_line():
    rng = random.Random(0)
    whole = Encodings(
        {"x": ACTIVATION, "f": Encoding(16)}, {"w": WEIGHT, "b": BLOCKS, "p": PRODUCT}, meta={"producer": {}}
    )
    plain = Encodings({"x": ACTIVATION, "f": Encoding(16)}, {"w": WEIGHT}, meta={"quantizer_args": {"bits": 8}})
    seeds = [dumps(plain if v == "0.6.1" else whole, v, f).replace(" ", "").replace("\n", "") for v, f in WRITABLE]
    odd = ["null", "true", "[]", "{}", "[[]]", '""', '"x"', "-1", "0", "1e999", "1e-400", "NaN", "-Infinity", "99",
           '"int4"', "1e400", "9" * 400, "0.5", '{"x":1}', "[[1],[1,2]]",
           "[" * 50 + "1" + "]" * 50, '"\\ud800"']  # fmt: skip
    refused = 0
    for i in range(10_000):
        text, kind = rng.choice(seeds), i % 4
        start = rng.randrange(len(text))
        if kind == 0:
            raw = bytearray(text.encode())
            for _ in range(rng.randint(1, 3)):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            text = bytes(raw)
        elif kind == 1:
            text = text[:start] + text[start + rng.randint(1, 30) :]
        elif kind == 2:
            value = rng.choice(list(re.finditer(r'(?<=[:\[,])(?:"[^"]*"|-?\d[\d.e-]*|true|false|\[[^][]*\])', text)))
            text = text[: value.start()] + rng.choice(odd) + text[value.end() :]
        else:
            key = rng.choice(list(re.finditer(r'"\w+"(?=:)', text)))
            text = (
                text[: key.start()]
                + rng.choice(['"zzz"', '"scale"', '"axis"', '"name"', '"y_scale"'])
                + text[key.end() :]
            )
        try:
            read = loads(text)  # anything but a ValueError ends the test
        except ValueError as error:
            refused += 1
            assert type(error) is ValueError and "\n" not in str(error) and len(str(error)) < 600, text
        else:
            again = loads(dumps(read, version := read.version or "0.6.1"), params=read.params)
            kept = {
                name for name, e in (read.activations | read.params).items() if version[0] != "2" or e.scale is not None
            }
            assert kept == {*again.activations, *again.params}, text
    assert 5_000 < refused < 10_000


def test_nothing_drifts_on_the_way_through_many_files():
    encoding = Encoding.from_qparams(choose_qparams(tensor(5), Grid(8, True, True)))
    first_text = text = dumps(Encodings(params={"w": encoding}), "0.6.1")
    for version, flavour in WRITABLE * 2:
        text = dumps(loads(text), version, flavour)
    assert dumps(loads(text), "0.6.1") == first_text
    assert isinstance(loads(text).params["w"].qparams(), QParams)
