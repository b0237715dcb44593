"""The table of agreement: what stands in it is what the sides give, and it is the backend's where there is one."""

import json

import numpy as np
import pytest

from qtools import cli
from qtools.npu import htp
from qtools.ptq import agreement
from qtools.ptq.agreement import CASES, SIDES, Agreement
from qtools.ptq.convert import Runner

needs_backend = pytest.mark.skipif(not htp.status().available, reason=f"HTP backend: {htp.status().reason}")
BY_NAME = {case.name: case for case in CASES}


def test_codes_are_compared_by_share_and_by_distance() -> None:
    ours, theirs = np.array([0, 5, 255, 7], np.uint8), np.array([0, 6, 250, 7], np.uint8)
    assert Agreement.of(ours, theirs) == Agreement(50.0, 5)
    assert Agreement.of(np.array([0], np.uint8), np.array([255], np.uint8)).worst == 255  # no wrapping around


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_integer_engine_agrees_on_every_operator_at_8_bits(case) -> None:
    """100 % but for what two exact roundings may part on: a tie, which only sums and products of floats can miss."""
    found = agreement.operator(case, "w8a8", ("integer", "fixed"))
    assert found["integer"]["equal_percent"] > 99.9 and found["integer"]["worst"] <= 1
    assert found["fixed"]["worst"] <= 1


def test_an_operator_alone_is_given_the_codes_of_the_simulation() -> None:
    task = agreement.digits("mini", agreement.Options(**agreement.FINE))
    born = agreement.alone(task.network, "integer", task.samples[:2])
    handed_on = agreement.through(task.network, "integer", task.samples[:2])
    assert ["input.codes", *born] == list(handed_on) == agreement.codes_of(task.network)
    assert all(one.worst <= 1 for one in born.values())
    assert handed_on["input.codes"] == Agreement(100.0, 0) and born["act.codes"].equal_percent > 99.9


def test_a_network_is_judged_by_its_answers() -> None:
    task = agreement.digits("skew", agreement.Options(**agreement.FINE))
    found = agreement.whole(task, "integer")
    out = np.concatenate([Runner(task.network, ["output"])(sample)[0] for sample in task.samples])
    assert found["samples"] == 540 and found["simulated_right"] == round(task.right(out), 2)
    assert abs(found["right"] - found["simulated_right"]) < 0.5 and found["same_argmax"] > 99


def test_the_committed_table_is_whole() -> None:
    content = agreement.recorded()
    assert [(name, widths) for name, rows in content["operators"].items() for widths in rows] == [
        (case.name, widths) for case, widths in agreement.rows()
    ]
    assert list(content["networks"]) == list(agreement.TASKS)
    for sides in (
        *content["networks"].values(),
        *(row for rows in content["operators"].values() for row in rows.values()),
    ):
        assert tuple(sides) == SIDES


@needs_backend
@pytest.mark.parametrize(("name", "widths"), [("Conv 3x3", "w8a8"), ("MatMul, activations", "w8a16"), ("Add", "w8a8")])
def test_the_committed_table_is_what_the_backend_says(name: str, widths: str) -> None:
    content = agreement.recorded()
    if htp.status().reason not in content["with"]:
        pytest.skip(f"recorded with {content['with']}")
    assert agreement.operator(BY_NAME[name], widths, ("v68", "v75")) == {
        side: content["operators"][name][widths][side] for side in ("v68", "v75")
    }


def test_the_command_shows_the_committed_table(capsys) -> None:
    assert cli.main(["agreement", "--recorded"]) == 0
    said = capsys.readouterr().out
    assert agreement.recorded()["with"] in said and all(case.name in said for case in CASES)
    assert cli.main(["agreement", "--recorded", "--write"]) == 2


def test_without_a_backend_nothing_is_made_up(capsys, monkeypatch) -> None:
    monkeypatch.setenv("QTOOLS_HTP", "0")
    assert cli.main(["agreement"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "--recorded shows what it said when last asked" in said.err


def test_writing_renews_the_table_in_one_piece(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(agreement, "TABLE", tmp_path / "table.json")
    agreement.write({"with": "x"})
    assert json.loads((tmp_path / "table.json").read_text()) == {"with": "x"} and len(list(tmp_path.iterdir())) == 1
