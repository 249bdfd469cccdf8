"""The lists of methods and towers."""

import re
from pathlib import Path

import pytest

import twotower
from samplers.methods.by_name import METHODS, option_types
from towers.catalogue import STEP_COSTS
from towers.encoders.tower_config import TOWERS

DOCS_METHODS = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


def listed(capsys, *arguments):
    assert twotower.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_every_method_is_listed_with_the_cost_that_the_docs_give(capsys):
    rows = re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \|(?:.*\|) ([\d., ]+)(?: \(.*\))? \|", DOCS_METHODS, re.M
    )
    costs = {}
    for names, values in rows:
        costs |= zip(re.findall(r"\w+", names), map(float, values.split(",")), strict=True)
    assert costs == STEP_COSTS
    assert list(METHODS) == re.findall(r"^(\w+) +[\d.]+  ", listed(capsys, "methods"), re.M)


@pytest.mark.parametrize("name", ["bmns", "bpr"])
def test_a_method_is_shown_with_its_paper_and_options(capsys, name):
    out = listed(capsys, "methods", name)
    assert METHODS[name].__doc__.splitlines()[0] in out
    assert all(f"  {option} (" in out for option in option_types(name))


def test_towers_are_listed_and_shown_with_the_flags_that_they_read(capsys):
    assert list(TOWERS) == re.findall(r"^([a-z_]+) +\S", listed(capsys, "towers"), re.M)[1:8]
    assert re.findall(r"^  (\w+) \(", listed(capsys, "towers", "light_gcn"), re.M) == [
        "num_layers",
        "batch_l2",
        "popularity_power",
    ]
