"""The wheel works without a checkout: a slow test, because it builds and installs."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_built_wheel_runs_from_any_directory(tmp_path: Path) -> None:
    """Build, install beside the present libraries, and compose from the configs it carries."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("mi_experiments-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    subprocess.run([*install, "--no-deps", wheel], check=True)
    libraries = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    # The libraries of this environment, without the editable install that it also holds.
    paths = [str(tmp_path / "venv" / "lib" / libraries.parent.name / "site-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(libraries)])}
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "mi-run", "dry_run=true", "wbits.average=3.25"],
        cwd=tmp_path, capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert "3.25" in done.stdout
    assert (tmp_path / "outputs").is_dir()
