import pytest
from tensorflow_serving.apis import get_model_status_pb2
from tensorflow_serving.config import model_server_config_pb2

from serving.runtime.configuration import ModelConfig, from_proto, read_config
from serving.version.names import State

TEXT = """
model_config_list {
  config { name: "newest" base_path: "/models/newest" model_platform: "tensorflow" }
  config {
    name: "two"
    model_version_policy { latest { num_versions: 2 } }
  }
  config { name: "every" model_version_policy { all {} } }
  config {
    name: "pinned"
    base_path: "elsewhere"
    model_version_policy { specific { versions: 3 versions: 5 } }
    version_labels { key: "stable" value: 3 }
    version_labels { key: "canary" value: 5 }
  }
}
"""


def test_a_config_file_is_that_of_tensorflow_serving():
    assert read_config(TEXT.encode(), "models.config") == [
        ModelConfig("newest", "/models/newest", latest=1),
        ModelConfig("two", "", latest=2),
        ModelConfig("every", "", latest=0),
        ModelConfig("pinned", "elsewhere", specific=(3, 5), labels={"stable": 3, "canary": 5}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_config_list { config { nam: 'a' } }", "cannot be read: 1:30"),
        ("", "must have a model_config_list"),
        ("model_config_list { config { name: '../up' } }", "name must be letters"),
        ("model_config_list { config { base_path: '/models/a' } }", "name must be letters"),
        (
            "model_config_list { config { name: 'a' } config { name: 'a' } }",
            "must name a model once, got 'a' twice",
        ),
        (
            "model_config_list { config { name: 'a' model_platform: 'other' } }",
            "model_platform of 'a' must be 'tensorflow', got 'other'",
        ),
        (
            "model_config_list { config { name: 'a' model_version_policy { specific {} } } }",
            "specific versions of 'a' must be named",
        ),
    ],
)
def test_a_config_file_that_is_wrong_says_so(text, message):
    with pytest.raises(ValueError, match=message):
        read_config(text.encode(), "models.config")


def test_a_base_path_that_is_no_directory_of_this_machine():
    proto = model_server_config_pb2.ModelServerConfig()
    proto.model_config_list.config.add(name="shop", base_path="gs://bucket/shop")
    with pytest.raises(ValueError, match=r"base_path of 'shop' must be a directory .*gs://bucket"):
        from_proto(proto)


def test_what_is_not_done_of_a_config_is_logged(caplog):
    proto = model_server_config_pb2.ModelServerConfig()
    model = proto.model_config_list.config.add(name="shop")
    model.logging_config.sampling_config.sampling_rate = 0.1
    assert from_proto(proto) == [ModelConfig("shop")]
    assert "logging_config of 'shop' is ignored" in caplog.text


def test_an_empty_list_serves_nothing():
    proto = model_server_config_pb2.ModelServerConfig()
    proto.model_config_list.SetInParent()
    assert from_proto(proto) == []


def test_states_have_the_numbers_of_tensorflow_serving():
    theirs = dict(get_model_status_pb2.ModelVersionStatus.State.items())
    del theirs["UNKNOWN"]
    assert {state.name: state.value for state in State} == theirs


@pytest.mark.parametrize(
    ("policy", "broken", "chosen"),
    [
        (ModelConfig("shop"), (), [9]),
        (ModelConfig("shop"), (9, 4), [3]),
        (ModelConfig("shop", latest=2), (), [9, 4]),
        (ModelConfig("shop", latest=2), (4,), [9, 3]),
        (ModelConfig("shop", latest=0), (4,), [9, 3, 1]),
        (ModelConfig("shop", specific=(3, 9, 77)), (), [9, 3]),
        (ModelConfig("shop", specific=(3,)), (3,), []),
        (ModelConfig("shop"), (1, 3, 4, 9), []),
    ],
)
def test_a_policy_chooses_from_what_is_usable(policy, broken, chosen):
    assert policy.choose([1, 9, 3, 4], lambda number: number not in broken) == chosen


def test_what_is_not_needed_is_not_looked_at():
    asked = []
    ModelConfig("shop", latest=2).choose(range(100), lambda number: asked.append(number) or True)
    assert asked == [99, 98]
