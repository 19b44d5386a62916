"""A run directory that somebody else made, or that was edited, reaches nothing outside of it."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from mi_experiments.config.compose import conf_directory, from_hydra
from mi_experiments.errors import InputError
from mi_experiments.experiment.directory import lock_run, log_file
from mi_experiments.persistence.atomic import open_plain
from mi_experiments.persistence.commits import Commits, read_manifest
from mi_experiments.sweeps.outcomes import lock_sweep


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


LEADING_OUT = (
    "site_costs/../../outside/precious.txt", "../outside/precious.txt", "/etc/hostname", "", ".",
    "..", "site_costs//x", "./x", "site_costs/./x", "site_costs/../plan.safetensors",
    "site_costs\\x", "site_costs/x\0y",
    "site_costs/", "linked/precious.txt", "linked/more/precious.txt",
)  # fmt: skip


@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_name_that_leads_out_of_the_directory_is_refused_and_nothing_removed(
    name: str, tmp_path: Path
) -> None:
    outside, run_dir = tmp_path / "outside", tmp_path / "run"
    (outside / "more").mkdir(parents=True)
    for precious in (outside / "precious.txt", outside / "more" / "precious.txt"):
        precious.write_text("x")
    run_dir.mkdir()
    commits = Commits(run_dir, {"seed": 0})
    commits.commit({"site_costs/sound": b"1"})
    (run_dir / "linked").symlink_to(outside)
    commits.files[name] = {"sha256": "0", "bytes": 1}
    commits._write_manifest()
    before = contents(tmp_path)
    for use in (lambda: read_manifest(run_dir), lambda: Commits(run_dir, {"seed": 0})):
        with pytest.raises(InputError, match=r"no name of a file below it|is a link") as refused:
            use()
        assert "\n" not in str(refused.value)
    # Nor where the name has come in by another way.
    for use in (lambda: commits.discard(name.split("/")[0]), lambda: commits.find(name)):
        with pytest.raises(InputError, match=r"no name of a file below it|is a link"):
            use()
    with pytest.raises(InputError, match=r"no name of a file below it|is a link"):
        commits.commit({name: b"2"})
    assert contents(tmp_path) == before
    assert outside.is_dir()


@pytest.mark.parametrize("change", [
    lambda c: c["run_identity"].update(threads=2),
    lambda c: c["files"].pop("one"),
    lambda c: c["files"]["one"].update(sha256="0" * 64),
    lambda c: c.update(seal={}),
    lambda c: c.update(seal=[]),
])  # fmt: skip
def test_an_edited_manifest_is_refused(change: Callable[[Any], object], tmp_path: Path) -> None:
    Commits(tmp_path, {"threads": 1}).commit({"one": b"1"})
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"manifest\.json is damaged .*choose another directory"):
        Commits(tmp_path, {"threads": 1})


def test_a_manifest_that_is_nested_too_deep_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def hold_run(run_dir: Path) -> None:
    with initialize_config_dir(conf_directory(), version_base="1.3"):
        config = from_hydra(compose("config"))
    with lock_run(run_dir, config):
        pass


def write_log(run_dir: Path) -> None:
    with log_file(run_dir):
        pass


def hold_sweep(run_dir: Path) -> None:
    with lock_sweep(run_dir):
        pass


OPENED = {"run.lock": hold_run, "run.log": write_log, "sweep.lock": hold_sweep}
"""What is opened to be written in place, and not made anew."""


@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("there", [True, False])
def test_what_is_written_in_place_follows_no_link(name: str, there: bool, tmp_path: Path) -> None:
    victim, run_dir = tmp_path / "victim", tmp_path / "run"
    run_dir.mkdir()
    if there:
        victim.write_text("precious")
    (run_dir / name).symlink_to(victim)
    with pytest.raises(InputError, match=rf"{name} cannot be written: it is a link; remove it"):
        OPENED[name](run_dir)
    assert victim.exists() == there
    assert not there or victim.read_text() == "precious"


@pytest.mark.parametrize("name", OPENED)
def test_what_is_written_in_place_is_a_file(name: str, tmp_path: Path) -> None:
    """A pipe that nobody reads would be waited for, for ever."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} cannot be written: "):
        OPENED[name](tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{name} cannot be written: Is a directory"):
        OPENED[name](tmp_path)


def test_a_plain_file_is_appended_to_with_the_mode_of_umask(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        for word in ("one", "two"):
            with open_plain(tmp_path / "log", "a") as file:
                file.write(word)
    finally:
        os.umask(umask)
    assert (tmp_path / "log").read_text() == "onetwo"
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600
