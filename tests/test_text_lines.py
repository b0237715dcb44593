"""Text lines: the same ones everywhere, read as well as they should be."""

from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtools import zoo
from qtools.zoo.text_lines import _edits

TEXTS = ["DAC-337", "precedes", "1998-03-02", "comprehensio", "KJD-8833", "HT-769", "2003-03-19", "1957-11-03"]
words = st.text("ab", max_size=6)


def outputs(model: onnx.ModelProto, inputs: np.ndarray) -> Iterator[np.ndarray]:
    """What a network makes of its inputs, 16 at a time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3  # of PP-OCR's files it warns that some initializers are not used
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for start in range(0, len(inputs), 16):
        yield session.run(None, {"x": inputs[start : start + 16]})[0]


def test_the_recognizer_reads_nine_of_ten_lines():
    model = zoo.text_recognizer()
    inputs, texts = zoo.recognizer_lines(600, 1234)
    alphabet = zoo.characters(model)
    read = [text for batch in outputs(model, inputs) for text in zoo.decode(batch, alphabet)]
    # 542 lines; two more or less may come from another CPU's rounding.
    assert zoo.exact_match(read, texts) == pytest.approx(90.3, abs=0.4)
    assert zoo.character_accuracy(read, texts) == pytest.approx(97.2, abs=0.2)


def test_the_classifier_knows_which_way_is_up():
    inputs, labels = zoo.classifier_lines(3000, 1234)
    probabilities = np.concatenate(list(outputs(zoo.direction_classifier(), inputs)))
    assert 100 * (probabilities.argmax(1) == labels).mean() == pytest.approx(96.6, abs=0.2)


def test_a_seed_gives_these_texts_and_pictures():
    pictures, texts = zoo.line_pictures(8, 1234)
    assert texts == TEXTS
    # These sizes hang on the fonts, and through the order of the random calls on everything that comes before.
    assert [picture.shape[:2] for picture in pictures[:4]] == [(42, 165), (27, 138), (46, 272), (12, 73)]
    assert [picture.mean() for picture in pictures[:4]] == pytest.approx([190.0, 191.6, 91.4, 209.8], abs=0.5)
    assert zoo.line_pictures(3, 999)[1] == ["CVVU-947354", "Manager", "Duplicate"]


def test_the_same_seed_gives_the_same_lines_and_fewer_lines_are_the_first_ones():
    (few, _), (many, _) = zoo.recognizer_lines(3, 7), zoo.recognizer_lines(5, 7)
    np.testing.assert_array_equal(few, many[:3])
    assert not np.array_equal(few, zoo.recognizer_lines(3, 8)[0])


def test_pictures_are_small_colour_pictures():
    pictures, texts = zoo.line_pictures(100, 5)
    assert len(pictures) == len(texts) == 100 and all(texts)
    for picture in pictures:
        assert picture.dtype == np.uint8 and picture.shape[2] == 3 and 10 <= picture.shape[0] <= 48


def test_inputs_are_fitted_from_the_left_and_lie_between_minus_one_and_one():
    pictures, _ = zoo.line_pictures(60, 5)
    inputs, texts = zoo.recognizer_lines(60, 5)
    assert inputs.shape == (60, 3, 48, 320) and inputs.dtype == np.float32 and len(texts) == 60
    assert inputs.min() >= -1 and inputs.max() <= 1
    for picture, line in zip(pictures, inputs):
        fitted = min(320, int(np.ceil(48 * picture.shape[1] / picture.shape[0])))
        assert (line[:, :, fitted:] == 0).all() and (line[:, :, :fitted] != 0).any()
        # Resizing keeps the mean nearly.
        expected = picture.mean((0, 1)) / 127.5 - 1
        np.testing.assert_allclose(line[:, :, :fitted].mean((1, 2)), expected, atol=0.02)


def test_every_second_line_is_upside_down():
    pictures, _ = zoo.line_pictures(6, 5)
    inputs, labels = zoo.classifier_lines(6, 5)
    assert inputs.shape == (6, 3, 48, 192) and labels.tolist() == [0, 1] * 3 and labels.dtype == np.int64
    for picture, line, label in zip(pictures, inputs, labels):
        fitted = min(192, int(np.ceil(48 * picture.shape[1] / picture.shape[0])))
        rows = line[:, :, :fitted].mean((0, 2))
        seen = np.interp(np.linspace(0, 1, 48), np.linspace(0, 1, len(picture)), picture.mean((1, 2)) / 127.5 - 1)
        straight, turned = np.abs(rows - seen).mean(), np.abs(rows[::-1] - seen).mean()
        assert (turned < straight) == bool(label)


def test_no_lines_are_no_lines():
    assert zoo.line_pictures(0, 1) == ([], [])
    assert zoo.recognizer_lines(0, 1)[0].shape == (0, 3, 48, 320)
    assert zoo.classifier_lines(0, 1)[1].shape == (0,)


@pytest.mark.parametrize("make", [zoo.line_pictures, zoo.recognizer_lines, zoo.classifier_lines])
def test_a_negative_number_of_lines_is_refused(make):
    with pytest.raises(ValueError, match="the number of lines cannot be negative, got -1"):
        make(-1, 1234)


def test_a_seed_is_a_whole_number():
    assert zoo.line_pictures(1, np.int64(1234))[1] == TEXTS[:1]
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        zoo.line_pictures(1, None)  # would be another line every time


def test_the_characters_are_the_blank_the_alphabet_and_the_space():
    found = zoo.characters(zoo.text_recognizer())
    assert len(found) == 6625 and found[0] == "" and found[-1] == " " and {"A", "z", "0", "$", "-"} <= set(found)


def test_a_network_without_characters_is_refused():
    with pytest.raises(ValueError, match="no entry 'character' in its metadata"):
        zoo.characters(zoo.digits_cnn())


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([1, 2], "ab"),
        ([1, 1, 1, 2, 2], "ab"),
        ([1, 0, 1], "aa"),
        ([0, 0, 1, 0, 0], "a"),
        ([1, 2, 1], "aba"),
        ([3, 1, 3], " a "),
        ([0, 0], ""),
        ([], ""),
    ],
)
def test_decoding_merges_repeats_and_drops_blanks(steps, text):
    probabilities = np.eye(4, dtype=np.float32)[np.array([steps, steps], int)]
    assert zoo.decode(probabilities, ["", "a", "b", " "]) == [text, text]


@pytest.mark.parametrize("shape", [(2, 5, 3), (5, 4)])
def test_outputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"for 4 characters the output must have the shape \(n, steps, 4\), got"):
        zoo.decode(np.zeros(shape, np.float32), ["", "a", "b", " "])


def test_an_exact_match_forgives_spaces_around_a_prediction_and_nothing_else():
    assert zoo.exact_match([" one ", "two", "thre e", "Four"], ["one", "two", "three", "four"]) == 50
    assert zoo.exact_match(["a"], ["a"]) == 100 and zoo.exact_match(["a"], [" a"]) == 0


def test_character_accuracy_counts_edits_over_all_characters():
    # 3 edits of 7 characters, none of 3: not the mean over the texts.
    assert zoo.character_accuracy(["kitten", " abc "], ["sitting", "abc"]) == pytest.approx(70)
    assert zoo.character_accuracy(["abcdef"], ["xy"]) == pytest.approx(-200)
    assert zoo.character_accuracy(["", "ab"], ["", "ab"]) == 100


@pytest.mark.parametrize("measure", [zoo.exact_match, zoo.character_accuracy])
@pytest.mark.parametrize("texts", [([], []), (["a"], ["a", "b"]), (["a"], [])])
def test_scores_need_as_many_predictions_as_texts(measure, texts):
    with pytest.raises(ValueError, match="as many predictions as texts are needed"):
        measure(*texts)


def test_character_accuracy_needs_characters():
    with pytest.raises(ValueError, match="there is no character to count"):
        zoo.character_accuracy(["a"], [""])


@given(words, words, words)
def test_edits_are_a_distance(a, b, c):
    assert (_edits(a, b) == 0) == (a == b)
    assert _edits(a, b) == _edits(b, a)
    assert _edits(a, c) <= _edits(a, b) + _edits(b, c)
    assert abs(len(a) - len(b)) <= _edits(a, b) <= max(len(a), len(b))
    assert _edits(a + "x", b + "x") == _edits(a, b)
