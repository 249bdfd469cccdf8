import pytest


def test_unknown_names_are_attribute_errors():
    import towers

    with pytest.raises(AttributeError, match="no attribute 'Tower'"):
        towers.Tower  # noqa: B018
    assert set(towers.__all__) <= set(dir(towers))
    assert all(getattr(towers, name).__name__ == name for name in towers.__all__)
