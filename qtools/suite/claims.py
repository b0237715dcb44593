"""The ledger: every claim of the article, judged by a predicate on the chapters' results.

``data/claims.yaml`` holds what was claimed and, for every claim, the verdicts that are possible, each with the
condition under which it is the right one.  Which of them is right is decided here, from the numbers.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

KINDS = ("holds", "holds when", "fails", "needs a phone")
_OPERATIONS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS = {"abs": abs, "min": min, "max": max, "round": round}


class Possible(pydantic.BaseModel, extra="forbid"):
    """One verdict that a claim may get: the condition, the kind, and the sentence, with ``{result:.2f}`` fields."""

    when: str
    verdict: str
    says: str

    @pydantic.field_validator("verdict")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in KINDS:
            raise ValueError(f"a verdict is one of {', '.join(KINDS)}, got {value!r}")
        return value


class Claim(pydantic.BaseModel, extra="forbid"):
    """One claim of the article: its words in English, its numbers, a figure of it, and the verdicts it may get."""

    id: str = pydantic.Field(pattern=r"^C\d\d$")
    section: str
    claim: str
    article: dict[str, float] = {}
    figure: str | None = None
    verdicts: list[Possible] = pydantic.Field(min_length=1)


def load(path: Path | str) -> dict[str, Claim]:
    """Claims by id.

    Raises
    ------
    ValueError
        If the file is not a list of well-formed claims with distinct ids.
    """
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list of claims")
    claims = [Claim.model_validate(entry) for entry in content]
    if len({claim.id for claim in claims}) != len(claims):
        raise ValueError(f"{path} holds an id twice")
    return {claim.id: claim for claim in claims}


def evaluate(claim: Claim, results: Mapping[str, float]) -> dict[str, str]:
    """The first verdict whose condition is true of the results; the article's own numbers are ``article_NAME``.

    Raises
    ------
    ValueError
        If no condition is true, or one names an unknown result.
    """
    values = {f"article_{name}": number for name, number in claim.article.items()} | dict(results)
    for possible in claim.verdicts:
        if condition(possible.when, values):
            return {"verdict": possible.verdict, "says": _filled(possible.says, values)}
    raise ValueError(f"{claim.id}: no verdict of data/claims.yaml is true of the results")


def _filled(sentence: str, values: Mapping[str, float]) -> str:
    try:
        return sentence.format_map(values)
    except KeyError as error:
        raise ValueError(f"a claim names {error}, and no chapter recorded it") from None


def condition(expression: str, values: Mapping[str, float]) -> Any:
    """Evaluate arithmetic, comparisons and and/or/not over named numbers; nothing else is allowed.

    Examples
    --------
    >>> condition("abs(drop - 0.75) < 0.01 and n > 3", {"drop": 0.752, "n": 5})
    True
    """
    return _evaluate(ast.parse(expression, mode="eval").body, values)


def _evaluate(node: ast.expr, values: Mapping[str, float]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name):
            if name not in values:
                raise ValueError(f"a claim names {name!r}, and no chapter recorded it")
            return values[name]
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATIONS[type(op)](_evaluate(operand, values))
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATIONS[type(op)](_evaluate(left, values), _evaluate(right, values))
        case ast.BoolOp(op=op, values=parts):
            return (all if isinstance(op, ast.And) else any)(_evaluate(part, values) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=rights):
            ends = [_evaluate(part, values) for part in (left, *rights)]
            return all(_OPERATIONS[type(op)](a, b) for op, a, b in zip(ops, ends, ends[1:], strict=False))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_evaluate(argument, values) for argument in arguments))
    raise ValueError(f"a claim's condition may not contain {ast.unparse(node)!r}")


def table(claims: Sequence[Claim], verdicts: Mapping[str, Mapping[str, str]]) -> Any:
    """A Markdown table of claims and their verdicts, for a notebook."""
    from IPython.display import Markdown

    rows = [
        f"| {claim.id} | {claim.claim} | **{verdicts[claim.id]['verdict']}** | {verdicts[claim.id]['says']} |"
        for claim in claims
    ]
    return Markdown("\n".join(["| | the article says | verdict | because |", "|---|---|---|---|", *rows]))
