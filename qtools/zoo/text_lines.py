"""Labelled text lines for the networks that read them, rendered from fonts that matplotlib brings along.

Every line comes from one `random.Random`, so the order of the random calls is part of the definition: who reorders
them gets other lines.
"""

from __future__ import annotations

import functools
import math
import operator
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qtools.zoo.digits import DATA

if TYPE_CHECKING:
    import onnx
    from PIL import ImageFont

_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10"),
)
_KINDS = ("word", "word", "word", "pair", "amount", "date", "code")
_ROWS = 48  # of what both networks read


def line_pictures(n: int, seed: int) -> tuple[list[np.ndarray], list[str]]:
    """Pictures of single lines of text, as a camera would give them: small, blurred, tilted, noisy.

    Words, pairs of words, amounts, dates and codes, in 13 fonts; contrast 0.2 to 1, tilt up to 3 degrees, 10 to 48
    rows, blur, uneven light, noise, and on two of five the traces of JPEG.

    Parameters
    ----------
    n : int
        How many.
    seed : int
        Of all random choices.  The course evaluates on 1234 and calibrates on 999.

    Returns
    -------
    pictures, texts
        Arrays uint8 of shape (rows, columns, 3), red, green, blue, of different sizes; and what stands on them.

    Raises
    ------
    ValueError
        If `n` is negative.
    """
    if n < 0:
        raise ValueError(f"the number of lines cannot be negative, got {n}")
    rng = random.Random(operator.index(seed))
    pictures, texts = [], []
    for _ in range(n):
        texts.append(_text(rng))
        pictures.append(_picture(texts[-1], rng))
    return pictures, texts


def recognizer_lines(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """The lines of `line_pictures` as `text_recognizer` wants them.

    Returns
    -------
    inputs, texts
        float32 of shape (n, 3, 48, 320) in -1..1, 0 beside the line; and what stands on each.

    Raises
    ------
    ValueError
        If `n` is negative.
    """
    pictures, texts = line_pictures(n, seed)
    return _inputs(pictures, 320), texts


def classifier_lines(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The lines of `line_pictures` as `direction_classifier` wants them, every second one upside down.

    Returns
    -------
    inputs, labels
        float32 of shape (n, 3, 48, 192) in -1..1, 0 beside the line; and int64 of shape (n,), 1 for upside down.

    Raises
    ------
    ValueError
        If `n` is negative.
    """
    pictures, _ = line_pictures(n, seed)
    labels = np.arange(n) % 2
    turned = [picture[::-1, ::-1] if label else picture for picture, label in zip(pictures, labels)]
    return _inputs(turned, 192), labels


def characters(model: onnx.ModelProto) -> list[str]:
    """What each channel of a recognizer's output stands for: the blank (''), its alphabet, and the space.

    Raises
    ------
    ValueError
        If the model has no alphabet in its metadata.
    """
    alphabet = {entry.key: entry.value for entry in model.metadata_props}.get("character")
    if alphabet is None:
        raise ValueError("the model has no entry 'character' in its metadata: it is no text recognizer of PP-OCR")
    return ["", *alphabet.splitlines(), " "]


def decode(probabilities: np.ndarray, characters: Sequence[str]) -> list[str]:
    """Texts from a recognizer's output: at each step the likeliest character, repeats merged, blanks dropped.

    Parameters
    ----------
    probabilities : ndarray
        Of shape (n, steps, characters); logits or scores do as well, as only their order counts.
    characters : sequence of str
        As `characters` gives them; the first one is the blank.

    Returns
    -------
    list of str
        n texts.

    Raises
    ------
    ValueError
        If `probabilities` has another shape.

    References
    ----------
    A. Graves et al., Connectionist Temporal Classification, ICML 2006.
    """
    if probabilities.ndim != 3 or probabilities.shape[2] != len(characters):
        wanted, got = f"(n, steps, {len(characters)})", probabilities.shape
        raise ValueError(f"for {len(characters)} characters the output must have the shape {wanted}, got {got}")
    best = probabilities.argmax(2)
    new = np.diff(best, axis=1, prepend=0) != 0  # a first step that is blank counts as a repeat, and is dropped anyway
    return ["".join(characters[i] for i in row[kept]) for row, kept in zip(best, new & (best != 0))]


def exact_match(predicted: Sequence[str], true: Sequence[str]) -> float:
    """Share of texts read without a mistake, in percent; spaces around a prediction are dropped.

    Raises
    ------
    ValueError
        If there are no texts, or not as many predicted as true ones.
    """
    pairs = _pairs(predicted, true)
    return 100 * sum(guess == text for guess, text in pairs) / len(pairs)


def character_accuracy(predicted: Sequence[str], true: Sequence[str]) -> float:
    """Share of characters read right, in percent; spaces around a prediction are dropped.

    100 (1 - edits / characters), where edits is the sum of all Levenshtein distances and characters the number of
    characters in all true texts: long texts count for more, and much invented text makes it negative.

    Raises
    ------
    ValueError
        If there are no true characters, or not as many predicted as true texts.
    """
    pairs = _pairs(predicted, true)
    length = sum(len(text) for _, text in pairs)
    if not length:
        raise ValueError("the true texts are all empty: there is no character to count")
    return 100 * (1 - sum(_edits(guess, text) for guess, text in pairs) / length)


def _pairs(predicted: Sequence[str], true: Sequence[str]) -> list[tuple[str, str]]:
    if len(predicted) != len(true) or not len(true):
        raise ValueError(f"as many predictions as texts are needed, and at least one: {len(predicted)}, {len(true)}")
    return [(guess.strip(), text) for guess, text in zip(predicted, true)]


def _edits(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions that make `b` of `a`."""
    above = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (one != other)))
        above = row
    return above[-1]


def _text(rng: random.Random) -> str:
    kind = rng.choice(_KINDS)
    if kind == "word":
        word = rng.choice(_words())
        return word if rng.random() < 0.7 else word.capitalize() if rng.random() < 0.5 else word.upper()
    if kind == "pair":
        return f"{rng.choice(_words())}-{rng.choice(_words())}"[:18]
    if kind == "amount":
        return f"{rng.choice(('', '$', '-'))}{rng.randint(1, 99)},{rng.randint(0, 999):03d}.{rng.randint(0, 99):02d}"
    if kind == "date":
        return f"{rng.randint(1950, 2030):04d}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    # No I, O, Q, 0 and 1: nobody could tell them apart in these fonts.
    letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(rng.randint(2, 4)))
    return letters + "-" + "".join(rng.choice("23456789") for _ in range(rng.randint(3, 6)))


def _picture(text: str, rng: random.Random) -> np.ndarray:
    noise = np.random.default_rng(rng.randint(0, 2**31))
    return _worn(_printed(text, rng), rng, noise)


def _printed(text: str, rng: random.Random) -> np.ndarray:
    """The text at 40 pixels, in some font and two colours, a little tilted; uint8."""
    from PIL import Image, ImageDraw

    font = _font(rng.choice(_FONTS))
    left, top, right, bottom = font.getbbox(text)
    beside, above = rng.randint(3, 12), rng.randint(2, 8)
    shades = (120, 255) if rng.random() < 0.8 else (0, 120)
    paper = np.array([rng.randint(*shades) for _ in range(3)])
    contrast = rng.uniform(0.2, 1.0)
    opposite = 0 if paper.mean() > 120 else 255
    ink = tuple(int(value) for value in paper + (opposite - paper) * contrast)
    fill = tuple(int(value) for value in paper)
    image = Image.new("RGB", (right - left + 2 * beside, bottom - top + 2 * above), fill)
    ImageDraw.Draw(image).text((beside - left, above - top), text, font=font, fill=ink)
    return np.asarray(image.rotate(rng.uniform(-3, 3), resample=Image.Resampling.BICUBIC, fillcolor=fill))


def _worn(picture: np.ndarray, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """The print as a camera sees it: 10 to 48 rows, blurred, unevenly lit, noisy, compressed; uint8."""
    import cv2

    height, width = picture.shape[:2]
    rows = round(rng.uniform(10, 48))
    columns = max(8, int(width * rows / height))
    seen = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_AREA).astype(np.float32)
    if rng.random() < 0.6:
        seen = cv2.GaussianBlur(seen, (0, 0), rng.uniform(0.2, 1.11) * rows / 32)
    seen = seen + np.linspace(0, 1, columns)[None, :, None] * rng.uniform(-50, 50)
    seen = seen + noise.normal(0, rng.uniform(0, 14), seen.shape)
    seen = np.clip(seen, 0, 255).astype(np.uint8)
    if rng.random() < 0.4:
        quality = [cv2.IMWRITE_JPEG_QUALITY, rng.randint(15, 60)]
        seen = cv2.imdecode(cv2.imencode(".jpg", seen, quality)[1], cv2.IMREAD_COLOR)
    return seen


def _inputs(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """The pictures fitted to 48 rows, in -1..1, from the left; too long ones are squeezed."""
    import cv2

    inputs = np.zeros((len(pictures), 3, _ROWS, columns), np.float32)
    for target, picture in zip(inputs, pictures):
        height, width = picture.shape[:2]
        fitted = min(columns, math.ceil(_ROWS * width / height))
        resized = cv2.resize(np.ascontiguousarray(picture), (fitted, _ROWS)).astype(np.float32)
        target[:, :, :fitted] = ((resized / 255 - 0.5) / 0.5).transpose(2, 0, 1)
    return inputs


@functools.cache
def _words() -> list[str]:
    return (DATA / "words.txt").read_text(encoding="utf-8").split()


@functools.cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", 40)
