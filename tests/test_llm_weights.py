"""Checkpoints quantized tensor by tensor: held against `affine` and ONNX, against kills, and against bad files."""

import dataclasses
import importlib.util
import itertools
import json
import os
import pickle
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import joblib
import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

from qtools import affine, cli, encodings
from qtools.affine import LPBQ
from qtools.llm import _tensor, weights
from qtools.llm._pack import pack
from qtools.llm.checkpoint import Config
from qtools.llm.evaluate import quantized
from qtools.llm.formats import SCHEMES, Format
from qtools.llm.llama import Llama, Taps
from qtools.llm.weights import load_packed, quantize
from qtools.ptq import rounding

FORMATS = ("int4 g128", "uint4 g32", "int4 g7", "int8 channel", "uint8 g64", "int4 tensor", "uint4 tensor bfloat16")
FORMATS += ("int4 g32 lpbq", "int4 channel float16", "int8 tensor", "int4 g16 lpbq float16", "uint8 channel")
DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
W = "model.layers.0.mlp.up_proj.weight"


def random(*shape: int, seed: int = 0, dtype: type = np.float16) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(dtype)


def matrix(folder: Path, x: np.ndarray, text: str, **more: object) -> weights.Packed:
    """One matrix, there and back."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({W: x}, folder / "x.safetensors")
    shutil.rmtree(folder / "out", ignore_errors=True)
    quantize(folder / "x.safetensors", folder / "out", {"*": text}, **more)
    return load_packed(folder / "out")


def model(folder: Path, shards: int = 2) -> Path:
    """A small checkpoint as Hugging Face lays it out."""
    folder.mkdir(parents=True)
    tensors = {
        "model.embed_tokens.weight": random(50, 64),
        "model.norm.weight": random(64),
        "lm_head.weight": random(50, 64),
    }
    for layer in range(3):
        shapes = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
        for i, (name, shape) in enumerate(shapes.items()):
            tensors[f"model.layers.{layer}.{name}.weight"] = random(
                *shape, seed=7 * layer + i, dtype=ml_dtypes.bfloat16
            )
    tensors["model.layers.0.self_attn.rotary_emb.steps"] = np.arange(9)
    where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: x for name, x in tensors.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps("code"))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def plain(encoding: affine.QParams | LPBQ) -> affine.QParams:
    return encoding.qparams if isinstance(encoding, LPBQ) else encoding


# -- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("text", FORMATS)
def test_codes_are_those_of_affine(tmp_path: Path, text: str, kind: str) -> None:
    x = random(37, 75, dtype=DTYPES[kind])
    packed, form = matrix(tmp_path, x, text), Format.parse(text)
    chosen = plain(packed.qparams(W))
    wide = x.astype(np.float32)
    np.testing.assert_array_equal(packed.codes(W), affine.quantize(wide, chosen))
    np.testing.assert_array_equal(packed[W], affine.dequantize(packed.codes(W), chosen))
    if form.lpbq:
        found = affine.choose_lpbq(wide, form.grid)
        np.testing.assert_array_equal(packed.qparams(W).block_scale, found.block_scale)
        wanted = found.channel_scale
        scale = packed.qparams(W).channel_scale
    else:
        found = affine.choose_qparams(wide, form.grid)
        np.testing.assert_array_equal(chosen.zero_point, found.zero_point)
        wanted, scale = found.scale, chosen.scale
    stored = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[form.scale]
    np.testing.assert_array_equal(scale, wanted.astype(stored).astype(np.float32))


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(2, 40)),
    kind=st.sampled_from(list(DTYPES)),
    exponent=st.integers(-24, 3),
    text=st.sampled_from(["int4 g5 float32", "uint4 g4 float32", "int8 channel", "uint8 g3 float32", "int4 tensor"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_matrix_gives_the_codes_of_affine(tmp_path_factory, shape, kind, exponent, text, seed) -> None:
    x = (np.random.default_rng(seed).normal(size=shape) * 2.0**exponent).astype(DTYPES[kind])
    x[np.random.default_rng(seed).random(shape) < 0.2] = 0
    packed = matrix(tmp_path_factory.mktemp("any"), x, text)
    codes, chosen = affine.choose_and_quantize(x.astype(np.float32), Format.parse(text).grid)
    np.testing.assert_array_equal(packed.codes(W), codes)
    np.testing.assert_array_equal(packed.qparams(W).scale, chosen.scale)


@pytest.mark.parametrize(
    "text", ["int4 g32 float32", "uint4 g32 float32", "int4 g64 lpbq", "int8 g32 float32", "uint8 g16 float32"]
)
def test_onnx_reads_the_stored_bytes_as_the_same_numbers(tmp_path: Path, text: str) -> None:
    packed, form = matrix(tmp_path, random(24, 128), text), Format.parse(text)
    stored, chosen = load_file(tmp_path / "out/x.safetensors"), plain(packed.qparams(W))
    kind = getattr(TensorProto, text.split()[0].upper())
    zero_point = chosen.zero_point.astype(np.uint8)
    initial = [
        helper.make_tensor("codes", kind, (24, 128), stored[f"{W}.codes"].tobytes(), raw=True),
        helper.make_tensor("scale", TensorProto.FLOAT, chosen.scale.shape, chosen.scale.tobytes(), raw=True),
        helper.make_tensor(
            "zero", kind, zero_point.shape, (pack(zero_point) if form.bits == 4 else zero_point).tobytes(), raw=True
        ),
    ]
    node = helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"], axis=1, block_size=form.group)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, (24, 128))
    graph = helper.make_graph([node], "g", [], [output], initial)
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(network)
    np.testing.assert_array_equal(ReferenceEvaluator(network).run(None, {})[0], packed[W])
    if not form.symmetric:
        np.testing.assert_array_equal(stored[f"{W}.zero_point"].tobytes(), initial[2].raw_data)


@pytest.mark.parametrize("text", FORMATS)
def test_encodings_mean_the_same_numbers(tmp_path: Path, text: str) -> None:
    packed = matrix(tmp_path, random(20, 160), text)
    found = encodings.read(tmp_path / "out/encodings.json", params=[W])
    assert found.version == "2.0.0" and list(found.params) == [W]
    read, chosen = found.params[W].qparams((20, 160)), packed.qparams(W)
    assert isinstance(read, LPBQ) == isinstance(chosen, LPBQ)
    np.testing.assert_array_equal(affine.dequantize(packed.codes(W), plain(read)).astype(np.float32), packed[W])


def test_a_folder_keeps_all_that_is_not_quantized(tmp_path: Path) -> None:
    source, output = model(tmp_path / "in"), tmp_path / "deep/out"
    found = quantize(source, output, SCHEMES["w4"])
    before = {name: x for path in source.glob("*.safetensors") for name, x in load_file(path).items()}
    packed = load_packed(output)
    assert set(packed) == set(before) and len(packed) == len(before) == 13
    assert {name for name in before if name not in packed.formats} == {n for n in before if "norm" in n or "steps" in n}
    for name, x in before.items():
        if name not in packed.formats:
            assert packed[name].dtype == x.dtype and packed[name].tobytes() == x.tobytes()
        else:
            assert packed[name].shape == x.shape
            assert np.abs(packed[name] - x.astype(np.float32)).max() <= 0.51 * plain(packed.qparams(name)).scale.max()
    names = {path.name for path in source.iterdir()} - {"pytorch_model.bin"} | {"quantization.json", "encodings.json"}
    assert {path.name for path in output.iterdir()} == names
    assert (output / "tokenizer.model").read_bytes() == b"\x00\x01"
    index = json.loads((output / "model.safetensors.index.json").read_text())
    for file in output.glob("*.safetensors"):  # read by the library itself, every part at a place that suits its type
        assert set(load_file(file)) == {name for name, where in index["weight_map"].items() if where == file.name}
    assert (
        index["metadata"]["total_size"]
        == found.written
        == sum(x.nbytes for file in output.glob("*.safetensors") for x in load_file(file).values())
    )
    assert found.tensors == 11 and found.read == sum(x.nbytes for x in before.values())


def test_bits_count_all_that_is_stored(tmp_path: Path) -> None:
    save_file({W: random(64, 256)}, tmp_path / "x.safetensors")
    wanted = {
        "int4 g128": 4.125,
        "uint4 g32": 4 + 20 / 32,
        "int4 g32 lpbq": 4 + 4 / 32 + 32 / 256,
        "int8 channel": 8.125,
    }
    for text, bits in wanted.items():
        assert quantize(tmp_path / "x.safetensors", tmp_path / text, {"*": text}).bits == bits


def test_parts_lie_at_multiples_of_their_size(tmp_path: Path) -> None:
    save_file({"a": random(3, 5), "b": random(3, 3), "c": random(4, 6), "d": np.zeros(3)}, tmp_path / "x.safetensors")
    quantize(
        tmp_path / "x.safetensors", tmp_path / "out", {"a": "int4 g2", "b": "uint4 g2 float32", "c": "int4 g2 lpbq"}
    )
    raw = (tmp_path / "out/x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    sizes = {"U8": 1, "F16": 2, "F32": 4, "F64": 8}
    del header["__metadata__"]
    assert len(header) == 9
    assert all((8 + length + one["data_offsets"][0]) % sizes[one["dtype"]] == 0 for one in header.values())


def test_a_name_beats_patterns_and_later_patterns_earlier_ones(tmp_path: Path) -> None:
    tensors = {f"{i}.{name}": random(4, 8) for i in range(2) for name in ("q", "[k]")}
    save_file(tensors, tmp_path / "x.safetensors")
    scheme = {"0.q": "int4 g4", "*": "int8 channel", "*.[k]": "keep", "1.*": "uint4 tensor"}
    quantize(tmp_path / "x.safetensors", tmp_path / "out", scheme)
    found = {name: str(form).split()[0] for name, form in load_packed(tmp_path / "out").formats.items()}
    assert found == {"0.q": "int4", "1.q": "uint4", "1.[k]": "uint4"}


def test_formats_are_words() -> None:
    for text in FORMATS:
        assert Format.parse(str(Format.parse(text))) == Format.parse(text)
    for text in (
        "",
        "int5",
        "int4 g0",
        "int4 g1",
        "int4 g4 channel",
        "uint4 g4 lpbq",
        "int4 lpbq",
        "int4 g4 g4",
        "g4 int4",
        "int4 x",
    ):
        with pytest.raises(ValueError):
            Format.parse(text)


def test_scales_too_small_or_large_for_their_type(tmp_path: Path) -> None:
    x = np.array([[1e-9, 0, 0, 0], [4e5, 0, 0, 1]], np.float32)
    assert matrix(tmp_path, x[:1], "int4 g4").qparams(W).scale == np.float32(2.0**-24)
    np.testing.assert_array_equal(matrix(tmp_path, x, "int4 g4 bfloat16")[W] == 0, [[False, 1, 1, 1], [0, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"a scale of 5.714e\+04 is beyond float16|beyond float16"):
        matrix(tmp_path, x * 10, "int4 g4")


# -- interruptions ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As sudden as a signal, but for this process."""


def test_a_kill_at_any_step_changes_no_byte(tmp_path: Path, tmp_path_factory, monkeypatch) -> None:
    source, scheme = tmp_path / "in", {"a*": "int4 g16", "b": "int4 g16 lpbq"}
    source.mkdir()
    save_file(
        {"a1": random(8, 64), "a2": random(9, 33), "b": random(4, 64), "c": random(7)}, source / "model.safetensors"
    )
    (source / "config.json").write_text("{}")
    quantize(source, tmp_path / "whole", scheme)
    wanted, steps, last = content(tmp_path / "whole"), itertools.count(), -1

    def dying(function: Callable) -> Callable:
        def call(*args: object, **more: object) -> object:
            if next(steps) == last:
                raise Killed
            return function(*args, **more)

        return call

    for module, name in (
        (_tensor.zlib, "crc32"), (os, "fsync"), (os, "replace"), (os, "chmod"), (os, "rmdir"), (shutil, "copyfile"),
        (shutil, "rmtree"), (json, "dumps"), (weights, "replace_file"), (weights, "replace_json"), (weights, "_finish"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    killed = True
    while killed:
        if (tmp_path / "out").exists():
            (tmp_path / "out").rename(tmp_path_factory.mktemp("old") / "out")
        last, steps, killed = last + 1, itertools.count(), False
        try:
            quantize(source, tmp_path / "out", scheme)
        except Killed:
            killed = True
            quantize(source, tmp_path / "out", scheme)
        assert content(tmp_path / "out") == wanted
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]
    assert last > 30


def recipe() -> object:
    """The module that measures a checkpoint of 7 billion weights."""
    folder = Path(weights.__file__).parents[2] / "data/recipes"
    spec = importlib.util.spec_from_file_location("llama7b", folder / "llama7b.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_the_command_killed_three_times_gives_the_same_bytes(tmp_path: Path) -> None:
    sizes = {"layers": 12, "hidden": 512, "inner": 1376, "vocab": 16000}
    tools = recipe()
    assert tools.checkpoint(tmp_path / "in", sizes) == 2 * 54_342_144  # less than a hundredth of Llama 2 7B
    memory = tools.run(tmp_path / "in", tmp_path / "whole")
    parts = tools.killed(tmp_path / "in", tmp_path / "out")
    assert len(parts) == 3 and all(0 < part <= 1 for part in parts)
    assert tools.digests(tmp_path / "out") == tools.digests(tmp_path / "whole")
    assert memory < 400 << 20


def test_the_shapes_of_the_recipe_are_those_of_llama_2_7b() -> None:
    tools = recipe()
    assert sum(int(np.prod(shape)) for _, shape in tools.shapes(**tools.LLAMA_2_7B)) == 6_738_415_616


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    save_file({W: np.zeros((8192, 4096), np.float16)}, tmp_path / "x.safetensors")  # 64 MB
    tracemalloc.start()
    try:
        quantize(tmp_path / "x.safetensors", tmp_path / "out", {"*": "int4 g128"})
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def interrupted(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run leaves that was killed before its end."""
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            quantize(source, output, SCHEMES["w4"])
    return output.parent / f".{output.name}.partial"


@pytest.mark.parametrize("harm", ["torn", "zeros", "lost", "flipped", "shorter", "litter"])
def test_damage_to_what_a_killed_run_left_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    source = model(tmp_path / "in")
    quantize(source, tmp_path / "whole", SCHEMES["w4"])
    work = interrupted(source, tmp_path / "out", monkeypatch)
    journal, file = work / "journal", sorted((work / "model").glob("*.safetensors"))[0]
    raw = file.read_bytes()
    {
        "torn": lambda: journal.write_bytes(journal.read_bytes()[:-5]),
        "zeros": lambda: journal.write_bytes(journal.read_bytes()[:120] + bytes(300)),
        "lost": file.unlink,
        "flipped": lambda: file.write_bytes(raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:]),
        "shorter": lambda: file.write_bytes(raw[:900]),
        "litter": lambda: (work / "model/.quantization.json.x").write_text("half"),
    }[harm]()
    quantize(source, tmp_path / "out", SCHEMES["w4"])
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_work_that_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = model(tmp_path / "in"), tmp_path / "out"
    interrupted(source, output, monkeypatch)
    monkeypatch.setattr(weights, "run", lambda task: pytest.fail(f"{task.name} was done again"))
    first = quantize(source, output, SCHEMES["w4"])
    assert quantize(source, output, SCHEMES["w4"]) == first  # and what is finished is not begun again


def test_what_another_job_left_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = model(tmp_path / "in"), tmp_path / "out"
    work = interrupted(source, output, monkeypatch)
    with pytest.raises(ValueError, match="another run has left"):
        quantize(source, output, SCHEMES["w8"])
    assert work.is_dir()
    quantize(source, output, SCHEMES["w4"])
    with pytest.raises(ValueError, match="exists already"):
        quantize(source, output, SCHEMES["w8"])
    os.utime(source / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="exists already"):
        quantize(source, output, SCHEMES["w4"])


# -- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["threading", "loky"])
def test_two_workers_write_the_same(tmp_path: Path, where: str) -> None:
    source = model(tmp_path / "in")
    quantize(source, tmp_path / "alone", SCHEMES["w4"])
    with joblib.parallel_config(where, n_jobs=2):
        quantize(source, tmp_path / "two", SCHEMES["w4"])
    assert content(tmp_path / "two") == content(tmp_path / "alone")


@pytest.mark.filterwarnings("default")  # of Dask's own making
def test_a_cluster_writes_the_same(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="dask and distributed are not installed")
    source = model(tmp_path / "in")
    quantize(source, tmp_path / "alone", SCHEMES["w4"])
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        quantize(source, tmp_path / "cluster", SCHEMES["w4"])
    assert content(tmp_path / "cluster") == content(tmp_path / "alone")


def test_progress_counts_the_bytes_that_were_read(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    quantize(model(tmp_path / "in"), tmp_path / "out", SCHEMES["w4"], progress=True)
    assert "100%" in (said := capfd.readouterr().err) and "B/s" in said


# -- moments ---------------------------------------------------------------------------------------------------------


def moments(columns: int, seed: int = 0) -> np.ndarray:
    """Of inputs that depend on each other, some of them large."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(500, columns)) @ draw.normal(size=(columns, columns)) * draw.lognormal(size=columns)
    return (x.T @ x / len(x)).astype(np.float32)


def test_looking_at_the_outputs_lowers_their_error(tmp_path: Path) -> None:
    x, gram = random(24, 80, dtype=np.float32), moments(80)
    save_file({W: gram}, tmp_path / "moments.safetensors")
    for kind in ("int4 g32", "uint4 g32", "int4 g16 lpbq", "int4 channel"):
        errors = []
        for method in ("nearest", "clip", "gptq", "descent"):
            packed = matrix(tmp_path, x, f"{kind} {method}", moments=tmp_path / "moments.safetensors")
            missed = packed[W] - x
            errors.append(((missed @ gram) * missed).sum())
        assert errors[1] < errors[0] and errors[2] < 0.6 * errors[1] and errors[3] < errors[2], (kind, errors)


def test_clipping_is_the_best_of_all_factors_tried_one_by_one(tmp_path: Path) -> None:
    x, gram = random(3, 8, dtype=np.float32), moments(8)
    save_file({W: gram}, tmp_path / "moments.safetensors")
    packed = matrix(tmp_path, x, "int4 g4 float32 clip", moments=tmp_path / "moments.safetensors")
    for row, first in itertools.product(range(3), (0, 4)):
        part, costs = [float(v) for v in x[row, first : first + 4]], {}
        for clip in (c for c in rounding.CLIPS if c <= 1):
            scale = max(abs(v) for v in part) * clip / 7
            missed = [max(-8, min(7, round(v / scale))) * scale - v for v in part]
            costs[scale] = sum(
                missed[i] * missed[j] * float(gram[first + i, first + j]) for i in range(4) for j in range(4)
            )
        assert plain(packed.qparams(W)).scale[row, first // 4] == pytest.approx(min(costs, key=costs.get), rel=1e-5)


@pytest.mark.parametrize(
    ("gram", "said"),
    [
        (None, "only with moments"),
        (moments(7), "are F32 of shape"),
        (moments(8).astype(np.float16), "are F16 of shape"),
        (np.full((8, 8), np.nan, np.float32), "no mean products"),
        (-moments(8), "no mean products"),
        (np.triu(moments(8)), "no mean products"),
    ],
)
def test_moments_that_do_not_fit(tmp_path: Path, gram: np.ndarray | None, said: str) -> None:
    save_file({"other" if gram is None else W: moments(8) if gram is None else gram}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=said):
        matrix(tmp_path, random(4, 8), "int4 g4 gptq", moments=tmp_path / "m.safetensors")


def tiny() -> Llama:
    sizes = {"vocab_size": 20, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    config = Config.model_validate({"model_type": "llama", **sizes, **heads})
    generator = torch.Generator().manual_seed(0)
    return Llama(config, {n: torch.randn(shape, generator=generator) * 0.3 for n, shape in config.shapes().items()})


def test_moments_are_those_of_what_the_layers_read(tmp_path: Path) -> None:
    llama, ids, seen = tiny(), torch.arange(3 * 8).reshape(3, 8) % 20, {}
    weights.write_moments(llama, ids, tmp_path / "m.safetensors")

    def look(name: str, x: torch.Tensor) -> torch.Tensor:
        seen.setdefault(name, []).extend(x.double().reshape(-1, x.shape[-1]).numpy())
        return x

    llama(ids[:, :-1], Taps(input=look))
    found = load_file(tmp_path / "m.safetensors")
    assert set(found) == set(llama.linears())
    for name, rows in seen.items():
        products = sum(np.outer(row, row) for row in rows) / len(rows)
        np.testing.assert_allclose(found[name], products, rtol=1e-4, atol=1e-5 * np.abs(products).max())


def test_packed_weights_run_as_quantized_ones(tmp_path: Path) -> None:
    llama, ids = tiny(), torch.arange(16).reshape(2, 8)
    save_file({name: weight.numpy() for name, weight in llama.weights.items()}, tmp_path / "x.safetensors")
    quantize(tmp_path / "x.safetensors", tmp_path / "out", {"*_proj.weight": "int4 g16 float32"})
    packed = {name: torch.tensor(weight) for name, weight in load_packed(tmp_path / "out").items()}
    grid = affine.Grid(4, signed=True, symmetric=True, block_size=(1, 16))
    torch.testing.assert_close(Llama(llama.config, packed)(ids), quantized(llama, grid)(ids), rtol=0, atol=0)


# -- bad input -------------------------------------------------------------------------------------------------------


def _index(content: object) -> Callable[[Path], object]:
    return lambda source: (source / "model.safetensors.index.json").write_text(json.dumps(content))


def _spoil(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda source: (source / name).write_bytes(change((source / name).read_bytes()))


def _with(**tensors: np.ndarray) -> Callable[[Path], object]:
    def change(source: Path) -> None:
        shutil.rmtree(source)
        source.mkdir()
        save_file(tensors, source / "model.safetensors")

    return change


def _only_pickles(source: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()


SHARD = "model-00001-of-00002.safetensors"
BAD = {
    "config": (_spoil("config.json", lambda raw: raw[:-3]), "is not JSON"),
    "config of a list": (_spoil("config.json", lambda raw: b"[]"), "no object"),
    "shard lost": (lambda source: (source / SHARD).unlink(), "is missing"),
    "shard truncated": (_spoil(SHARD, lambda raw: raw[:-9]), "no whole safetensors file"),
    "shard longer": (_spoil(SHARD, lambda raw: raw + b"x"), "no whole safetensors file"),
    "shard empty": (_spoil(SHARD, lambda raw: b""), "no whole safetensors file"),
    "header": (_spoil(SHARD, lambda raw: raw[:9] + b"!" + raw[10:]), "no whole safetensors file"),
    "index torn": (_spoil("model.safetensors.index.json", lambda raw: raw[:-9]), "is not JSON"),
    "index without map": (_index({}), "no weight_map"),
    "index of numbers": (_index({"weight_map": {"a": 1}}), "no weight_map"),
    "index escapes": (_index({"weight_map": {"a": "../x.safetensors"}}), "no safetensors file beside"),
    "index is absolute": (_index({"weight_map": {"a": "/etc/x.safetensors"}}), "no safetensors file beside"),
    "index escapes on Windows": (_index({"weight_map": {"a": "..\\x.safetensors"}}), "no safetensors file beside"),
    "index names pickles": (_index({"weight_map": {"a": "pytorch_model.bin"}}), "a pickle"),
    "index names others": (_index({"weight_map": {"a": SHARD}}), "do not agree"),
    "no index": (lambda source: (source / "model.safetensors.index.json").unlink(), "2 safetensors files"),
    "only pickles": (_only_pickles, "a pickle"),
    "nothing": (lambda source: [path.unlink() for path in source.iterdir()], "no safetensors file"),
    "no folder": (shutil.rmtree, "neither a folder"),
    "NaN": (_with(**{W: np.array([[1, np.nan]], np.float16)}), "NaN or infinity"),
    "infinity": (_with(**{W: np.array([[1, -np.inf]], np.float32)}), "NaN or infinity"),
    "vector": (_with(**{W: random(8)}), "only a matrix"),
    "integers": (_with(**{W: np.ones((2, 2), np.int32)}), "only a matrix"),
    "doubles": (_with(**{W: np.ones((2, 2))}), "only a matrix"),
    "no rows": (_with(**{W: np.ones((0, 2), np.float32)}), "only a matrix"),
    "part of that name": (_with(**{W: random(2, 2), f"{W}.scale": random(2)}), "already"),
    "nothing to quantize": (_with(norm=random(8)), "quantizes no tensor"),
}


@pytest.mark.parametrize("change, said", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path: Path, change: Callable, said: str, capsys) -> None:
    source = model(tmp_path / "in")
    change(source)
    with pytest.raises(ValueError, match=said) as raised:
        quantize(source, tmp_path / "out", SCHEMES["w4"])
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"] * source.exists()
    assert cli.main(["llm", "quantize", str(source), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_output_and_source_do_not_lie_in_each_other(tmp_path: Path) -> None:
    source = model(tmp_path / "a/b")
    (tmp_path / "link").symlink_to(source)
    for output in (source / "out", tmp_path / "link/out", source, tmp_path / "a"):
        with pytest.raises(ValueError, match=r"must not lie in each other|exists already"):
            quantize(source, output, SCHEMES["w4"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no folder"):
        quantize(source, tmp_path / "file/out", SCHEMES["w4"])
    assert not list(tmp_path.rglob(".*.partial")) and not (source / "out").exists()


def test_a_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(ValueError, match=r"and there are 0\.00 GB free"):
        quantize(model(tmp_path / "in"), tmp_path / "out", SCHEMES["w4"])


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({W: random(8, 8)}, tmp_path / "x.safetensors")
    stored = weights.read_checkpoint(tmp_path / "x.safetensors")[1][W]
    os.truncate(tmp_path / "x.safetensors", stored.start + 7)
    with pytest.raises(ValueError, match="has become shorter"):
        list(stored.chunks())


def test_schemes_that_fit_nothing(tmp_path: Path) -> None:
    save_file({W: random(8, 8)}, tmp_path / "x.safetensors")
    for scheme, said in (
        ({"w": "int4 g4"}, "no such tensor"),
        ({"*": "int3"}, "no format"),
        ({"*": "int4 g8 lpbq"}, "two blocks"),
    ):
        with pytest.raises(ValueError, match=said):
            quantize(tmp_path / "x.safetensors", tmp_path / "out", scheme)


def test_damaged_packed_weights(tmp_path: Path) -> None:
    packed = matrix(tmp_path, random(8, 64), "int4 g32")
    file = tmp_path / "out/x.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 16]))
    with pytest.raises(ValueError, match="not those that were written"):
        packed[W]
    save_file({"other": random(3)}, file)
    with pytest.raises(ValueError, match="lacks the tensor"):
        load_packed(tmp_path / "out")
    for text in ("", "[]", "{}", '{"tensors": {"a": {"format": "int3"}}}'):
        (tmp_path / "out/quantization.json").write_text(text)
        with pytest.raises(ValueError, match="no folder of packed weights"):
            load_packed(tmp_path / "out")


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_takes_schemes_and_rules(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = model(tmp_path / "in")
    (tmp_path / "scheme.json").write_text('{"*_proj.weight": "uint4 g16"}')
    call = ["llm", "quantize", str(source), "--jobs", "2"]
    rules = ["--rule", "*.0.*=keep", "--rule", "lm_head.weight=int8 channel"]
    assert cli.main([*call, str(tmp_path / "a"), "--scheme", str(tmp_path / "scheme.json"), *rules]) == 0
    assert capsys.readouterr().out.startswith("7 tensors at 5.")
    assert cli.main([*call, str(tmp_path / "b"), "--scheme", "article"]) == 0
    found = load_packed(tmp_path / "b").formats
    kinds = {name.split(".")[-2]: str(form).split()[:2] for name, form in found.items()}
    assert kinds["q_proj"] == ["int4", "g128"] and kinds["up_proj"] == kinds["lm_head"] == ["int8", "channel"]
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    capsys.readouterr()
    for wrong in (["--scheme", "w5"], ["--rule", "x"], ["--rule", "*=int5"], ["--rule", "nobody=keep"],
                  ["--scheme", str(tmp_path / "torn.json")], ["--scheme", str(tmp_path / "list.json")]):  # fmt: skip
        assert cli.main([*call, str(tmp_path / "c"), *wrong]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_encodings_too_large_for_any_reader_are_left_out(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(weights, "_MOST_SCALES", 10)
    assert cli.main(["llm", "quantize", str(model(tmp_path / "in")), str(tmp_path / "out")]) == 0
    assert "no encodings.json" in capsys.readouterr().out and not (tmp_path / "out/encodings.json").exists()
    assert dataclasses.asdict(load_packed(tmp_path / "out").formats["lm_head.weight"])["bits"] == 8
