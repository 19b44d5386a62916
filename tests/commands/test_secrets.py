"""Nothing that a command leaves, or says, holds a secret; and paths are none."""

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Ended, run_directories

from mi_experiments.records.result import read_result

KEY = "0123456789abcdef" * 2 + "deadbeef"
TOKEN = "hf_" + "aB3" * 11
SECRET = "wJalrXUtnFEMI"


def everything_left(root: Path) -> str:
    """Return all names and contents below a folder, as text."""
    paths = list(root.rglob("*"))
    contents = [path.read_bytes() for path in paths if path.is_file()]
    return "\n".join(map(str, paths)) + b"\n".join(contents).decode(errors="replace")


@pytest.mark.parametrize(
    "given",
    [
        ["model=hub", f"model.path=org/{TOKEN}", "model.offline=true"],
        ["model.path=https://planted-user:planted-word@host/x"],
        ["model.path='https://host/x?token=planted-query'"],
        [f"model.name={SECRET}", "model.path=/nowhere"],
        ["-m", f"model.name={TOKEN},b", "model.path=/nowhere"],
        ["-m", f"model.path=/nowhere/{SECRET},/nowhere/b", f"tracking.tags=[{SECRET}]"],
        [f"tracking.entity={TOKEN}", "tracking.project=planted/word", f"+{TOKEN}=1"],
    ],
)
def test_no_secret_is_left_or_said(
    mi_run: Callable[..., Ended], given: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    model = [] if "model=hub" in given else ["model=local"]
    ended = mi_run(*model, *given, "tracking=disabled")
    assert ended.code == 2, ended.err
    said = ended.out + ended.err + everything_left(tmp_path)
    assert "Traceback" not in said
    for secret in (TOKEN, SECRET, "planted-user", "planted-word", "planted-query"):
        assert secret not in said, secret


def test_a_path_that_looks_like_a_secret_is_gone_on_with(
    mi_run: Callable[..., Ended], local: list[str], tiny_directory: Path, tmp_path: Path,
    interrupt_at: Callable[[int], None],
) -> None:  # fmt: skip
    folder = tmp_path / "hf_checkpoints" / KEY
    folder.parent.mkdir()
    tiny_directory.rename(folder)
    given = [word.replace(str(tiny_directory), str(folder)) for word in local]
    interrupt_at(3)
    assert mi_run(*given, f"tracking.tags=[{TOKEN}]", "hydra.run.dir=run").code == 75
    assert str(folder) in Path("run/.hydra/config.yaml").read_text()
    assert read_result(Path("run")).config["model"]["path"] == str(folder)
    ended = mi_run("resume=run")
    assert ended.code == 2
    assert "tracking.tags.0 is masked in run/.hydra/config.yaml" in ended.err
    ended = mi_run("resume=run", "tracking.tags=[]")
    assert ended.code == 0, ended.err
    assert [read_result(path).status for path in run_directories(tmp_path)] == ["completed"]
    assert TOKEN not in everything_left(tmp_path)


def test_a_run_of_somebody_else_reads_no_secret(
    mi_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    folder = Path("foreign/.hydra")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("tracking: {project: '${oc.env:AWS_SECRET_ACCESS_KEY}'}\n")
    ended = mi_run("resume=foreign")
    assert ended.code == 2
    assert "tracking.project=${oc.env:AWS_SECRET_ACCESS_KEY} is refused" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert SECRET not in ended.err + everything_left(Path("foreign"))
