import pytest


def test_unknown_names_are_attribute_errors():
    import towers

    with pytest.raises(AttributeError, match="no attribute 'Tower'"):
        towers.Tower  # noqa: B018
    assert set(towers.__all__) <= set(dir(towers))
    assert towers.PRESETS["best"]["tower"] == "fism"
    others = [name for name in towers.__all__ if name != "PRESETS"]
    names = [getattr(towers, name).__name__ for name in others]
    assert [name.removesuffix("_model") for name in names] == others  # of `export`
