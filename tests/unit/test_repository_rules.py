"""Rules over the whole source tree that no linter holds: each checker is first shown to catch a planted violation."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("corpus", "ingest", "train", "tune", "evaluate")
MAX_LINES = 500

# Files whose hashes were verified against a manifest are opened here, and pickles nowhere else.
VERIFIED_LOADER = "train/checkpoint.py"
# Modules at the edge: only these build a pipeline, an engine, a scan, a search or a launch.
EDGE_MODULES = {"desk", "distribute", "engine", "launch", "pipeline", "scan", "space", "sweep", "trial"}
EDGE_LIBRARIES = {"ray", "deepspeed"}
# What a machine with torch and transformers alone must be able to import.
PURE_MODULES = (
    "train.attention",
    "train.batches",
    "train.loop",
    "train.masking",
    "train.model",
    "train.model_folder",
    "evaluate.encode",
    "evaluate.scan_compute",
)
# Refuses the libraries named in its first argument, then imports the modules named after it.
IMPORT_WITHOUT = """
import importlib, sys
from importlib.abc import MetaPathFinder
class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"refused: {name}")
sys.meta_path.insert(0, Refuse())
for name in sys.argv[2:]:
    importlib.import_module(name)
"""

PICKLE_LOADERS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cloudpickle.load",
    "cloudpickle.loads",
    "dill.load",
    "dill.loads",
    "joblib.load",
    "marshal.load",
    "marshal.loads",
    "pandas.read_pickle",
    "shelve.open",
}
# Folders of one person's or one service's machine.
WORKPLACE_PATH = re.compile("/(home|Users|root|work)" + "/[A-Za-z0-9_.-]+")
# Home folder inside the public Ray images, the same for everybody.
IMAGE_HOME = "/home/ray"


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Map each local name that an import binds to the full dotted name behind it."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import a.b` binds `a`; `import a.b as c` binds `c` to `a.b`.
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """Return the full dotted name of an expression such as `pd.read_pickle`, or the empty string."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def keyword(call: ast.Call, name: str) -> object:
    """Return the constant given for a keyword of a call, or None."""
    for item in call.keywords:
        if item.arg == name and isinstance(item.value, ast.Constant):
            return item.value.value
    return None


def unsafe_loads(path: str, tree: ast.AST) -> Iterator[str]:
    """Yield the places that would run code hidden in a file."""
    names = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            unpickles = any(dotted(base, names) == "pickle.Unpickler" for base in node.bases)
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            if unpickles and "find_class" not in methods:
                yield f"{path}:{node.lineno}: an Unpickler without find_class restricts nothing"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        if name in PICKLE_LOADERS:
            yield f"{path}:{node.lineno}: {name}"
        if name == "torch.load" and keyword(node, "weights_only") is not True and path != VERIFIED_LOADER:
            yield f"{path}:{node.lineno}: torch.load without weights_only=True"
        if name == "numpy.load" and keyword(node, "allow_pickle") is True:
            yield f"{path}:{node.lineno}: numpy.load with allow_pickle"


def ray_shadowing(path: str, tree: ast.AST) -> Iterator[str]:
    """Yield imports that bind one of our package names, or any name, out of `ray` itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "ray" and node.level == 0:
            yield f"{path}:{node.lineno}: from ray import ...: write `import ray.{node.names[0].name}`"
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] not in PACKAGES and alias.asname in PACKAGES:
                    yield f"{path}:{node.lineno}: {alias.name} takes the name of our package {alias.asname}"


def silent_excepts(path: str, tree: ast.AST) -> Iterator[str]:
    """Yield handlers that catch everything and say nothing."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = any(kind is None or dotted(kind, {}) in {"Exception", "BaseException"} for kind in kinds)
        silent = all(
            isinstance(item, ast.Pass | ast.Continue)
            or (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))
            for item in node.body
        )
        if broad and silent:
            yield f"{path}:{node.lineno}: an error is swallowed"


def edge_imports(path: str, tree: ast.AST) -> Iterator[str]:
    """Yield imports of Ray or DeepSpeed in a module of ours that is not at the edge."""
    if Path(path).parts[0] not in PACKAGES or Path(path).stem in EDGE_MODULES:
        return
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules = [node.module]
        for module in modules:
            if module.split(".")[0] in EDGE_LIBRARIES:
                yield f"{path}:{node.lineno}: imports {module}; only {', '.join(sorted(EDGE_MODULES))} may"


def workplace_paths(path: str, text: str) -> Iterator[str]:
    """Yield absolute paths that exist on one machine only."""
    for number, line in enumerate(text.splitlines(), start=1):
        for match in WORKPLACE_PATH.finditer(line):
            preceded = line[match.start() - 1] if match.start() else " "
            # A longer path or an address that merely contains the word is not an absolute path.
            if re.match(r"[\w./:}\])-]", preceded) or match[0].startswith(IMAGE_HOME):
                continue
            yield f"{path}:{number}: {match[0]}"


TREE_RULES = (unsafe_loads, ray_shadowing, silent_excepts, edge_imports)

PLANTED = [
    (unsafe_loads, "corpus/x.py", "import pickle\npickle.load(f)"),
    (unsafe_loads, "corpus/x.py", "import pickle as p\np.loads(b)"),
    (unsafe_loads, "corpus/x.py", "from pickle import loads as read\nread(b)"),
    (unsafe_loads, "train/checkpoint.py", "import pickle\npickle.load(f)"),
    (unsafe_loads, "corpus/x.py", "import pickle\nclass Safe(pickle.Unpickler):\n    pass"),
    (unsafe_loads, "train/model.py", "import torch\ntorch.load(p)"),
    (unsafe_loads, "train/model.py", "import torch\ntorch.load(p, weights_only=False)"),
    (unsafe_loads, "evaluate/x.py", "import pandas as pd\npd.read_pickle(p)"),
    (unsafe_loads, "evaluate/x.py", "import numpy as np\nnp.load(p, allow_pickle=True)"),
    (ray_shadowing, "train/loop.py", "from ray import train"),
    (ray_shadowing, "tune/trial.py", "def f():\n    from ray import tune as t"),
    (ray_shadowing, "train/loop.py", "import ray.train as train"),
    (silent_excepts, "corpus/x.py", "try:\n    f()\nexcept:\n    pass"),
    (silent_excepts, "corpus/x.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (
        silent_excepts,
        "corpus/x.py",
        "for x in y:\n    try:\n        f()\n    except (OSError, Exception):\n        continue",
    ),
    (silent_excepts, "corpus/x.py", "try:\n    f()\nexcept BaseException:\n    ..."),
    (edge_imports, "train/model.py", "import ray.train"),
    (edge_imports, "evaluate/stats.py", "def f():\n    from ray.data import Dataset"),
    (edge_imports, "train/data.py", "import deepspeed"),
]

ALLOWED = [
    (unsafe_loads, "train/checkpoint.py", "import torch\ntorch.load(p, weights_only=False)"),
    (unsafe_loads, "train/model.py", "import torch\ntorch.load(p, weights_only=True)"),
    (unsafe_loads, "corpus/x.py", "import json\njson.load(f)"),
    (
        unsafe_loads,
        "corpus/x.py",
        "import pickle\nclass Safe(pickle.Unpickler):\n    def find_class(self, m, n): ...\nSafe(f).load()",
    ),
    (ray_shadowing, "train/loop.py", "import ray.train\nfrom ray.train.torch import TorchTrainer"),
    (silent_excepts, "corpus/x.py", "try:\n    f()\nexcept FileNotFoundError:\n    pass"),
    (silent_excepts, "corpus/x.py", "try:\n    f()\nexcept Exception as error:\n    log(error)\n    raise"),
    (edge_imports, "train/launch.py", "import deepspeed\nimport ray.train"),
    (edge_imports, "tests/integration/test_x.py", "import ray"),
]


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED)
def test_a_planted_violation_is_found(rule, path, source):
    assert list(rule(path, ast.parse(source)))


@pytest.mark.parametrize(("rule", "path", "source"), ALLOWED)
def test_what_is_right_is_let_through(rule, path, source):
    assert not list(rule(path, ast.parse(source)))


def test_a_planted_workplace_path_is_found():
    home = "/" + "home"
    planted = f'folder = "{home}/alice/data"'
    assert list(workplace_paths("x.py", planted)) == [f"x.py:1: {home}/alice"]
    assert not list(workplace_paths("x.py", f'"{IMAGE_HOME}/app" "s3://bucket{home}/x" "docs{home}/x"'))


def tracked(repository: Path, *patterns: str) -> list[str]:
    """Return the files under version control, or in a checkout without git all that match."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *patterns]
    try:
        listing = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        folders = [repository / name for name in (*PACKAGES, "tests", "tools", "benchmarks")]
        found = [path for pattern in patterns for folder in folders for path in folder.rglob(pattern)]
        return sorted(str(path.relative_to(repository)) for path in found)
    return sorted(name for name in listing.split("\0") if name and (repository / name).is_file())


@pytest.fixture(scope="module")
def sources(repository: Path) -> dict[str, str]:
    files = tracked(repository, "*.py")
    assert "tests/unit/test_repository_rules.py" in files
    assert any(name.startswith("corpus/") for name in files)
    return {name: (repository / name).read_text(encoding="utf-8") for name in files}


@pytest.mark.parametrize("rule", TREE_RULES)
def test_sources_keep_the_rule(rule, sources):
    found = [line for name, text in sources.items() for line in rule(name, ast.parse(text, name))]
    assert not found, "\n".join(found)


def test_no_module_is_too_long(sources):
    lengths = {name: len(text.splitlines()) for name, text in sources.items()}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_no_path_of_one_machine(repository, sources):
    others = tracked(repository, "*.md", "*.toml", "*.yaml", "*.yml", "Makefile", ".ci/run", "deploy/Dockerfile")
    texts = sources | {name: (repository / name).read_text(encoding="utf-8") for name in others}
    assert not [line for name, text in texts.items() for line in workplace_paths(name, text)]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_come_from_this_checkout(package, repository):
    module = importlib.import_module(package)
    assert module.__file__ is not None, f"{package} has no __init__.py"
    assert Path(module.__file__).resolve().is_relative_to(repository)


def test_nothing_of_ours_is_installed():
    for package in PACKAGES:
        owners = importlib.metadata.packages_distributions().get(package, [])
        assert not owners, f"{package} is also installed, by {owners}"


def import_without(repository: Path, libraries: set[str], modules: list[str]) -> subprocess.CompletedProcess[str]:
    """Import modules in a fresh interpreter in which some libraries look as if they were not installed."""
    command = [sys.executable, "-c", IMPORT_WITHOUT, ",".join(sorted(libraries)), *modules]
    return subprocess.run(command, cwd=repository, check=False, capture_output=True, text=True)


def module_names(sources: dict[str, str], package: str) -> list[str]:
    """Return the importable modules of a package, without its command line."""
    paths = [Path(name) for name in sources if name.startswith(f"{package}/")]
    modules = [path for path in paths if path.name != "__main__.py" and "resources" not in path.parts]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in modules]


def test_corpus_imports_without_ray_and_torch(repository, sources):
    modules = module_names(sources, "corpus")
    assert len(modules) > 5
    done = import_without(repository, EDGE_LIBRARIES | {"torch", "transformers"}, modules)
    assert done.returncode == 0, done.stderr


def test_pure_modules_import_without_ray_and_deepspeed(repository):
    done = import_without(repository, EDGE_LIBRARIES, PURE_MODULES)
    assert done.returncode == 0, done.stderr


def test_a_refused_library_is_noticed(repository):
    done = import_without(repository, {"ray"}, ["ray"])
    assert done.returncode == 1
    assert "refused: ray" in done.stderr
