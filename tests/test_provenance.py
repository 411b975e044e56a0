"""What a record tells of how it was made: code, whatever git says, and the command, without the machine's folders."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy import CPU

from kdstudy import provenance

PACKAGE = Path(provenance.__file__).parent


def test_a_session_is_plain_json():
    told = provenance.session(CPU)
    assert json.loads(json.dumps(told)) == told
    assert all(type(value) in (str, type(None)) for value in told.values())
    assert {"started", "command", "commit", "code", "device", "python", "torch", "torchvision", "numpy"} <= set(told)


def test_the_code_is_known_by_its_bytes(tmp_path, monkeypatch):
    lines = [(path.name, hashlib.sha256(path.read_bytes()).digest()) for path in PACKAGE.glob("*.py")]
    expected = hashlib.sha256(b"".join(f"{name}\n".encode() + digest for name, digest in sorted(lines))).hexdigest()
    provenance.code.cache_clear()
    assert provenance.code() == expected[:16]
    (tmp_path / "one.py").write_text("a = 1\n")
    monkeypatch.setattr(provenance, "SOURCES", tmp_path)
    seen = set()
    for content in ("a = 1\n", "a = 2\n"):
        (tmp_path / "one.py").write_text(content)
        provenance.code.cache_clear()
        seen.add(provenance.code())
    (tmp_path / "one.py").rename(tmp_path / "other.py")
    provenance.code.cache_clear()
    assert len(seen | {provenance.code()}) == 3
    provenance.code.cache_clear()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "--profile", "thesis"], "python -m kdstudy run --profile thesis"),
        (["run", "--out", "/mnt/box 7/runs"], "python -m kdstudy run --out runs"),
        (["run", "--out=/mnt/box/runs", "--set", "a.b=/x/y.npz"], "python -m kdstudy run --out=runs --set a.b=y.npz"),
        (
            ["run", "--out", "here/runs", "--set", "a.b=[1, 2]"],
            "python -m kdstudy run --out here/runs --set 'a.b=[1, 2]'",
        ),
    ],
)
def test_a_command_is_told_without_the_folders_of_the_machine(words, told, monkeypatch):
    monkeypatch.setenv(provenance.COMMAND, "")
    provenance.tell_command(words)
    assert provenance.command() == told


def test_changes_in_the_tree_are_told_and_where_there_is_no_git_the_environment_tells(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    def commit() -> str:
        provenance.commit.cache_clear()
        return provenance.commit()

    monkeypatch.setattr(provenance, "SOURCES", tmp_path / "kdstudy")
    (tmp_path / "kdstudy").mkdir()
    (tmp_path / "kdstudy" / "a.py").write_text("a = 1\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("KDSTUDY_COMMIT", raising=False)
    assert commit() == "unknown"
    monkeypatch.setenv("KDSTUDY_COMMIT", "0123456789ab")
    assert commit() == "0123456789ab"
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    assert commit() == git("rev-parse", "HEAD")[:12]
    (tmp_path / "kdstudy" / "a.py").write_text("a = 2\n")
    assert commit() == git("rev-parse", "HEAD")[:12] + "+"
    provenance.commit.cache_clear()


def test_a_command_that_starts_others_does_not_wait_for_torch():
    program = (
        "import sys; import kdstudy.provenance, kdstudy.workers, kdstudy.notebook; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent).returncode == 0
