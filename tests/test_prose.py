"""Numbers in the prose: tied ones follow the results, the others are counted."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtools.suite.prose import fill, tied, untied

RESULTS = {"drop": {"value": 75.2041}, "count": {"value": 5.0}, "low": {"value": -3.14159}, "big": {"value": 1234567}}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("by 1<!--=drop:.1f--> %", "by 75.2<!--=drop:.1f--> %"),
        ("**9.99e+01<!--=drop:.2e-->**", "**7.52e+01<!--=drop:.2e-->**"),
        ("1,000<!--=big:,d-->", "1,234,567<!--=big:,d-->"),
        ("0<!--=count:d--> of 8", "5<!--=count:d--> of 8"),
        ("−1<!--=low:.2f-->", "−3.14<!--=low:.2f-->"),
        ("$-1<!--=low:.2f-->$", "$-3.14<!--=low:.2f-->$"),
        ("+1<!--=drop:+.0f-->", "+75<!--=drop:+.0f-->"),
        ("10-2<!--=count:d-->", "10-5<!--=count:d-->"),
        ("1<!--=count:d-->2<!--=count:d-->", "5<!--=count:d-->5<!--=count:d-->"),
        ("no tie, 5 <!-- a remark -->", "no tie, 5 <!-- a remark -->"),
    ],
)
def test_fill_writes_the_result_before_its_comment(before: str, after: str) -> None:
    assert fill(before, RESULTS) == after
    assert fill(after, RESULTS) == after


@given(st.floats(-1e6, 1e6), st.sampled_from([".0f", ".3f", ".2e", "+.1f", ",.2f"]))
def test_filling_twice_changes_nothing(value: float, spec: str) -> None:
    once = fill(f"x 1<!--=k:{spec}--> y", {"k": {"value": value}})
    assert fill(once, {"k": {"value": value}}) == once
    assert tied(once)[0][0] == format(value, spec)


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(KeyError, match="'drip'"):
        fill("1<!--=drip:.1f-->", RESULTS)


@pytest.mark.parametrize(
    "text", ["falls <!--=drop:.1f-->", "1<!--=drop-->", "int8<!--=drop:.1f-->", "1 <!--=drop:.1f-->"]
)
def test_a_comment_without_its_number_or_format_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="right before"):
        fill(text, RESULTS)


@pytest.mark.parametrize(("key", "spec"), [("drop", "d"), ("drop", ".1%"), ("drop", "zz")])
def test_a_format_that_gives_no_number_is_an_error(key: str, spec: str) -> None:
    with pytest.raises(ValueError, match=r"75\.2041"):
        fill(f"1<!--={key}:{spec}-->", RESULTS)


def test_nan_is_never_written_into_the_prose() -> None:
    with pytest.raises(ValueError, match="nan"):
        fill("1<!--=k:.1f-->", {"k": {"value": float("nan")}})


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("int8, C05, u16, x86, x_1 and qmax2 are names", {}),
        ("falls by 75.2<!--=drop:.1f--> %", {}),
        ("falls by 75.2 %", {"75.2": 1}),
        ("`zp = 128` and $2^{8}-1$", {"128": 1, "2": 1, "8": 1, "1": 1}),
        ("from −127 to -127", {"-127": 2}),
        ("60s, 8-bit, 5x5, 6.02dB", {"60": 1, "8": 1, "5": 1, "6.02": 1}),
        ("1,000,000 values at 1e-3", {"1,000,000": 1, "1e-3": 1}),
        ("<!-- 42\n43 --> [next](02_x.ipynb#4) https://a.org/1712.05877", {}),
        ("1. first\n2. second has 7\n", {"7": 1}),
        ("3, 4 and 5.", {"3": 1, "4": 1, "5": 1}),
        ("", {}),
    ],
)
def test_untied_counts_standalone_numbers_only(text: str, numbers: dict[str, int]) -> None:
    assert untied(text) == Counter(numbers)
