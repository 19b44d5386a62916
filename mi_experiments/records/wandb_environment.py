"""The variables WANDB_…: which of them the client of Weights & Biases refuses, and life without.

One that it refuses ends all recording, whatever it is for. So those are taken away while records
are opened, and said; the records stay here, since nobody knows where they were meant to go.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import wandb
from pydantic import ValidationError

from mi_experiments.config.secrets import scrub

PREFIX = "WANDB_"


@contextmanager
def sound_environment(ignored: tuple[str, ...] = ()) -> Iterator[str | None]:
    """Take away for a while what the client refuses; yields the line that says so, or None.

    Args:
        ignored: variables that have no say, whether they are refused or not.
    """
    reasons = refused_variables(os.environ)
    said = [
        f"{name}={os.environ[name].strip()} is refused by the client ({reason})"
        for name, reason in reasons.items()
        if name not in ignored
    ]
    # Before they are taken away: what is masked is what the environment holds.
    line = scrub("; ".join(said) + ": correct it, or unset it") if said else None
    kept = {name: os.environ.pop(name) for name in reasons}
    try:
        yield line
    finally:
        os.environ.update(kept)


def refused_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the reason for each variable that the client refuses."""
    given = {name: value for name, value in environment.items() if name.startswith(PREFIX)}
    refused = {}
    for name, value in given.items():
        if reason := refusal({name: value}):
            refused[name] = reason
    sound = {name: value for name, value in given.items() if name not in refused}
    if reason := refusal(sound):
        refused |= dict.fromkeys(sound, f"with the others: {reason}")
    return refused


def refusal(variables: dict[str, str]) -> str | None:
    """Return why the client refuses variables; None if it takes them."""
    try:
        wandb.Settings().update_from_env_vars(variables)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    except Exception as error:  # noqa: BLE001 - whatever it is, it would end all recording
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
