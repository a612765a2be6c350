"""What README.md says of the files, the options and the links is so; the wheel holds the whole package."""

import fnmatch
import os
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("synth.py", "train_sft.py", "train_grpo.py", "judge.py")


@cache
def repository_files() -> tuple[str, ...]:
    """Files that git knows or would add; new ones count before they are committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return tuple(name for name in sorted(set(done.stdout.split("\0"))) if name and (ROOT / name).exists())


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def read_tree(block: str) -> list[str]:
    """Paths of a tree: lines of `name  comment`, two spaces of indentation a level; folders end in a slash.

    A folder without lines under it stands for all that is in it. Several names on a line are several entries.
    """
    parents: list[str] = []
    paths: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        parents = parents[:depth]
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            paths.append("".join(parents) + name)
        if name.endswith("/"):
            parents.append(name)
    return [path for path in paths if not any(is_inside(other, path) for other in paths)]


def is_inside(path: str, folder: str) -> bool:
    return folder.endswith("/") and path.startswith(folder) and path != folder


def covers(entry: str, file: str) -> bool:
    return file.startswith(entry) if entry.endswith("/") else fnmatch.fnmatch(file, entry)


def test_reading_of_a_tree() -> None:
    tree = "a.py b.py     two scripts\nkaja/\n  x.py        some words\n  data/       all\n\n.ci/run  CI\n"
    assert read_tree(tree) == ["a.py", "b.py", "kaja/x.py", "kaja/data/", ".ci/run"]
    assert covers("kaja/data/", "kaja/data/deep/file.json")
    assert not covers("kaja/data", "kaja/data/file.json")


def test_the_file_tree_equals_the_files() -> None:
    section = README.split("\n## Files\n", 1)[1].split("\n## ", 1)[0]
    entries = read_tree(code_blocks(section)[0])
    files = repository_files()
    missing = [file for file in files if not any(covers(entry, file) for entry in entries)]
    gone = [entry for entry in entries if not any(covers(entry, file) for file in files)]
    assert not missing, f"README.md, section Files: add a line for each of {missing}"
    assert not gone, f"README.md, section Files: names files that do not exist: {gone}"


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    broken = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not broken, f"README.md links to files that do not exist: {broken}"


def commands() -> list[str]:
    lines = "\n".join(code_blocks(README)).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(r"\b(python|torchrun|srun)\b", line)]


def options_in_readme(script: str) -> set[str]:
    """The options that README.md gives to a script: those after its name, not torchrun's own."""
    found: set[str] = set()
    for command in commands():
        words = re.split(r"\s#\s|\s[|>]\s|&&", command)[0].split()
        if script in words:
            found |= {word.split("=")[0] for word in words[words.index(script) + 1:] if word.startswith("--")}
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_in_readme_exist(script: str) -> None:
    used = options_in_readme(script)
    assert used, f"README.md shows no command for {script}"
    # A wide terminal, so that no option's name is broken in two.
    environment = {**os.environ, "COLUMNS": "240", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    known = set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout))
    assert used <= known, f"README.md uses {sorted(used - known)}, which {script} --help does not know"


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    expected = {file for file in repository_files() if file.startswith("kaja/")}
    copy = tmp_path / "copy"
    for file in (*expected, "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        (copy / file).write_bytes((ROOT / file).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("kaja-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("kaja/")}
    assert packed == expected
