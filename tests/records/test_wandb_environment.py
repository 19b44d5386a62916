"""A variable that the client refuses is named, and does not cost the records."""

import os

import pytest

from mi_experiments.records.wandb_environment import refused_variables, sound_environment


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_MODE", "ofline"),
        ("WANDB_MODE", ""),
        ("WANDB_BASE_URL", "my-server:8080"),
        ("WANDB_RUN_ID", "team/run"),
        ("WANDB_RUN_ID", ""),
        ("WANDB_PROJECT", "team/project"),
        ("WANDB_TAGS", ""),
        ("WANDB_CONSOLE", "loud"),
        ("WANDB_INIT_TIMEOUT", "soon"),
        ("WANDB_RESUME", "maybe"),
    ],
)
def test_what_the_client_refuses_is_taken_away_and_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in [other for other in os.environ if other.startswith("WANDB_")]:
        monkeypatch.delenv(other)
    monkeypatch.setenv("WANDB_NOTES", "sound")
    monkeypatch.setenv(name, value)
    with sound_environment() as line:
        assert name not in os.environ
        assert os.environ["WANDB_NOTES"] == "sound"
    assert line is not None
    assert line.startswith(f"{name}={value} is refused by the client (")
    assert "\n" not in line
    assert os.environ[name] == value
    with sound_environment(ignored=(name,)) as line:
        assert name not in os.environ
        assert line is None


def test_what_the_client_takes_is_left_alone() -> None:
    sound = {"WANDB_MODE": "offline", "WANDB_BASE_URL": "https://host", "WANDB_X": "unknown"}
    assert refused_variables(sound) == {}
    assert refused_variables({"MODE": "ofline"}) == {}


def test_the_value_of_a_key_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", " planted-key ")
    with sound_environment() as line:
        assert line is not None
        assert "WANDB_API_KEY=***" in line
        assert "planted" not in line
