"""The chips: no figure without unit, kind and source; disagreements side by side; ratios that carry fitted rates."""

import json
import math

import pytest
import yaml

from qtools.npu import htp, soc

GOOD = {"value": 8, "unit": "MB", "kind": "published", "source": "somebody"}


def written(tmp_path, figure=GOOD, key="sm8650", **more):
    path = tmp_path / "soc.yaml"
    path.write_text(yaml.safe_dump({key: {"name": "a chip", "figures": {"vtcm": figure}, **more}}))
    return path


def test_a_figure_with_everything_is_taken(tmp_path):
    chip = soc.load(written(tmp_path, [GOOD]))["sm8650"]
    assert chip.si("vtcm") == 8 * 1024**2 and chip.figures["vtcm"][0].source == "somebody"


@pytest.mark.parametrize(
    "change",
    [
        {"source": None}, {"kind": None}, {"unit": None}, {"value": None}, {"source": " "}, {"kind": "guessed"},
        {"unit": "furlong"}, {"value": 0}, {"value": -1}, {"value": math.nan}, {"value": math.inf}, {"value": "many"},
        {"note": "more"},
    ],
    ids=str,
)  # fmt: skip
def test_a_figure_that_lacks_something_is_refused(tmp_path, change):
    figure = {name: value for name, value in (GOOD | change).items() if value is not None}
    with pytest.raises(ValueError, match=r"soc.yaml: sm8650\.figures\.vtcm\.0"):
        soc.load(written(tmp_path, [figure]))


def test_a_chip_that_nobody_knows_and_a_figure_without_any_source_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such chip as sm1: there are sm8350"):
        soc.load(written(tmp_path, [GOOD], "sm1"))
    with pytest.raises(ValueError, match="vtcm"):
        soc.load(written(tmp_path, []))
    with pytest.raises(ValueError, match="Extra inputs"):
        soc.load(written(tmp_path, [GOOD], arch="v75"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must map chips"):
        soc.load(tmp_path / "list.yaml")


def test_architectures_and_ids_are_those_that_the_backend_is_asked_for():
    assert {key: soc.identity(key) for key in ("sm8550", "sm8650", "sm8750", "SC8380XP")} == {
        "sm8550": ("v73", "43"), "sm8650": ("v75", "57"), "sm8750": ("v79", "69"), "SC8380XP": ("v73", "60"),
    }  # fmt: skip
    assert all(soc.identity(key) == htp.SOCS[chip.of or key] for key, chip in soc.table().items())


def test_sources_that_disagree_stand_side_by_side():
    figures = soc.table()["sm8650"].figures
    assert {figure.value for figure in figures["int8"]} == {73, 45, 36, 12}
    assert {figure.value for figure in figures["dram"]} == {76.8, 68.3, 64, 51.2}
    sources = [figure.source for many in figures.values() for figure in many if figure.kind == "published"]
    assert len(set(sources)) > 8


def test_the_article_is_a_profile_of_its_own():
    article = soc.chip("article")
    said = {name: article.figures[name][0].value for name in article.figures}
    assert said == {"int8": 36, "int16": 18, "int4": 72, "dram": 68.3, "bandwidth": 50, "vtcm": 8}


def test_derived_figures_follow_from_what_they_are_derived_from():
    chips = soc.table()
    for key, megahertz in (("sm8550", 4200), ("sm8650", 4800), ("sm8750", 5300)):
        assert chips[key].figures["dram"][0].value == pytest.approx(megahertz * 2 * 8 / 1e3)
    for key in ("sm8550", "sm8750", "sc8380xp"):
        for unit in ("fp16", "int8"):
            ratio = chips[key].si(f"unet_{unit}") / chips["sm8650"].si(f"unet_{unit}")
            assert chips[key].si(f"times_{unit}") == pytest.approx(ratio, abs=6e-4)
    for key in ("sm8550", "sm8750"):
        assert chips[key].si("times_bandwidth") == pytest.approx(chips[key].si("dram") / 76.8e9, abs=6e-4)


def test_the_fitted_figures_are_those_that_the_recipe_wrote():
    fit = json.loads((soc.TABLE.parent / "results/measured/07_fit.json").read_text())["parameters"]
    figures = soc.table()["sm8650"].figures
    assert {name for name, many in figures.items() if many[0].kind == "fitted"} == set(fit)
    assert all((figures[name][0].value, figures[name][0].unit) == (e["value"], e["unit"]) for name, e in fit.items())


def test_rates_of_the_fitted_chip_and_of_others():
    base, eight, sixteen = (soc.rates("sm8650", name) for name in ("float", "w8a8", "w8a16"))
    figures = soc.table()["sm8650"]
    assert base.matrix == figures.si("matrix_fp16") and eight.matrix == figures.si("matrix_int8")
    assert sixteen.matrix == eight.matrix / 2 and sixteen.bandwidth == eight.bandwidth == 60e9
    assert (eight.fixed, sixteen.fixed) == (figures.si("fixed_8"), figures.si("fixed_16")) and base.fixed > eight.fixed
    assert soc.rates("sm8650", "w4a16") == sixteen and soc.rates("SM8650", "w4a8") == eight
    elite = soc.rates("sm8750", "w8a16")
    assert elite.matrix == pytest.approx(1.193 * sixteen.matrix) and elite.bandwidth == pytest.approx(1.104 * 60e9)
    assert elite.node == pytest.approx(sixteen.node / 1.35) and elite.vector == pytest.approx(1.35 * sixteen.vector)


@pytest.mark.parametrize(
    ("chip", "precision", "message"),
    [
        ("sm1", "w8a8", "unknown SoC 'sm1': choose from sm8650"),
        ("sm8350", "w8a8", "too little is published on Snapdragon 888"),
        ("article", "w8a8", "too little is published"),
        ("sm8650", "w2a2", "no times were published for the precision 'w2a2'"),
    ],
)
def test_rates_that_are_not_known_are_refused(chip, precision, message):
    with pytest.raises(ValueError, match=message):
        soc.rates(chip, precision)


def test_a_figure_that_nobody_published_is_not_made_up():
    with pytest.raises(ValueError, match="no source gives the figure 'int8' of Snapdragon 888"):
        soc.chip("sm8350").si("int8")
