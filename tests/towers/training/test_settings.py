import pytest

from towers.evaluation.settings import EvaluateConfig
from towers.training.settings import TrainConfig


def test_options_become_text_by_name():
    config = TrainConfig(data="d", run="r", options=("alpha=.2", "positive_twice=true"))
    assert config.method_options == {"alpha": ".2", "positive_twice": "true"}
    assert TrainConfig(data="d", run="r", options={"alpha": 0.2}).options == ("alpha=0.2",)


def test_command_line():
    simple_parsing = pytest.importorskip("simple_parsing")
    flags = "--data d --run r --options a=1 b=2 --normalize --jit_compile false --l2 0"
    config = simple_parsing.parse(TrainConfig, args=flags.split())
    assert config.method_options == {"a": "1", "b": "2"}
    assert (config.normalize, config.jit_compile, config.l2) == (True, False, 0)
    flags = "--data d --run r --ks 5 7"
    assert simple_parsing.parse(EvaluateConfig, args=flags.split()).ks == (5, 7)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("data", "", "data must be given"),
        ("dim", 0, "dim must be at least 1, got 0; change dim"),
        ("epochs", 0, "epochs must be at least 1"),
        ("decay_epochs", 0, "decay_epochs must be at least 1"),
        ("batch_size", 1, "batch_size must be at least 2"),
        ("temperature", 0.0, "temperature must be above 0"),
        ("learning_rate", 0.0, "learning_rate must be above 0"),
        ("learning_rate_decay", 1.5, r"must be in \(0, 1\]"),
        ("l2", -1.0, "l2 must be at least 0"),
        ("patience", -1, "patience must be at least 0"),
        ("checkpoint_minutes", 0.0, "checkpoint_minutes must be above 0"),
        ("reduction", "max", "must be mean or sum"),
        ("options", ("alpha",), "must be name=value, got 'alpha'"),
        ("validation_metric", "recal@50", "validation_metric must be one of recall"),
        ("validation_metric", "recall", "cut-off"),
        ("validation_metric", "recall@0", "cut-off"),
    ],
)
def test_wrong_training_settings_are_errors(field, value, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**({"data": "d", "run": "r"} | {field: value}))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("run", "", "run must be given"),
        ("ks", (), "one or more numbers"),
        ("ks", (0,), "one or more numbers"),
        ("split", "train", "must be test or validation"),
        ("history", "old", "must be stale or live"),
    ],
)
def test_wrong_evaluation_settings_are_errors(field, value, text):
    with pytest.raises(ValueError, match=text):
        EvaluateConfig(**({"data": "d", "run": "r"} | {field: value}))
