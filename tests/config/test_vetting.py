"""A config of somebody else can do nothing but configure: it is data, and stays small."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from mi_experiments.config.compose import conf_directory
from mi_experiments.config.vetted_hydra import vet_what_hydra_composes
from mi_experiments.config.vetting import check_yaml, read_config, vet
from mi_experiments.errors import InputError
from mi_experiments.sweeps.run_sweep import open_hydra

vet_what_hydra_composes()  # as the commands do when they start

SECRET = "planted-secret-of-the-environment"
BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
DOUBLING = "v0: word\n" + "".join(f"v{n}: ${{v{n - 1}}}${{v{n - 1}}}\n" for n in range(1, 40))


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", SECRET)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (BOMB, ["more than 100,000 values"]),
        (DOUBLING, ["v1", "characters by what it refers to"]),
        ("a: ${b}\nb: ${a}\n", ["refers to itself"]),
        ("a: {b: '${.c}', c: '${..a.b}'}\n", ["refers to itself"]),
        ("a: &a [*a]\n", ["is not a config"]),
        ("a: " + "[" * 100_000 + "]" * 100_000, ["nests deeper than 50"]),
        ("a: " + "x" * 2**21, ["2,097,155 characters"]),
        ("a: !!python/object/apply:os.system [true]\n", ["line 1", "python/object"]),
        ("a: !!python/name:os.system\n", ["python/name"]),
        ("a: [1\n", ["is not a config: line"]),
        ("- 1\n", ["it has no keys"]),
        ("", ["it has no keys"]),
        ("a: 1\na: 2\n", ["is not a config"]),
        ("a: ${oc.env:PLANTED}\n", ["a=${oc.env:PLANTED} is refused"]),
        ("a: x${oc.decode:${oc.env:PLANTED}}\n", ["is refused"]),
        ("a: ${oc.create:'b'}\n", ["is refused"]),
        ("a: ${oc.env:'PLANTED',x}\n", ["is refused"]),
        ("n: oc.env\na: ${${n}:PLANTED}\n", ["is refused"]),
        ("n: b\na: ${${n}}\n", ["is refused"]),
        ("a: {b: [{_target_: os.system}]}\n", ["a.b.0._target_", "data, not code"]),
        ("hydra: {launcher: {_target_: builtins.open}}\n", ["hydra/launcher builtins.open"]),
        ("hydra: {sweeper: {sampler: {_target_: os.system}}}\n", ["data, not code"]),
        ("hydra: {callbacks: {x: {y: 1}}}\n", ["hydra.callbacks"]),
        ("hydra: {job: {env_set: {LD_PRELOAD: /x}}}\n", ["hydra.job.env_set"]),
        ("hydra: {job: {env_copy: [PLANTED]}}\n", ["hydra.job.env_copy"]),
        ("hydra: {launcher: {setup: [touch /x]}}\n", ["give it on the command line"]),
        ('hydra: {launcher: {comment: "a\\ntouch /x"}}\n', ["line break"]),
    ],
)
def test_a_saved_config_is_data(text: str, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    started = time.perf_counter()
    with pytest.raises(InputError) as refused:
        read_config(file)
    assert time.perf_counter() - started < 5
    line = str(refused.value)
    for part in parts:
        assert part in line
    assert SECRET not in line


def test_bytes_that_are_no_text_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(InputError, match="is not a config"):
        read_config(tmp_path / "config.yaml")


def test_what_refers_to_other_keys_is_read(tmp_path: Path) -> None:
    text = "a: &x {b: 1, c: [x, y]}\nd: *x\ne: ${a.b}-${a.c[1]}-${config_hash:}\nf: {g: '${..e}'}\n"
    (tmp_path / "config.yaml").write_text(text)
    config = read_config(tmp_path / "config.yaml")
    assert OmegaConf.to_container(config) == {
        "a": {"b": 1, "c": ["x", "y"]}, "d": {"b": 1, "c": ["x", "y"]},
        "e": "${a.b}-${a.c[1]}-${config_hash:}", "f": {"g": "${..e}"},
    }  # fmt: skip


def test_commands_of_the_own_shell_are_given_on_the_command_line() -> None:
    config = OmegaConf.create({"hydra": {"launcher": {"setup": ["module load cuda"]}}})
    vet(config, ["hydra.launcher.setup=[module load cuda]"])
    with pytest.raises(InputError):
        vet(config, ["hydra.launcher.partition=gpu"])


def test_every_file_of_conf_passes_as_yaml() -> None:
    for file in Path(conf_directory()).rglob("*.yaml"):
        check_yaml(file.read_text(), str(file))


@pytest.fixture
def compose_from(tmp_path: Path) -> Callable[..., object]:
    """Compose with an experiment file of somebody else, as `mi-run --config-dir` does."""

    def compose(text: str, *overrides: str, mode: RunMode = RunMode.RUN) -> object:
        folder = tmp_path / "foreign" / "experiment"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "x.yaml").write_text(f"# @package _global_\n{text}\n")
        args = argparse.Namespace(config_path=None, config_dir=str(folder.parent))
        with open_hydra(args, conf_directory()) as hydra:
            return hydra.compose_config("config", ["experiment=x", *overrides], run_mode=mode,
                                        with_log_configuration=True)  # fmt: skip

    return compose


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("hydra: {callbacks: {x: {_target_: builtins.open, file: VICTIM, mode: w}}}", "data, not"),
        ("hydra: {hydra_logging: {handlers: {x: {(): builtins.open, file: VICTIM, mode: w}}}}",
         "hydra.hydra_logging is refused"),
        ("hydra: {job_logging: {handlers: {x: {class: logging.FileHandler, filename: VICTIM, "
         "mode: w}}}}", "hydra.job_logging is refused"),
        ("hydra: {job: {env_set: {HF_ENDPOINT: 'https://x'}}}", "set variables in the shell"),
        ("hydra: {job: {env_copy: [NOT_THERE]}}", "NOT_THERE"),
        ("hydra: {job: {name: ../../x}}", "hydra.job.name"),
        ("hydra: {output_subdir: elsewhere}", "hydra.output_subdir"),
        ("tracking: {project: '${oc.env:PLANTED}'}", "tracking.project=${oc.env:PLANTED}"),
        ("defaults: [{override /tracking: '${oc.env:PLANTED}'}]", ""),
        ("model: {x: !!python/name:os.system }", "experiment/x.yaml is not a config"),
        (BOMB, "experiment/x.yaml has more than"),
        ("a: " + "[" * 1000, "experiment/x.yaml nests"),
        ("a: [", "experiment/x.yaml is not a config: line"),
        ("[1, 2]", ""),
    ],
    ids=range(14),
)  # fmt: skip
def test_an_experiment_file_is_data(
    text: str, part: str, compose_from: Callable[..., object], tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with pytest.raises(Exception) as refused:  # noqa: PT011 - Hydra's own refusal is as good
        compose_from(text.replace("VICTIM", str(victim)))
    assert isinstance(refused.value, InputError) or not part
    assert part in str(refused.value)
    assert victim.read_text() == "precious"
    assert "HF_ENDPOINT" not in os.environ


def test_overrides_and_sweeps_are_data_too(compose_from: Callable[..., object]) -> None:
    for override in ("tracking.entity=${oc.env:PLANTED}", "+hydra.callbacks.x._target_=os.system"):
        for mode in RunMode:
            with pytest.raises(InputError, match="is refused"):
                compose_from("seed: 1", override, mode=mode)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("tracking=null", ["tracking=null", "one of auto, disabled, offline, online"]),
        ("n_groups=null", ["n_groups=null", "one of contiguous, energy"]),
        ("dataset=5", ["dataset=5", "one of c4, embedded"]),
        ("model=false", ["model=false", "one of embedded, gpt2"]),
        ("~evaluation", ["~evaluation", "one of c4, embedded"]),
        ("hydra/launcher=null", ["hydra/launcher=null", "basic, joblib"]),
        ("dataset=nosuch", ["dataset=nosuch is not known: one of c4, embedded, ptb, text, wiki"]),
        ("wbits=uniforn", ["wbits=uniforn", "did you mean uniform?"]),
        ("experiment=papers/sparsegpt/opt_125m_5", ["did you mean papers/sparsegpt/opt_125m_50?"]),
    ],
)
def test_what_is_chosen_of_a_group_is_one_of_its_files(
    override: str, parts: list[str], compose_from: Callable[..., object]
) -> None:
    with pytest.raises(InputError) as refused:
        compose_from("seed: 1", override)
    line = str(refused.value)
    for part in parts:
        assert part in line
    assert "\n" not in line
    assert "provider" not in line


def test_choices_end_with_the_last_file(compose_from: Callable[..., object]) -> None:
    with pytest.raises(InputError) as refused:
        compose_from("seed: 1", "hydra/job_logging=nosuch")
    assert str(refused.value).endswith("one of default, disabled, none, stdout")


def test_directories_of_records_may_be_below_the_home(
    compose_from: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    composed = compose_from("hydra: {sweep: {dir: ~/s/x}}", "hydra.run.dir='~/runs/${model.name}'")
    assert composed.hydra.run.dir == "/home/me/runs/embedded"
    assert composed.hydra.sweep.dir == "/home/me/s/x"
