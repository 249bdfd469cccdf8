import pytest


def test_unknown_names_are_attribute_errors():
    import towers

    with pytest.raises(AttributeError, match="no attribute 'Tower'"):
        towers.Tower  # noqa: B018
    assert set(towers.__all__) <= set(dir(towers))
    names = [getattr(towers, name).__name__ for name in towers.__all__]
    assert [name.removesuffix("_model") for name in names] == towers.__all__  # of `export`
