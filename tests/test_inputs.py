"""Input lists: what is read is what the files hold, and whatever is wrong with a line is said in one sentence."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qtools.ptq.inputs import input_shapes, read_input_list


def network(**inputs: tuple[int, tuple | None]) -> onnx.ModelProto:
    entries = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = [helper.make_node("Identity", [entries[0].name], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "g", entries, [output]))


ONE = network(x=(TensorProto.FLOAT, (1, 2, 3)))
TWO = network(ids=(TensorProto.INT64, (1, 4)), mask=(TensorProto.FLOAT, (2,)))
VALUES = np.arange(6, dtype="<f4").reshape(1, 2, 3) - 2.5


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few raw tensors; the current one is another."""
    (tmp_path / "elsewhere").mkdir()
    (folder := tmp_path / "calibration").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    VALUES.tofile(folder / "a.raw")
    (2 * VALUES).tofile(folder / "b.raw")
    np.array([3, 1, 2, 0], "<f4").tofile(folder / "ids.raw")
    np.array([0.5, 1], "<f4").tofile(folder / "mask.raw")
    return folder


def read(folder: Path, text: str | bytes, model: onnx.ModelProto = ONE):
    (folder / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_input_list(folder / "list.txt", model)


def test_a_sample_is_a_line_and_other_tools_lines_are_skipped(folder: Path) -> None:
    samples = read(folder, "#out1 out2\n%y\n\n  a.raw  \r\nx:=b.raw\n # more\n")
    assert len(samples) == 2
    assert [list(sample) for sample in samples] == [["x"], ["x"]]
    assert np.array_equal(samples[0]["x"], VALUES) and samples[0]["x"].dtype == np.float32
    assert np.array_equal(samples[-1]["x"], 2 * VALUES)
    assert np.array_equal(samples[1:][0]["x"], 2 * VALUES) and len(samples[:1]) == 1
    with pytest.raises(IndexError):
        samples[2]


def test_several_inputs_on_a_line_in_any_order_as_the_types_of_the_network(folder: Path) -> None:
    (sample,) = read(folder, "mask:=mask.raw   ids:=ids.raw\n", TWO)
    assert sample["ids"].dtype == np.int64 and sample["ids"].tolist() == [[3, 1, 2, 0]]
    assert sample["mask"].dtype == np.float32 and sample["mask"].tolist() == [0.5, 1]


def test_files_are_found_from_the_current_folder_then_from_that_of_the_list(folder: Path) -> None:
    absolute = read(folder, f"{folder / 'b.raw'}\n")[0]["x"]
    assert np.array_equal(absolute, 2 * VALUES)
    Path("a.raw").write_bytes((7 * VALUES).tobytes())
    assert np.array_equal(read(folder, "a.raw")[0]["x"], 7 * VALUES)
    assert np.array_equal(read(folder, "../calibration/b.raw")[0]["x"], 2 * VALUES)


def test_a_mark_of_the_byte_order_is_no_part_of_a_name(folder: Path) -> None:
    assert len(read(folder, b"\xef\xbb\xbfa.raw\n")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no sample"),
        ("# only\n%comments\n\n", "names no sample"),
        ("a.raw\nc.raw", "line 2: no such file: 'c.raw'"),
        ("../calibration", "line 1: a folder, not a file: '../calibration'"),
        ("my file.raw", "line 1: paths in an input list hold no blanks, and several inputs need NAME:=FILE each"),
        ("z:=a.raw", "'z:=a.raw' is not NAME:=FILE with one of the inputs x"),
        ("x:=a.raw x:=b.raw", "the input 'x' is given twice"),
        (":=a.raw", "is not NAME:=FILE with one of the inputs x"),
        ("x:=", "'x:=' is not NAME:=FILE"),
        (b"\xff\xfe\x00\x01", "is not a text file: an input list names one sample a line"),
        (b"a.raw\0", "is not a text file"),
    ],
)
def test_a_wrong_list_is_told_in_one_sentence(folder: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError) as error:
        read(folder, text)
    assert message in str(error.value) and "list.txt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ids.raw", "the network has 2 inputs, so each needs its name: ids:=file"),
        ("ids:=ids.raw", "no file for the input 'mask'"),
        ("ids:=ids.raw mask.raw", "'mask.raw' is not NAME:=FILE with one of the inputs ids, mask"),
    ],
)
def test_several_inputs_are_all_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(folder, text, TWO)


def test_a_file_holds_what_its_input_takes(folder: Path) -> None:
    (folder / "short.raw").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"short.raw has 4 bytes; the input 'x' of shape \(1, 2, 3\) takes 24 as raw"):
        read(folder, "short.raw")[0]
    for bad in (np.nan, np.inf):
        np.full(6, bad, "<f4").tofile(folder / "bad.raw")
        with pytest.raises(ValueError, match=r"bad.raw holds NaN or infinity"):
            read(folder, "bad.raw")[0]
    np.array([0.5, 1, 2, 3], "<f4").tofile(folder / "half.raw")
    with pytest.raises(ValueError, match=r"half.raw holds numbers that are none of the int64 that the input 'ids' ta"):
        read(folder, "ids:=half.raw mask:=mask.raw", TWO)[0]
    np.arange(4, dtype=np.int64).tofile(folder / "native.raw")
    with pytest.raises(ValueError, match=r"native.raw has 32 bytes; .* takes 16 as raw float32"):
        read(folder, "ids:=native.raw mask:=mask.raw", TWO)[0]


@pytest.mark.parametrize("shape", [("n", 3), (0, 3), None])
def test_an_input_without_a_fixed_shape_is_told_how_to_fix_it(folder: Path, shape: tuple | None) -> None:
    with pytest.raises(ValueError, match=r"the input 'x' has no fixed shape: give one with --input_dim x 1,3,224,224"):
        read(folder, "a.raw", network(x=(TensorProto.FLOAT, shape)))


@pytest.mark.parametrize("kind", [TensorProto.STRING, 0, 999, TensorProto.COMPLEX64])
def test_an_input_of_no_numbers_is_refused(kind: int) -> None:
    with pytest.raises(ValueError, match=r"the input 'x' takes no numbers that raw float32 files could hold"):
        input_shapes(network(x=(kind, (1,))))


def test_a_list_that_cannot_be_opened(folder: Path) -> None:
    with pytest.raises(IsADirectoryError):
        read_input_list(folder, ONE)
    with pytest.raises(FileNotFoundError):
        read_input_list(folder / "none.txt", ONE)


def test_a_list_that_never_ends_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtools.ptq.inputs._MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"is not a text file"):
        read(folder, "a.raw\n" * 100)
    with pytest.raises(ValueError, match=r"is not a text file"):
        read_input_list("/dev/zero", ONE)
