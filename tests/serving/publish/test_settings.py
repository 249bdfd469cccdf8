import dataclasses

import pytest

from serving.publish.settings import ExportConfig, VersionOptions

EXPORT = ExportConfig(data="data", run="run", models="models")


def test_an_export_passes_its_choices_on():
    config = ExportConfig(
        data="data", run="run", models="models", name="shop", k=7, version=3, scann=False
    )
    options = VersionOptions(name="shop", k=7, version=3, scann=False)
    assert config.version_options() == options


def test_the_defaults_of_an_export_are_those_of_a_version():
    assert EXPORT.version_options() == VersionOptions()


def test_an_export_of_a_bundle_needs_no_run():
    config = ExportConfig(bundle="bundle", models="models", at=10)
    assert config.version_options() == VersionOptions(at=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"version": -1}, "version must be at least 0, got -1"),
        ({"target_recall": 1.5}, "target_recall must be above 0 and at most 1, got 1.5"),
        ({"scann_leaves": -2}, "scann_leaves must be at least 0, got -2"),
        ({"name": "../up"}, "name must be letters"),
        ({"name": ".hidden"}, "name must be letters"),
        ({"run": ""}, "run must be a directory"),
        ({"models": ""}, "models must be a directory"),
        ({"at": 101}, "at must be at most k, 100, got 101"),
        ({"at": -1}, "at must be at least 0, got -1"),
        ({"bundle": "there"}, "takes --bundle, or --data and --run, not both"),
    ],
)
def test_an_export_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EXPORT, **change)
