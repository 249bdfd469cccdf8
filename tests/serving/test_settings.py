import pytest

import twotower
from serving.settings import ADMIN_TOKEN_VARIABLE, TOKEN_VARIABLE, ServeConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ""}, "models must be a directory, got ''"),
        ({"index": "fast"}, "index must be one of default, exact, scann, got 'fast'"),
        ({"unknown_queries": "guess"}, "unknown_queries must be one of popular, empty, error"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"max_k": 0}, "max_k must be at least 1, got 0"),
        ({"num_batch_threads": 0}, "num_batch_threads must be at least 1, got 0"),
        ({"batch_timeout_micros": -1}, "batch_timeout_micros must be at least 0, got -1"),
        ({"prune_versions": -1}, "prune_versions must be at least 0, got -1"),
        ({"rest_port": 65536}, "rest_port must be at most 65535, got 65536"),
        ({"grpc_port": -1}, "grpc_port must be at least 0, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"workers": 2, "prune_versions": 1}, "prune_versions must be 0 where workers are several"),
        ({"rest_port": 80, "grpc_port": 80}, "rest_port and grpc_port must differ, got 80 twice"),
        ({"poll_seconds": 0.0}, "poll_seconds must be above 0, got 0"),
        ({"poll_seconds": float("nan")}, "poll_seconds must be above 0, got nan"),
    ],
)
def test_a_service_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(**{"models": "models", **change})


def test_it_listens_to_this_machine_alone_unless_told_otherwise():
    assert ServeConfig("models").host == "127.0.0.1"


def test_a_token_comes_from_the_environment_and_is_not_shown(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert ServeConfig("models").token == ""
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    assert ServeConfig("models").token == "secret"
    assert "secret" not in repr(ServeConfig("models"))
    assert ServeConfig("models", token="given").token == "given"


@pytest.mark.parametrize(
    ("tokens", "given", "accepted"),  # accepted: for a prediction, for what the admin may do
    [
        ({}, b"", (True, True)),
        ({"token": "s3cret ñ"}, "Bearer s3cret ñ".encode(), (True, True)),
        ({"token": "s3cret ñ"}, b"Bearer s3cret", (False, False)),
        ({"token": "s3cret"}, b"s3cret", (False, False)),
        ({"token": "s3cret"}, b"bearer s3cret", (True, True)),
        ({"token": "s3cret"}, b"Basic s3cret", (False, False)),
        ({"token": "s3cret"}, b"", (False, False)),
        ({"admin_token": "adm1n"}, b"", (True, False)),
        ({"admin_token": "adm1n"}, b"Bearer adm1n", (True, True)),
        ({"token": "s3cret", "admin_token": "adm1n"}, b"Bearer s3cret", (True, False)),
        ({"token": "s3cret", "admin_token": "adm1n"}, b"Bearer adm1n", (True, True)),
    ],
)
def test_who_is_let_in(tokens, given, accepted, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(ADMIN_TOKEN_VARIABLE, raising=False)
    config = ServeConfig("models", **tokens)
    assert tuple(config.accepts(given, admin=admin) for admin in (False, True)) == accepted


def test_a_token_comes_from_a_file_and_never_from_an_argument(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(TOKEN_VARIABLE, "of the environment")
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    config = ServeConfig("models", token_file=str(file))
    assert config.token == "s3cret"
    assert "s3cret" not in repr(config)
    assert twotower.main(["serve", "--models", "models", "--token", "s3cret"]) == 2
    assert "unknown argument --token" in capsys.readouterr().err
    for content, message in ((b" \n", "must hold a token"), (b"\xff", "cannot be read")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"token_file .*{message}"):
            ServeConfig("models", token_file=str(file))
    file.unlink()
    with pytest.raises(ValueError, match=r"admin_token_file .* cannot be read"):
        ServeConfig("models", admin_token_file=str(file))
    assert twotower.main(["serve", "--help", "all"]) == 0
    text = capsys.readouterr().out
    assert "--admin_token_file" in text
    assert "--admin_token " not in text
