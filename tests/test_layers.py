"""The house rules of DESIGN.md, read off the syntax trees: who imports whom, and what nobody may call."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("synth", "train_sft", "train_grpo", "judge")

# A module may import lower layers and its own layer. A package counts as one module.
LAYERS = {
    0: ("errors", "loss", "model", "optim", "flops", "chat", "rubric", "text_hashes"),
    1: ("distributed", "tracking", "files", "cli", "output_dir", "options"),
    2: (
        "data", "batching", "checkpoint", "resume", "memory_plan", "grpo_plan", "dry_run",
        "sampling", "sync", "engine", "supervisor", "judge_server",
        "guard_index", "evaluation_sets", "contamination",
    ),
    3: (
        "reward", "chat_completions", "server_judge", "engine_judge", "verdict_cache", "judge_watch", "judging",
        "rollouts", "health",
        "filters", "dedup", "synthesis", "teacher", "rounds", "dataset_card", "evals", "merge", "charts", "report",
        "demo", "demo_corpus", "demo_tasks", "demo_judge", "demo_pretrain", "demo_teacher",
    ),
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}

# May be missing: imported inside a function that turns ImportError into a line saying how to install it.
OPTIONAL = ("vllm", "torch.utils.tensorboard", "tensorboard", "matplotlib", "datasets", "pyarrow", "sacrebleu")
# Of torch, but brings its compiler, 0.6 s: imported where it runs, on a GPU.
LATE = ("torch.nn.attention.varlen",)
# Layer 0 is mathematics and text: nothing of these, nothing of the file system.
NOT_IN_LAYER_0 = ("os", "pathlib", "shutil", "subprocess", "socket", "urllib", "torch.distributed")
UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve")


def sources() -> list[Path]:
    scripts = [ROOT / f"{name}.py" for name in SCRIPTS if (ROOT / f"{name}.py").exists()]
    return sorted((ROOT / "kaja").rglob("*.py")) + scripts


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}"


def imported(node: ast.AST, path: Path) -> list[str]:
    """Absolute names of the modules that an import statement brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = path.relative_to(ROOT).parent.parts
            base = ".".join((*package[: len(package) - node.level + 1], *([base] if base else [])))
        # `from kaja import loss` imports the module kaja.loss.
        return [f"{base}.{alias.name}" for alias in node.names] if base in ("kaja", "torch") else [base]
    return []


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(parse(path)):
        for name in imported(node, path):
            yield node, name


def is_part_of(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def module_of(path: Path) -> str:
    """kaja/loss.py -> loss, kaja/evals/judged.py -> evals, kaja/__init__.py -> __init__."""
    return path.relative_to(ROOT / "kaja").parts[0].removesuffix(".py")


def kaja_imports(path: Path) -> list[tuple[ast.AST, str]]:
    return [(node, name.split(".")[1]) for node, name in imports(path) if name.startswith("kaja.")]


def package_files() -> list[Path]:
    return [path for path in sources() if path.is_relative_to(ROOT / "kaja")]


def test_every_module_has_a_layer() -> None:
    unknown = {module_of(path) for path in package_files()} - set(LAYER_OF) - {"__init__"}
    assert not unknown, f"in no layer: {sorted(unknown)}; add them to LAYERS in this file"


def test_imports_go_down_only() -> None:
    wrong = []
    for path in package_files():
        own = LAYER_OF.get(module_of(path), max(LAYERS))  # the test above names modules without a layer
        for node, name in kaja_imports(path):
            layer = LAYER_OF.get(name, 0)
            if layer > own:
                wrong.append(f"{where(path, node)}: layer {own} imports kaja.{name} of layer {layer}")
    assert not wrong, "\n".join(wrong)


def dotted(path: Path) -> str:
    """kaja/evals/judged.py -> kaja.evals.judged, kaja/evals/__init__.py -> kaja.evals."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_circles() -> None:
    # Between files, not packages: a circle inside kaja/evals counts too.
    graph: dict[str, set[str]] = {dotted(path): set() for path in package_files()}
    for path in package_files():
        name = dotted(path)
        for node, target in imports(path):
            # `from kaja.evals import judged` imports a file of that package.
            inner = [f"{target}.{alias.name}" for alias in getattr(node, "names", [])]
            graph[name] |= {module for module in (target, *inner) if module in graph and module != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "circle: " + " -> ".join((*trail[trail.index(name):], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_only_the_engine_imports_vllm() -> None:
    users = {path for path in sources() for _, name in imports(path) if is_part_of(name, ("vllm",))}
    assert {str(path.relative_to(ROOT)) for path in users} <= {"kaja/engine.py"}


def test_scripts_import_the_package_and_never_each_other() -> None:
    wrong = [
        f"{where(path, node)}: imports the script {name}"
        for path in sources()
        for node, name in imports(path)
        if name.split(".")[0] in SCRIPTS
    ]
    assert not wrong, "\n".join(wrong)


def test_layer_0_is_pure() -> None:
    wrong = [
        f"{where(path, node)}: layer 0 imports {name}"
        for path in package_files()
        if LAYER_OF.get(module_of(path)) == 0
        for node, name in imports(path)
        if is_part_of(name, NOT_IN_LAYER_0)
    ]
    assert not wrong, "\n".join(wrong)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_imports_inside_functions_are_of_optional_packages_or_bring_the_compiler() -> None:
    wrong = []
    for path in sources():
        for function in functions(parse(path)):
            for node in ast.walk(function):
                for name in imported(node, path):
                    if not is_part_of(name, (*OPTIONAL, *LATE)):
                        wrong.append(f"{where(path, node)}: {function.name} imports {name}; do it at the top")
    assert not wrong, "\n".join(wrong)


def catches_import_error(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {ast.unparse(type_) for type_ in caught if type_ is not None}
    return bool(names & {"ImportError", "ModuleNotFoundError"})


def test_optional_packages_are_imported_where_their_absence_is_explained() -> None:
    wrong = []
    for path in sources():
        tree = parse(path)
        guarded = {
            child
            for node in ast.walk(tree)
            if isinstance(node, ast.Try) and any(catches_import_error(handler) for handler in node.handlers)
            for statement in node.body
            for child in ast.walk(statement)
        }
        for node in ast.walk(tree):
            for name in imported(node, path):
                if is_part_of(name, OPTIONAL) and node not in guarded:
                    wrong.append(f"{where(path, node)}: imports {name} outside of try ... except ImportError")
    assert not wrong, "\n".join(wrong)


def unsafe_call(node: ast.Call) -> str:
    """What is wrong with this call, or an empty string."""
    name = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in ("eval", "exec", "os.system", "os.popen"):
        return f"calls {name}"
    if name == "torch.load" and given.get("weights_only") != "True":
        return "torch.load without weights_only=True runs code from the file"
    for option in ("allow_pickle", "trust_remote_code", "shell"):
        if given.get(option, "False") != "False":
            return f"{name} with {option}={given[option]}"
    return ""


def test_nothing_runs_code_from_data() -> None:
    wrong = []
    for path in sources():
        for node in ast.walk(parse(path)):
            if any(is_part_of(name, UNSAFE_MODULES) for name in imported(node, path)):
                wrong.append(f"{where(path, node)}: {ast.unparse(node)}")
            if isinstance(node, ast.Call) and (problem := unsafe_call(node)):
                wrong.append(f"{where(path, node)}: {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("eval('1')", "calls eval"),
        ("model.eval()", ""),
        ("torch.load(path)", "torch.load without weights_only=True runs code from the file"),
        ("torch.load(path, weights_only=True)", ""),
        ("numpy.load(path, allow_pickle=True)", "numpy.load with allow_pickle=True"),
        ("subprocess.run(command, shell=True)", "subprocess.run with shell=True"),
        ("subprocess.run(command)", ""),
    ],
)
def test_the_check_for_unsafe_calls(code: str, problem: str) -> None:
    call = ast.parse(code).body[0]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    assert unsafe_call(call.value) == problem


def test_the_reading_of_imports() -> None:
    def names(code: str, file: str = "kaja/evals/judged.py") -> list[str]:
        return imported(ast.parse(code).body[0], ROOT / file)

    assert names("from kaja import loss, optim") == ["kaja.loss", "kaja.optim"]
    assert names("from kaja.loss import policy_loss") == ["kaja.loss"]
    assert names("from . import statistics") == ["kaja.evals"]
    assert names("from .statistics import mean") == ["kaja.evals.statistics"]
    assert names("from ..loss import policy_loss") == ["kaja.loss"]
    assert names("from torch import distributed as dist") == ["torch.distributed"]
    assert names("import torch.distributed as dist") == ["torch.distributed"]
