"""The repository as data: notebooks, the imports between rooms, public names, packaging, README and workflows."""

import ast
import configparser
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "gemma_lora_sentiment"
NOTEBOOKS = sorted(
    path
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)
)
MODULES = sorted(path for path in (ROOT / PACKAGE).glob("*.py") if not path.name.startswith("_"))
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if not path.name.startswith("_"))

# What a room may import of ours. Data flows down this table and never back.
ROOM_IMPORTS = {
    "files": set(),
    "tables": set(),
    "data": {"files", "tables"},
    "prompt": {"data"},
    "upstream": set(),
    "cache": {"files", "upstream"},
    "credentials": set(),
    "backend": set(),
    "gemma": set(),
    "gguf_files": {"backend", "files"},
    "model": {"files", "backend", "cache", "credentials", "gemma", "gguf_files", "upstream"},
    "memory": {"gemma", "model"},
    "precision": {"backend", "credentials", "gemma", "model", "memory", "scoring"},
    "adapter": {"files", "gemma", "model"},
    "scoring": {"adapter", "gemma", "model", "prompt"},
    "checkpoint": {"files"},
    "export": {"files", "gemma", "model", "adapter"},
    "serving_files": {"data", "prompt"},
    "llamacpp": set(),
    "gguf_export": {
        *("files", "data", "prompt", "gguf_files", "llamacpp", "model", "adapter", "scoring", "export"),
        *("serving_files", "tables"),
    },
    "training": {"files", "backend", "gemma", "prompt", "model", "memory", "adapter", "checkpoint", "scoring"},
    "tutorial": {
        *("files", "backend", "prompt", "model", "adapter", "checkpoint", "scoring", "training", "upstream"),
    },
    "search": {"adapter", "model", "prompt", "scoring", "training"},
    "classifier": {
        *("files", "data", "prompt", "model", "memory", "precision", "adapter", "checkpoint", "scoring", "training"),
        *("tutorial", "search", "side_by_side"),
    },
    "side_by_side": {"adapter", "backend", "gemma", "memory", "model", "prompt", "scoring", "training"},
    "features": {"adapter", "data", "model", "precision", "prompt", "scoring"},
    "analysis": set(),  # the old door: it imports a room when it is asked for a name of it
    "evaluation": {"data", "analysis"},
    "intervals": {"data", "evaluation"},
    "decision": {"evaluation"},
    "run": {"files", "tables", "data", "checkpoint"},  # the last when it goes on, so that reading needs no JAX
    "report": {"evaluation", "intervals", "decision"},
    "judge": {
        *("files", "data", "classifier", "features", "evaluation", "intervals", "decision", "labelling", "figures"),
        *("report", "run"),
    },
    "figures": {"files", "data", "evaluation", "intervals", "decision"},
    "labelling": {"files", "tables", "data", "evaluation", "intervals"},
    "submission": {"files", "data", "tables"},
    "scale": {"files", "tables", "data", "prompt", "checkpoint", "scoring", "classifier", "decision"},
    "service": {"files", "tables", "scoring", "classifier", "decision", "run"},
    "pretraining": {"backend", "model", "prompt"},
    "cli": {
        *("files", "data", "prompt", "backend", "cache", "credentials", "model", "memory", "precision", "adapter"),
        *("export", "classifier", "labelling", "submission", "pretraining", "scale"),
        *("upstream", "gguf_export", "serving_files", "service", "web", "label_page", "run", "judge"),
    },
    "web": {"files", "tables", "data", "classifier", "judge", "run", "service"},
    "label_page": {"files", "tables", "labelling", "service"},
}
ROOMS_WITHOUT_KERAS = [
    *("files", "tables", "data", "prompt", "credentials", "serving_files", "evaluation", "intervals", "decision"),
    *("labelling", "figures", "report", "analysis", "submission", "llamacpp"),
]
KERAS = {"keras", "keras_nlp", "keras_hub", "jax", "jaxlib", "tensorflow", "torch"}
HEAVY = {*KERAS, "numpy", "pandas", "sklearn", "matplotlib"}
README_COMMANDS = {
    "readme_first": "pip install . && gemma-lora-sentiment quickstart",
    "readme_second": 'pip install -e ".[dev]" && nbdev_test && pytest -q tests',
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def project_files() -> list[Path]:
    """The files git knows or would add, without those that are deleted."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git repository")
    return [ROOT / name for name in sorted(set(listed.split("\0"))) if name and (ROOT / name).is_file()]


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package_version() -> str:
    source = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)[1]


def run_python(code: str) -> str:
    """What `code` prints in a fresh interpreter that imports this copy of the package."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- notebooks


def test_there_is_a_notebook_for_every_module_and_back():
    exported = {}
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and (found := re.match(r"#\| ?default_exp (\S+)", cell.source)):
                assert found[1] not in exported, f"{name_of(path)} and {exported[found[1]]} both export {found[1]}"
                exported[found[1]] = name_of(path)
    assert set(exported) == {path.stem for path in MODULES}
    for module, notebook in exported.items():
        assert re.fullmatch(rf"nbs/\d\d[a-z]?_{module}\.ipynb", notebook), f"{notebook} exports {module}"
    assert set(exported) <= set(ROOM_IMPORTS), "a new room: say above what it may import"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_reads_well(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)

    # nbdev takes the sentence for the module's docstring and drops whatever else stands in that cell.
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", first.source.strip()), "cell 0 is an H1, a blank line, a > line"
    for number, cell in enumerate(notebook.cells[1:], start=1):
        if cell.cell_type == "markdown":
            outside_fences = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
            assert not re.search(r"^# ", outside_fences, flags=re.MULTILINE), f"cell {number}: one H1 a notebook"

    assert "widgets" not in notebook.metadata, "clear the widgets: their state is large and not shown in the docs"
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"cell {number} stores an error"
            assert not [kind for kind in output.get("data", {}) if "widget" in kind], f"cell {number} stores a widget"

    limit = 400_000 if path.parent.name == "tutorials" else 200_000
    assert path.stat().st_size <= limit, f"{path.stat().st_size} bytes; the limit is {limit}: make the figures smaller"


def test_tutorials_are_run_by_hand():
    tutorials = ROOT / "nbs" / "tutorials"
    if not any(path.parent == tutorials for path in NOTEBOOKS):
        pytest.skip("there is no tutorial yet")
    assert (tutorials / ".notest").is_file(), "nbdev_test runs what stands beside no .notest"


def test_every_page_is_in_the_sidebar():
    quarto = yaml.safe_load((ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8"))
    listed = [page for section in quarto["website"]["sidebar"]["contents"] for page in section["contents"]]
    pages = [*NOTEBOOKS, *(ROOT / "nbs" / "background").glob("*.qmd")]
    there = {path.relative_to(ROOT / "nbs").as_posix() for path in pages}
    assert there <= set(listed), "pages missing from nbs/_quarto.yml"
    assert len(listed) == len(set(listed))
    if (ROOT / "README.md").exists():  # before that, rooms are still being written
        assert set(listed) <= there, "nbs/_quarto.yml lists pages that do not exist"


# ---- the exported package


def imports_of(path: Path) -> list[tuple[str, str]]:
    """Pairs (module, name) of a file's imports; ours begin with the package's name, however they are written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path.name} line {node.lineno}: the package is flat"
            parts = ([PACKAGE] if node.level else []) + ([node.module] if node.module else [])
            found += [(".".join(parts), alias.name) for alias in node.names]
    return found


def rooms_imported(path: Path) -> set[str]:
    """Our rooms that a module imports; `__version__`, which every room may know, is none."""
    rooms = set()
    for module, name in imports_of(path):
        if module == PACKAGE and name:
            rooms |= {name} - {"__version__"}  # `from package import room`, or a public name, which is reported too
        elif module.startswith(PACKAGE + "."):
            rooms.add(module.split(".")[1])
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_room_imports_only_what_the_table_allows(path):
    allowed = ROOM_IMPORTS[path.stem]
    assert rooms_imported(path) <= allowed, f"{path.stem} may import {sorted(allowed) or 'none of our rooms'}"


# What begins with an underscore and is public all the same: the methods of a `NamedTuple`.
PUBLIC_WITH_UNDERSCORE = {"_replace", "_asdict", "_fields", "_make"}
# Private parts of others. `upstream` is the room for them; what stands here beside it waits to go there.
PRIVATE_OF_OTHERS = {
    "upstream": {"_initialize_with_initializer", "_initialize", "_cache", "_cache_initialized"},
    "ours": {"_model"},  # of a Keras callback: its `model` copies all weights on JAX
    "peers": {"_model"},
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_WITH_UNDERSCORE


def private_names_of(tree: ast.Module) -> set[str]:
    """The private names that a room defines: functions, methods, classes, fields and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            body = node.body if isinstance(node, ast.ClassDef) else []
            names |= {field.target.id for field in body if isinstance(field, ast.AnnAssign)}
            names |= {target.id for line in body if isinstance(line, ast.Assign) for target in line.targets
                      if isinstance(target, ast.Name)}  # fmt: skip
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return {name for name in names if is_private(name)}


def private_names_crossed(tree: ast.Module, allowed: set[str] = frozenset()) -> list[str]:
    """Private names of other rooms, or of others' code, that a module imports, reads, or reaches by a string."""
    own, crossed = private_names_of(tree) | allowed, []
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.ImportFrom):
            found = [alias.name for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            found = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            found = [ast.unparse(node)] if is_private(str(name)) and name not in own else []
        crossed += [(node.lineno, name) for name in found]
    return [f"line {line}: {name}" for line, name in sorted(crossed)]


@pytest.mark.parametrize("path", [*MODULES, *BENCHMARKS], ids=name_of)
def test_no_private_name_crosses_a_door(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    crossed = private_names_crossed(tree, PRIVATE_OF_OTHERS.get(path.stem, set()))
    assert not crossed, "give it a public name in the room that owns it, or move it:\n" + "\n".join(crossed)


def test_a_private_name_that_crosses_is_found():
    source = """
from gemma_lora_sentiment.other import _a, b
class _Mine(NamedTuple):
    _field: int
    def _method(self): self._kept = b._hidden
def f(mine, clf):
    return mine._method(), mine._kept, mine._field, mine._replace(_field=1), b.__x__, clf._base, getattr(clf, "_words")
"""
    crossed = private_names_crossed(ast.parse(source))
    assert crossed == ["line 2: _a", "line 5: b._hidden", "line 7: clf._base", "line 7: getattr(clf, '_words')"]
    assert private_names_crossed(ast.parse("a._b"), {"_b"}) == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_room_imports_nothing_of_the_workshop(path):
    roots = {module.split(".")[0] for module, _ in imports_of(path)}
    assert not roots & {"fastcore", "nbdev", "execnb", "IPython", "pytest"}, "these are no run-time dependencies"
    if path.stem in ROOMS_WITHOUT_KERAS:
        assert not roots & KERAS, f"{path.stem} works without Keras and JAX"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_third_party_imports_are_declared(path):
    project = pyproject()["project"]
    declared = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    distributions = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in declared}
    # JAX and scikit-learn both require NumPy and SciPy, JAX requires ml_dtypes, Gradio brings its server.
    distribution_of = {"sklearn": "scikit-learn", "keras_nlp": "keras-nlp", "numpy": "jax", "scipy": "scikit-learn",
                       "ml_dtypes": "jax", **dict.fromkeys(("fastapi", "starlette", "uvicorn"), "gradio")}  # fmt: skip
    known = {PACKAGE, *sys.stdlib_module_names, "tensorflow"}  # KerasHub brings it, rooms only keep it out of the way
    roots = {module.split(".")[0] for module, _ in imports_of(path)} - known
    assert {distribution_of.get(root, root) for root in roots} <= distributions


def public_names(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def gaps_in(function: ast.FunctionDef, where: str, method: bool) -> list[str]:
    """What a public function or method lacks: hints on parameters and return, a docstring."""
    static = any(getattr(decorator, "id", "") == "staticmethod" for decorator in function.decorator_list)
    arguments = [*function.args.posonlyargs, *function.args.args]
    if method and not static:
        arguments = arguments[1:]  # self or cls
    arguments += [*function.args.kwonlyargs, *filter(None, (function.args.vararg, function.args.kwarg))]
    gaps = [f"{where}: parameter {argument.arg} has no type" for argument in arguments if argument.annotation is None]
    if function.name == "__init__":  # returns nothing, and the class says what it is for
        return gaps
    if function.returns is None:
        gaps.append(f"{where}: no type of what it returns")
    if not ast.get_docstring(function):
        gaps.append(f"{where}: no docstring")
    return gaps


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_have_types_and_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the > line of the notebook's first cell becomes the module's docstring"
    public = public_names(tree)
    assert public, "no __all__: nbdev writes it"

    definitions = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    gaps = []
    for name in public:
        node = definitions.get(name)
        if isinstance(node, ast.FunctionDef):
            gaps += gaps_in(node, name, method=False)
        elif isinstance(node, ast.ClassDef):
            if not ast.get_docstring(node):
                gaps.append(f"{name}: no docstring")
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and (member.name == "__init__" or member.name[0] != "_"):
                    gaps += gaps_in(member, f"{name}.{member.name}", method=True)
    assert not gaps, "\n".join(gaps)


def test_importing_the_package_imports_nothing_heavy():
    code = f"import {PACKAGE}, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    assert run_python(code) == ""


# What a module of benchmarks/ may import of the others. The package knows none of them.
BENCHMARK_IMPORTS = {
    "processes": set(),
    "shapes": set(),
    "tables": {"shapes"},
    "peft_loop": {"processes"},
    "ours": {"processes", "shapes"},
    "peers": {"ours", "peft_loop", "processes", "shapes"},
    "random_weights": {"ours", "peers", "peft_loop", "processes", "shapes", "tables"},
    "real_rows": {"peft_loop", "processes", "tables"},
}


@pytest.mark.parametrize("path", BENCHMARKS, ids=name_of)
def test_benchmarks_import_each_other_in_one_direction(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    relative = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert relative <= BENCHMARK_IMPORTS[path.stem]
    absolute = [module for module, _ in imports_of(path) if module.split(".")[0] == "benchmarks"]
    assert not absolute, "it is loaded under two names, so its modules name each other relatively"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_room_imports_the_benchmarks(path):
    roots = {module.split(".")[0] for module, _ in imports_of(path)}
    assert not roots & {"benchmarks", "gemma_lora_sentiment_benchmarks"}, "the shell loads it when it is asked for"


def test_importing_the_shell_imports_no_benchmarks():
    code = f"""
import sys, {PACKAGE}.cli
from typer.testing import CliRunner
assert CliRunner().invoke({PACKAGE}.cli.app, ["benchmark", "--help"]).exit_code == 0
print(*sorted(name for name in sys.modules if "benchmarks" in name))"""
    assert run_python(code) == ""


def test_importing_the_shell_imports_nothing_heavy():
    if not (ROOT / PACKAGE / "cli.py").exists():
        pytest.skip("there is no cli.py yet")
    code = f"import {PACKAGE}.cli, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    assert run_python(code) == "", "cli imports inside its commands, so that --help answers at once"


def test_public_names_of_the_package_lead_to_their_rooms():
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (table,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "_PUBLIC"]
    for name, room in ast.literal_eval(table).items():
        path = ROOT / PACKAGE / f"{room}.py"
        if path.exists():
            assert name in public_names(ast.parse(path.read_text(encoding="utf-8"))), f"{room} exports no {name}"


def test_nbdev_forks_before_jax_is_there():
    """`nbdev_test` runs notebooks in forked processes; a fork of a process that holds JAX can hang."""
    code = f"""
import sys, nbdev.test, nbdev.doclinks
nbdev.doclinks.NbdevLookup("{PACKAGE}")
print(*sorted({KERAS!r} & set(sys.modules)))"""
    assert run_python(code) == ""


# ---- packaging


def test_settings_and_pyproject_agree():
    ini, project = settings(), pyproject()["project"]
    assert ini["lib_name"] == ini["repo"] == ini["lib_path"] == ini["title"] == project["name"] == PACKAGE
    assert ini["version"] == package_version()
    assert project["dynamic"] == ["version"]
    assert pyproject()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": f"{PACKAGE}.__version__"}
    assert project["requires-python"].split(",")[0] == f">={ini['min_python']}"
    assert ini["description"] == project["description"]
    assert project["urls"]["Repository"] == ini["git_url"]
    assert project["urls"]["Documentation"] == ini["doc_host"] + ini["doc_baseurl"]
    assert ini["update_pyproject"] == "False", "pyproject.toml is written by hand"
    assert project["entry-points"]["nbdev"] == {PACKAGE: f"{PACKAGE}._modidx:d"}
    assert project["scripts"] == {"gemma-lora-sentiment": f"{PACKAGE}.cli:app"}


def test_nbdev_is_pinned():
    project = pyproject()["project"]
    # nbdev 2.4.14 is the last that reads settings.ini, and can be imported with these two only.
    assert {"nbdev==2.4.14", "execnb<0.2", "fastcore<2"} <= set(project["optional-dependencies"]["dev"])
    assert not [r for r in project["dependencies"] if re.match(r"nbdev|execnb|fastcore", r)]
    assert settings()["tst_flags"].split() == ["notest", "gpu", "net", "slow"]
    assert settings()["allowed_metadata_keys"].split() == ["accelerator", "colab"]


def test_runtime_bounds_leave_the_installed_jax_alone():
    bounded = []
    for requirement in pyproject()["project"]["dependencies"]:
        assert not re.search(r"==|~=", requirement), f"{requirement}: in Colab this may replace what is preinstalled"
        bounded += [re.split(r"[<>]", requirement)[0]] if "<" in requirement else []
    assert bounded == ["keras", "keras-nlp"], "these alone, as long as `upstream` hangs on private parts of theirs"


def test_licence_and_data_are_packaged():
    assert pyproject()["project"]["license-files"] == ["LICENSE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]
    patterns = pyproject()["tool"]["setuptools"]["package-data"][PACKAGE]
    packaged = {path for pattern in patterns for path in (ROOT / PACKAGE).glob(pattern)}
    data = {path for path in project_files() if (ROOT / PACKAGE) in path.parents and path.suffix != ".py"}
    assert data <= packaged, "package-data in pyproject.toml does not name them"
    assert (ROOT / PACKAGE / "py.typed") in packaged


# ---- README, CONTRIBUTING, CHANGELOG


@pytest.mark.parametrize("variable", README_COMMANDS)
def test_readme_commands_are_what_ci_runs(variable):
    command = README_COMMANDS[variable]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"{variable}='{command}'\n" in script
    assert re.search(rf'^ *step .*bash -euo pipefail -c "\${variable}"$', script, flags=re.MULTILINE)
    if not (ROOT / "README.md").exists():
        pytest.skip("there is no README.md yet")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    fences = [text for _, text in re.findall(r"^```(\w*)\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)]
    assert command in [line for fence in fences for line in fence.splitlines()], "on a line of its own in a fence"


def test_readme_is_fresh():
    if not (ROOT / "nbs" / "index.ipynb").exists():
        pytest.skip("there is no nbs/index.ipynb yet")
    done = subprocess.run([sys.executable, ".ci/readme", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def readme_script(tmp_path):
    """Call .ci/readme on a repository that has one notebook of the given cells."""

    def call(*cells: nbformat.NotebookNode, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        (tmp_path / "nbs" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "nbs" / "images" / "plot.png").touch()
        (tmp_path / "CHANGELOG.md").touch()
        nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), tmp_path / "nbs" / "index.ipynb")
        command = [sys.executable, ROOT / ".ci" / "readme", "--root", tmp_path, *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    return call


def test_readme_script_turns_links_and_leaves_code(readme_script, tmp_path):
    prose = nbformat.v4.new_markdown_cell(
        "# Title\n\n> Sentence.  \n\n\n\n"
        "![plot](images/plot.png) [log](../CHANGELOG.md#a) [web](https://a.b/c) [here](#title)\n"
        '<img src="images/plot.png"> `[code](images/plot.png)`\n\n```python\n[fence](images/plot.png)\n```'
    )
    assert readme_script(prose, code_cell("stream", name="stdout", text="shown\n")).returncode == 0
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "![plot](nbs/images/plot.png) [log](CHANGELOG.md#a) [web](https://a.b/c) [here](#title)\n" in readme
    assert '<img src="nbs/images/plot.png"> `[code](images/plot.png)`' in readme
    assert "\n[fence](images/plot.png)\n" in readme
    assert "```python\nf()\n```" in readme and "    shown\n" in readme
    assert not re.search(r"[ \t]$|\n{4}", readme, flags=re.MULTILINE) and readme.endswith("\n")

    assert readme_script(prose, arguments=("--check",)).returncode == 1, "the code cell is gone, README.md is stale"
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme, "--check writes nothing"
    assert readme_script(prose).returncode == 0
    assert readme_script(prose, arguments=("--check",)).returncode == 0


def code_cell(output_type: str, **output) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell("f()", outputs=[nbformat.v4.new_output(output_type, **output)])


@pytest.mark.parametrize(
    "cell, complaint",
    [
        (nbformat.v4.new_code_cell("#| hide\n1"), "cell 0: a directive"),
        (nbformat.v4.new_markdown_cell("::: {.callout-note}\nNote\n:::"), "cell 0: a directive"),
        (nbformat.v4.new_markdown_cell("![lost](images/lost.png)"), "not there: nbs/images/lost.png"),
        (code_cell("error", ename="E", evalue="", traceback=[]), "cell 0: a stored error"),
        (code_cell("display_data", data={"image/png": "AA=="}), "cell 0: a figure as output"),
    ],
    ids=["directive", "callout", "lost figure", "error", "figure as output"],
)
def test_readme_script_refuses(readme_script, tmp_path, cell, complaint):
    done = readme_script(cell)
    assert done.returncode == 1 and complaint in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "README.md").exists()


def test_package_contents_are_checked(tmp_path):
    loader = SourceFileLoader("package_contents", str(ROOT / ".ci" / "package_contents"))
    script = importlib.util.module_from_spec(importlib.util.spec_from_loader("package_contents", loader))
    loader.exec_module(script)

    (tmp_path / "source" / PACKAGE / "samples").mkdir(parents=True)
    (tmp_path / "source" / PACKAGE / "samples" / "new.tsv").touch()
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        wheel.writestr(f"{PACKAGE}/py.typed", "")
        wheel.writestr("tests/test_project.py", "")
        wheel.writestr("benchmarks/tables.py", "")
    tarfile.open(tmp_path / "p.tar.gz", "w:gz").close()
    with pytest.raises(SystemExit) as stopped:
        script.main(tmp_path, tmp_path / "source")
    problems = str(stopped.value).splitlines()
    assert "p.whl lacks LICENSE" in problems
    assert f"p.whl lacks {PACKAGE}/samples/sample.tsv" in problems
    assert f"p.whl lacks {PACKAGE}/samples/new.tsv" in problems
    assert f"p.whl lacks {PACKAGE}/bases/mini_ko/model.weights.h5" in problems
    assert f"p.tar.gz lacks {PACKAGE}/py.typed" in problems
    assert "p.whl holds tests/test_project.py, which is no part of the package" in problems
    assert "p.whl holds benchmarks/tables.py, which is no part of the package" in problems
    assert f"p.whl lacks {PACKAGE}/py.typed" not in problems


def test_changelog_has_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(package_version())}\]", changelog, flags=re.MULTILINE)


def test_contributing_names_the_markers_and_commands():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    markers = [line.split(":")[0] for line in pyproject()["tool"]["pytest"]["ini_options"]["markers"]]
    for word in [*markers, *settings()["tst_flags"].split(), *README_COMMANDS.values()]:
        assert word in text, f"CONTRIBUTING.md does not explain {word}"


# ---- workflows and hooks


@pytest.mark.parametrize("name", ["test.yml", "docs.yml"])
def test_workflow_is_what_github_reads(name):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML reads the key `on` as true
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert not [action for action in used if not re.fullmatch(r"(actions|quarto-dev)/[\w/-]+@v\d+", action)]


def test_canary_tries_what_the_bounds_keep_out():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "canary.yml").read_text(encoding="utf-8"))
    assert set(workflow[True]) == {"schedule", "workflow_dispatch"}
    matrix = workflow["jobs"]["canary"]["strategy"]["matrix"]["include"]
    assert {each["versions"] for each in matrix} == {"newest", "oldest"}
    oldest = next(each["packages"] for each in matrix if each["versions"] == "oldest").split()
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lowest = dict(re.findall(r'^  "([\w-]+)>=([\d.]+)', text, flags=re.MULTILINE))
    for package in oldest:
        name, version = package.split("==")
        assert version.startswith(lowest[name]), f"{name}: the oldest allowed is {lowest[name]}"
    assert (ROOT / "tests" / "test_upstream.py").is_file()


def test_workflows_cover_all_pythons_and_pin_quarto():
    folder = ROOT / ".github" / "workflows"
    test = yaml.safe_load((folder / "test.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    assert test["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert [step["run"] for step in test["steps"] if "run" in step] == ["bash .ci/run"]
    for version in test["strategy"]["matrix"]["python"]:
        assert f"Programming Language :: Python :: {version}" in pyproject()["project"]["classifiers"]
    docs = yaml.safe_load((folder / "docs.yml").read_text(encoding="utf-8"))["jobs"]["build"]
    (quarto,) = [step for step in docs["steps"] if step.get("uses", "").startswith("quarto-dev/quarto-actions/setup@")]
    assert quarto["with"]["version"] == "1.7.34"


def test_hooks_are_local():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["nbdev_clean", "nbdev_export", "ruff", "readme"]
    assert {hook["language"] for hook in hooks} == {"system"}


def test_ci_script_is_valid_bash():
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# ---- nothing of the workshop in what we publish


def test_no_file_knows_the_machine_it_was_written_on():
    here = name_of(Path(__file__).resolve())
    folders = re.compile(r"/(?:work|root|home/\w+)/")
    beside = re.compile(r"\.\./shared|\b(?:DESIGN|STYLE|TRAPS|ROOMS|PERFORMANCE)\.md")
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights, figures
        if name_of(path) == here:
            continue
        # Tests may use real comments that lie beside the repository.
        patterns = [folders] if name_of(path).startswith("tests/") else [folders, beside]
        for number, line in enumerate(text.splitlines(), start=1):
            if any(pattern.search(line) for pattern in patterns):
                found.append(f"{name_of(path)} line {number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)
