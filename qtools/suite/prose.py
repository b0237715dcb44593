"""Numbers in the prose that follow the results.

A chapter's text ties a number to one of its results with a comment right behind it::

    the error falls by 75.2<!--=relu_mse_drop:.1f--> %

The comment names the result's key and its format, and is invisible to a reader. `fill` rewrites the number from
fresh results; `tied` and `untied` list what is tied and what is not.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

# Not inside a word (int8, C05) nor behind a version's dot; a minus only where it is a sign, not in 10-5 or 2^{8}-1.
_NUMBER = r"(?<!\w)(?<!\w\.)(?:(?<![)\]}])[-−+])?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
_COMMENT = r"<!--=(?P<key>[^:>\s]*):?(?P<format>[^>\s]*)-->"
_TIE = re.compile(rf"(?P<number>{_NUMBER})?{_COMMENT}")
# Comments are not text; the number of a list's item and the digits of an address say nothing that could be wrong.
_SKIPPED = re.compile(r"<!--.*?-->|\]\([^)]*\)|https?://\S+|^[ \t>]*[0-9]{1,2}[.)][ \t]", re.DOTALL | re.MULTILINE)


def fill(markdown: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Rewrite every tied number from the results.

    Parameters
    ----------
    markdown : str
        Text with comments such as ``<!--=KEY:FORMAT-->`` right behind the numbers.
    results : mapping
        ``{KEY: {"value": number, ...}}``, as in a chapter's results file.

    Raises
    ------
    KeyError
        A comment names a key that the results do not have.
    ValueError
        A comment has no number before it, no format, or its format does not give a number.

    Examples
    --------
    >>> fill("falls by 0<!--=drop:.1f--> %", {"drop": {"value": 75.2041}})
    'falls by 75.2<!--=drop:.1f--> %'
    """

    def renew(tie: re.Match[str]) -> str:
        number, key, spec = _parts(tie)
        if key not in results:
            raise KeyError(f"the prose names the result '{key}', which this chapter does not have")
        text = _written(key, results[key]["value"], spec)
        return text.replace("-", "−", 1) + tie[0][len(number) :] if "−" in number else text + tie[0][len(number) :]

    return _TIE.sub(renew, markdown)


def tied(markdown: str) -> list[tuple[str, str, str]]:
    """List the tied numbers as (number, key, format), in order.

    Raises
    ------
    ValueError
        A comment has no number before it, or no format.

    Examples
    --------
    >>> tied("int8 costs 1,024<!--=bytes:,d--> bytes")
    [('1,024', 'bytes', ',d')]
    """
    return [_parts(tie) for tie in _TIE.finditer(markdown)]


def untied(markdown: str) -> Counter[str]:
    """Count the numbers that no result stands behind, in code spans and formulas too.

    Not counted: digits inside words (int8, C05, x86), in comments and addresses, and the numbers of a list's items.
    A minus is written "-" whichever sign the text has.

    Examples
    --------
    >>> untied("4<!--=n:d--> of 8 bits: int8 has $2^8$ codes, -128 the lowest")
    Counter({'8': 2, '2': 1, '-128': 1})
    """
    text = _SKIPPED.sub(" ", _TIE.sub(" ", markdown))
    return Counter(number.replace("−", "-") for number in re.findall(_NUMBER, text))


def _parts(tie: re.Match[str]) -> tuple[str, str, str]:
    number, key, spec = tie["number"], tie["key"], tie["format"]
    if not (number and key and spec):
        raise ValueError(f"'{tie[0]}' in the prose: expected a number right before <!--=KEY:FORMAT-->")
    return number, key, spec


def _written(key: str, value: float, spec: str) -> str:
    if spec.endswith("d") and float(value).is_integer():
        value = int(value)  # JSON may have made 5 into 5.0
    try:
        text = format(value, spec)
    except (ValueError, TypeError) as error:
        raise ValueError(f"result '{key}' = {value!r} cannot be written as '{spec}': {error}") from None
    if not re.fullmatch(_NUMBER, text):
        raise ValueError(f"result '{key}' = {value!r} written as '{spec}' gives '{text}', which is not a plain number")
    return text
