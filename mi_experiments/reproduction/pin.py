"""Pin a finished run: its settings, its numbers, and the content hashes of all that they are of."""

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mi_experiments.config.identity import without_incidental
from mi_experiments.errors import InputError
from mi_experiments.persistence.atomic import write_atomically
from mi_experiments.records.record_check import check_record
from mi_experiments.records.result import read_result
from mi_experiments.reproduction.verdicts import by_key, content_hashes

DENSE, COMPRESSED = 1e-5, 5e-3
"""Tolerances, as shares. The embedded run with one and two threads, and with AVX-512, AVX2 or no
vector instructions, moved by 3e-8 dense, and compressed, where a channel on the edge of a group or
a code on the edge of rounding falls to the other side and all later ones follow, by 2.3e-3 at most
between two of five runs. Seeds and settings are told by their hashes, not by these, and on the same
machine the bits are."""

BECAUSE = {
    "dense": "other kernels sum in another order; 3e-8 was measured",
    "compressed": "groups and codes on an edge fall to the other side; 2.3e-3 was measured",
}


def pin(run_dir: Path, name: str, conf: Path) -> Path:
    """Write `experiment/pinned/NAME.yaml` from a completed run, and return its path.

    Raises:
        InputError: the run is not complete, its files contradict each other, or the name is not a
            plain one.
    """
    if not name.isidentifier():
        raise InputError(f"--pin {name}: a name has letters, digits and _ only")
    try:
        result = read_result(run_dir)
    except FileNotFoundError:
        raise InputError(f"--pin {run_dir}: no run is recorded there") from None
    if result.status != "completed" or result.provenance is None:
        raise InputError(f"--pin {run_dir}: the run is {result.status}, not completed")
    if contradictions := check_record(run_dir, whole=True):
        raise InputError(f"--pin {run_dir}: {'; '.join(contradictions)}")
    saved = run_dir / ".hydra" / "hydra.yaml"
    try:
        choices = dict(OmegaConf.load(saved).hydra.runtime.choices)
    except (
        YAMLError, OmegaConfBaseException, AttributeError, ValueError, TypeError, RecursionError
    ) as error:  # fmt: skip
        line = " ".join(str(error).split())
        raise InputError(
            f"--pin {run_dir}: {saved} does not say what was chosen: {line}"
        ) from error
    groups = [
        {f"override /{group}": choice}
        for group, choice in choices.items()
        if not str(group).startswith(("hydra/", "experiment", "tracking", "corpora"))
    ]
    numbers = {
        phase: {
            "where": "this run",
            "evidence": "own",
            "comparison": "within",
            "tolerance": share,
            "because": BECAUSE[phase],
            "values": {key: found.value for key, found in by_key(getattr(result, phase)).items()},
        }
        for phase, share in (("dense", DENSE), ("compressed", COMPRESSED))
    }
    expected = {
        "source": f"{plain(result.provenance.command)}, {result.provenance.started}",
        **numbers,
        "content_hashes": content_hashes(result),
    }
    content = {"defaults": [*groups, "_self_"], **without_incidental(result.config)}
    text = OmegaConf.to_yaml(OmegaConf.create({**content, "expected": expected}))
    folder = conf / "experiment" / "pinned"
    folder.mkdir(parents=True, exist_ok=True)
    header = f"# @package _global_\n# Written by mi-reproduce --pin RUN_DIR {name}.\n"
    write_atomically(folder / f"{name}.yaml", (header + text).encode())
    return folder / f"{name}.yaml"


def plain(command: str) -> str:
    """Return a command without what only says where its records go on this machine."""
    return " ".join(part for part in command.split() if not part.startswith("hydra."))
