import subprocess
import sys

import pytest

KERAS_3_FIRST = """
import os
os.environ.pop("TF_USE_LEGACY_KERAS", None)
import tensorflow as tf
tf.keras.Model
import towers
try:
    towers.TwoTower
except ImportError as error:
    assert "Keras 3 is already loaded" in str(error), error
    assert "\\n" not in str(error)
else:
    raise AssertionError("no ImportError")
"""
TOWERS_FIRST = """
import os, sys
os.environ.pop("TF_USE_LEGACY_KERAS", None)
import tensorflow as tf
before = set(sys.modules)
import towers, towers.training.settings
new = {name.split('.')[0] for name in set(sys.modules) - before}
assert not new & {'keras', 'tf_keras', 'tensorflow_recommenders', 'apache_beam', 'serving'}, new
towers.TwoTower
import tf_keras
assert tf.keras.Model is tf_keras.Model
assert not any(m.split('.')[0] in ('apache_beam', 'serving') for m in sys.modules)
"""


@pytest.mark.parametrize("code", [KERAS_3_FIRST, TOWERS_FIRST])
def test_keras_loads_late_and_in_one_generation(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors():
    import towers

    with pytest.raises(AttributeError, match="no attribute 'Tower'"):
        towers.Tower  # noqa: B018
    assert set(towers.__all__) <= set(dir(towers))
    assert all(getattr(towers, name).__name__ == name for name in towers.__all__)
