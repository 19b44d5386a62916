"""Old names: refused in a config with the new one, read in a record as the new one."""

import json
from pathlib import Path
from typing import Any

import pytest
from composed import config_of
from hydra.errors import HydraException
from omegaconf import OmegaConf
from synthetic_runs import make_run

from mi_experiments.comparison.columns import find_column
from mi_experiments.comparison.run_table import read_runs
from mi_experiments.config.compose import explain, from_hydra, to_plain
from mi_experiments.config.config import Config
from mi_experiments.config.fields import hint_at
from mi_experiments.config.identity import without_incidental
from mi_experiments.config.renames import (
    ADDED,
    FIELDS,
    KEYS,
    VALUES,
    record_with_new_names,
    with_added,
    with_new_names,
)
from mi_experiments.errors import InputError
from mi_experiments.records.result import RESULT, Result, read_result

OLD_KEYS = {"reuse": False, "recipe.input_share": None, "recipe.residual_share": 0.25}
OLD_VALUES = [(key, old, new) for key, names in VALUES.items() for old, new in names.items()]


def at(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the part of a config that holds a dotted key, and the last name of it."""
    *groups, last = key.split(".")
    for group in groups:
        config = config[group]
    return config, last


def old_config(key: str, value: Any) -> dict[str, Any]:
    """Return the plain form of a run with a renamed key under its old name."""
    config = to_plain(config_of())
    part, last = at(config, KEYS[key])
    del part[last]
    part, last = at(config, key)
    part[last] = value
    return config


def test_new_names_are_keys_and_values_of_the_config() -> None:
    # Hashes are of a pinned row, which a run has not.
    assert {*OLD_KEYS, "expected.fingerprint"} == KEYS.keys()
    for key in [*KEYS.values(), *VALUES]:
        assert hint_at(Config, key.split(".")) is not None
    for key, _, new in OLD_VALUES:
        assert to_plain(config_of(f"{key}={new}"))["recipe"][key.split(".")[1]] == new
    assert set(FIELDS.values()) <= set(Result.__dataclass_fields__)
    assert not set(FIELDS) & set(Result.__dataclass_fields__)


@pytest.mark.parametrize(("key", "value"), OLD_KEYS.items())
def test_an_old_key_is_one_line_with_the_new_one(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{key} is called {KEYS[key]} now: write .*=0\.5$"):
        config_of(f"+{key}=0.5")
    with pytest.raises(HydraException) as caught:
        config_of(f"{key}=0.5")
    assert explain(caught.value) == f"{key} is called {KEYS[key]} now: write {KEYS[key]}=VALUE"
    # As in the config that an older run has saved, or in an experiment file.
    shown = {False: "false", None: "null"}.get(value, value)
    with pytest.raises(InputError, match=rf"^{key} is called .* now: write {KEYS[key]}={shown}$"):
        from_hydra(OmegaConf.create(old_config(key, value)))


@pytest.mark.parametrize(("key", "old", "new"), OLD_VALUES)
def test_an_old_value_is_one_line_with_the_new_one(key: str, old: str, new: str) -> None:
    with pytest.raises(InputError, match=rf"^{key}={old} is called {new} now: write {key}={new}$"):
        config_of(f"{key}={old}")


@pytest.mark.parametrize(("key", "value"), OLD_KEYS.items())
def test_an_old_config_is_read_under_new_names(key: str, value: Any) -> None:
    read = with_new_names(old_config(key, value))
    part, last = at(read, KEYS[key])
    assert part[last] == value
    assert with_new_names(read) == read
    from_hydra(OmegaConf.create(read))


def test_hashes_of_an_old_row_are_read_under_their_new_name() -> None:
    hashes = {"model_files.config.json": "0"}
    read = with_new_names({"expected": {"fingerprint": hashes}})
    assert read == {"expected": {"content_hashes": hashes}}


@pytest.mark.parametrize(("key", "old", "new"), OLD_VALUES)
def test_an_old_value_is_read_as_the_new_one(key: str, old: str, new: str) -> None:
    group, last = key.split(".")
    assert with_new_names({group: {last: old, "other": old}}) == {group: {last: new, "other": old}}
    # A key of the same name elsewhere is another key.
    assert with_new_names({last: old}) == {last: old}


@pytest.mark.parametrize(("key", "value"), ADDED.items())
def test_a_key_that_was_added_is_what_every_earlier_run_did(key: str, value: Any) -> None:
    config, older = to_plain(config_of()), to_plain(config_of())
    part, last = at(config, key)
    part[last] = value
    part, last = at(older, key)
    del part[last]
    assert with_added(older) == config
    assert to_plain(from_hydra(OmegaConf.create(older))) == config
    assert without_incidental(older) == without_incidental(config)
    part[last] = "other"
    assert with_added(older) == older
    assert without_incidental(older) != without_incidental(config)


@pytest.mark.parametrize("record", [[], 3, {}, {"config": None}, {"config": [1]}])
def test_what_is_no_record_is_refused_as_before(record: Any) -> None:
    with pytest.raises(TypeError, match="no config"):
        record_with_new_names(record)


def test_records_of_earlier_versions_stand_beside_those_of_today(tmp_path: Path) -> None:
    for name, fit in (("old", "survivors"), ("new", "compensated")):
        make_run(tmp_path / name)
        file = tmp_path / name / RESULT
        record = json.loads(file.read_text())
        record["config"]["recipe"] |= {"grid_fit": fit, "residual_correction": 0.5}
        if name == "old":
            record["config"]["recipe"]["residual_share"] = record["config"]["recipe"].pop(
                "residual_correction"
            )
            record["reused"] = record.pop("from_cache") | {"plan": ["site_costs/fisher"]}
        file.write_text(json.dumps(record))
    assert read_result(tmp_path / "old").from_cache == {"plan": ["site_costs/fisher"]}
    assert read_result(tmp_path / "old").config == read_result(tmp_path / "new").config
    frame = read_runs([tmp_path])
    assert frame["recipe.residual_correction"].tolist() == [0.5, 0.5]
    with pytest.raises(InputError, match=r"residual_share is called recipe\.residual_correction"):
        find_column(frame, "recipe.residual_share")
