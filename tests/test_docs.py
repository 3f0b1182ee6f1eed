"""Notebooks and pages as data: links, badges, install lines, llms.txt, both READMEs, processed pages, reference."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
import unicodedata
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import nbformat
import pytest
import yaml
from test_project import MODULES, NOTEBOOKS, PACKAGE, ROOT, name_of, project_files, public_names, settings

NBS = ROOT / "nbs"
TUTORIALS = [path for path in NOTEBOOKS if path.parent.name == "tutorials"]
PAGES = sorted((NBS / "background").glob("*.qmd"))
FENCE = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|!?\[[^\]]*\]\([^)]*\))*\]\(([^)\s]+)\)")


def prose_of(path: Path) -> str:
    """What a reader sees, without code and without outputs."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))


def targets_of(path: Path) -> list[str]:
    """Every address that a page links to, those of images inside links included."""
    prose, found = prose_of(path), []
    for match in LINK.finditer(prose):
        found += [match[1], *re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", match[0])]
    return sorted({*found, *re.findall(r'(?:src|href)="([^"]+)"', prose)})


def anchors_of(path: Path) -> set[str]:
    """The names of a page's headings, as Pandoc and GitHub make them."""
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", prose_of(path), flags=re.MULTILINE):
        kept = [c for c in heading.strip().lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
        anchors.add("".join(kept).replace(" ", "-"))
    return anchors


def code_of(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def script(name: str):
    loader = SourceFileLoader(name, str(ROOT / ".ci" / name))
    module = module_from_spec(spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


# ---- links


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES, *sorted(ROOT.glob("*.md"))], ids=name_of)
def test_links_lead_somewhere(path):
    repository, broken = settings()["git_url"], []
    for target in targets_of(path):
        place, _, anchor = target.partition("#")
        if target.startswith(f"{repository}/blob/main/") or target.startswith(f"{repository}/actions/workflows/"):
            inside = place.replace("actions/workflows/", "blob/main/.github/workflows/").removesuffix("/badge.svg")
            if not (ROOT / inside.removeprefix(f"{repository}/blob/main/")).exists():
                broken.append(target)
        elif re.match(r"[a-z]+:", target):
            if not target.startswith("https://"):
                broken.append(target)
        else:
            file = path if not place else (path.parent / place)
            if not file.exists() or (anchor and file.is_file() and anchor not in anchors_of(file)):
                broken.append(target)
    assert not broken, f"{name_of(path)} links to what is not there: {', '.join(broken)}"


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n[a](#a-page) [b](#b) [c](c.ipynb) [![d](d.svg)](https://e.f)", encoding="utf-8")
    assert targets_of(page) == ["#a-page", "#b", "c.ipynb", "d.svg", "https://e.f"]
    assert anchors_of(page) == {"a-page"}


# ---- tutorials: badge, install line, order


@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_badge_opens_this_notebook(path):
    badge = nbformat.read(path, as_version=4).cells[1].source.splitlines()[0]
    image, address = re.fullmatch(r"\[!\[Open In Colab\]\((\S+)\)\]\((\S+)\)", badge).groups()
    assert image == "https://colab.research.google.com/assets/colab-badge.svg"
    repository = settings()["git_url"].removeprefix("https://github.com/")
    wanted = f"https://colab.research.google.com/github/{repository}/blob/{settings()['branch']}/{name_of(path)}"
    assert address == wanted


@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_install_line_disturbs_nothing(path):
    (cell,) = [source for source in code_of(path) if "pip install" in source]
    assert cell.startswith("#| hide\n#| eval: false\n"), "shown in Colab, not on the site, not run by its build"
    assert "-e /content" in cell, "outside Colab it does nothing"
    assert re.search(rf"pip install -q .*git\+{re.escape(settings()['git_url'])}(;|$)", cell)
    assert not re.search(r"--upgrade|--force|(^|\s)-U\b|install[^;]*\sjax", cell), "Colab's JAX stays as it is"
    assert "google.colab" not in cell and "!" in cell


@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_backend_is_chosen_before_keras_is_imported(path):
    sources = code_of(path)
    chosen = [i for i, source in enumerate(sources) if 'os.environ["KERAS_BACKEND"] = "jax"' in source]
    imports = rf"^\s*(?:import|from) (?:keras|keras_nlp|keras_hub|jax|{PACKAGE})\b"
    imported = [i for i, source in enumerate(sources) if re.search(imports, source, flags=re.MULTILINE)]
    assert chosen and imported and chosen[0] < imported[0]


def code_without_texts(path: Path) -> list[str]:
    """Each code cell as a syntax tree in which every text is empty."""
    cells = []
    for source in code_of(path):
        tree = ast.parse("" if source.startswith("#| hide\n#| eval: false\n!") else source)
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                node.values = [value for value in node.values if isinstance(value, ast.FormattedValue)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
        cells.append(ast.dump(tree))
    return cells


def test_both_languages_run_the_same_code():
    english, korean = NBS / "tutorials" / "fine_tune_on_colab.ipynb", NBS / "tutorials" / "fine_tune_on_colab_ko.ipynb"
    assert code_without_texts(english) == code_without_texts(korean)
    kinds = [[cell.cell_type for cell in nbformat.read(path, as_version=4).cells] for path in (english, korean)]
    assert kinds[0] == kinds[1]
    hangul = [cell for cell in nbformat.read(korean, as_version=4).cells if re.search("[가-힣]", cell.source)]
    assert len(hangul) > 20


@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_outputs_know_no_folder_of_a_machine(path):
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        for output in cell.get("outputs", []):
            text = output.get("text", "") + "".join(
                value for kind, value in output.get("data", {}).items() if kind.startswith("text/")
            )
            found = re.search(r"(?<![\w.:/])/(?:opt|usr|root|home|tmp|var|Users)/\S+", text)
            assert not found or "/dev/" in found[0], f"cell {number} stores {found[0]}"


# ---- the site


def test_site_fetches_nothing_when_it_is_read():
    site = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    html = site["format"]["html"]
    assert html["theme"] == "default" and html["html-math-method"] == "mathml" and site["website"]["search"] is True
    style = (NBS / html["css"]).read_text(encoding="utf-8")
    icon = (NBS / site["website"]["favicon"]).read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?:", style)
    assert not re.search(r"href|@import|<script", icon) and len(icon) < 2000
    assert "llms.txt" in site["project"]["resources"]


def test_sidebar_has_its_sections():
    site = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    sections = [section["section"] for section in site["website"]["sidebar"]["contents"]]
    assert sections == ["Start", "Tutorials", "The rooms", "Background"]


def test_addresses_in_llms_txt_are_those_that_nbdev_gives():
    from nbdev.doclinks import _nbpath2html

    address = script("llms").address_of
    for path in NOTEBOOKS:
        name = path.relative_to(NBS)
        assert address(name.as_posix()) == _nbpath2html(name).as_posix()
    assert address("background/lora.qmd") == "background/lora.html" and address("02a_memory.ipynb") == "memory.html"


def test_llms_txt_is_fresh(tmp_path):
    done = subprocess.run([sys.executable, ".ci/llms", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (NBS / "llms.txt").read_text(encoding="utf-8")
    assert text.startswith(f"# {PACKAGE}\n\n> ") and "TODO" not in text
    assert len(re.findall(r"^- \[.+\]\(https://\S+\.html\): \S", text, flags=re.MULTILINE)) == len(
        [name for section in text.split("## ")[1:] for name in section.splitlines() if name.startswith("- ")]
    )


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_background_page_reads_well(path):
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    front = yaml.safe_load(front)
    assert (front.get("title") or front.get("pagetitle")) and front["description"].endswith(".")
    assert not re.search(r"^# ", FENCE.sub("", body), flags=re.MULTILINE), "the title is the only H1"
    assert "```{" not in body, "code here is run by a test, not by the build"
    for included in re.findall(r"\{\{< include (\S+) >\}\}", body):
        assert (path.parent / included).is_file()


@pytest.mark.parametrize("path", [p for p in PAGES if "```python" in p.read_text(encoding="utf-8")], ids=name_of)
def test_code_of_background_page_runs(path, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, name_of(path), "exec"), names)
    assert capsys.readouterr().out.strip()


# ---- processed pages


def test_pages_script_finds_what_is_wrong(tmp_path):
    faults = script("pages").faults
    good = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_raw_cell("---\ntitle: T\n---"),
            nbformat.v4.new_markdown_cell("[other](other.ipynb) [here](#part)\n\n## Part"),
            nbformat.v4.new_code_cell("#| echo: false\n1"),
        ]
    )
    nbformat.write(good, tmp_path / "good.ipynb")
    nbformat.write(good, tmp_path / "other.ipynb")
    assert faults(tmp_path) == []
    bad = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("#| export\n1"),
            nbformat.v4.new_markdown_cell(" "),
            nbformat.v4.new_markdown_cell("[lost](lost.ipynb)"),
            nbformat.v4.new_markdown_cell("#| hide"),
        ]
    )
    nbformat.write(bad, tmp_path / "bad.ipynb")
    signature = "```python\ndef f(\n    a, # as [`g`](https://site/m.html#g)\n)\n```"
    shown = nbformat.v4.new_code_cell("#| echo: false\nshow_doc(f)")
    shown.outputs = [nbformat.v4.new_output("display_data", {"text/markdown": signature})]
    bad.cells.append(shown)
    nbformat.write(bad, tmp_path / "bad.ipynb")
    listed = "- [A](https://site/good.html): a\n- [B](https://site/02_lost.html): b\n"
    (tmp_path / "llms.txt").write_text(listed, encoding="utf-8")
    (tmp_path / "page.qmd").write_text("---\ntitle: T\n---\n[lost](nowhere/lost.qmd)\n", encoding="utf-8")
    assert [fault.split(": ", 1)[1] for fault in faults(tmp_path)] == [
        "cell 0 holds the directive #| export",
        "cell 1 is empty",
        "cell 2 links to lost.ipynb, which is not there",
        "cell 3 holds the directive #| hide",
        "cell 4 shows the raw link (https://site/m.html#g) in a signature; write the name without backticks",
        "the page links to nowhere/lost.qmd, which is not there",
        "lists https://site/02_lost.html, which is not there",
    ]


# ---- README in two languages


def fences(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def outputs(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def numbers(text: str) -> list[str]:
    """Numbers of tables, in their order; those of the prose, sorted, since languages order their words differently."""
    prose = re.sub(r"\]\([^)]*\)", "", FENCE.sub("", text))
    in_tables = [line for line in prose.splitlines() if line.startswith("|")]
    others = "\n".join(line for line in prose.splitlines() if not line.startswith(("|", "    ")))
    digits = r"\d+(?:,\d{3})*(?:\.\d+)*"
    return re.findall(digits, "\n".join(in_tables)) + ["|"] + sorted(re.findall(digits, others))


def without_comments(fence: str) -> str:
    """A shell fence without its remarks, which are translated; code is compared as it stands."""
    return "\n".join(re.sub(r"\s+# .*$", "", line) for line in fence.splitlines())


def test_both_readmes_say_the_same():
    english, korean = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md"))
    assert list(map(without_comments, fences(korean))) == list(map(without_comments, fences(english)))
    assert outputs(korean) == outputs(english), "what the Python lines print"
    assert numbers(korean) == numbers(english)
    spans = [re.findall(r"`([^`\n]+)`", re.sub(r"<!--.*?-->", "", FENCE.sub("", text))) for text in (english, korean)]
    assert sorted(spans[1]) == sorted(spans[0])
    images = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")
    assert images.findall(korean) == images.findall(english)
    assert len(re.findall("^## ", korean, flags=re.MULTILINE)) == len(re.findall("^## ", english, flags=re.MULTILINE))


def test_difference_between_readmes_is_found():
    assert numbers("| a | 0.83 |\n\n300 of 440") == numbers("| 가 | 0.83 |\n\n440 가운데 300")
    assert numbers("| a | 0.83 |") != numbers("| 가 | 0.82 |")
    assert without_comments("train  # this\n") == without_comments("train  # 이것\n")


def test_badges_of_readme_are_true():
    from test_project import pyproject

    project, texts = pyproject()["project"], {}
    for path in sorted((NBS / "images").glob("badge_*.svg")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"href|url\(http|<script|@import", text), "a badge fetches nothing"
        texts[path.stem] = " ".join(re.findall(r"<text[^>]*>([^<]+)</text>", text))
    assert set(texts) == {"badge_colab", "badge_licence", "badge_python"}
    assert texts["badge_licence"].endswith(project["license"])
    versions = [c.rsplit(" ", 1)[1] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert texts["badge_python"] == "Python " + " | ".join(versions)


# ---- reference: every public name


OUR_TYPES = {"Adapter", "Base", "LabelScorer", "LabelWords", "PromptTemplate", "Recipe", "Rows", "TextTokenizer"}
OUR_TYPES |= {"PretrainingSettings", "Settings"}


def comment_lines(source: str) -> set[int]:
    """Lines that end in a remark."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT and "fmt:" not in token.string}


def undocumented(function: ast.FunctionDef, name: str, lines: set[int], method: bool) -> list[str]:
    """Parameters without a remark, and errors raised here that the docstring does not name."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    arguments += filter(None, (function.args.vararg, function.args.kwarg))
    if method and arguments and arguments[0].arg in ("self", "cls"):
        arguments = arguments[1:]
    gaps = []
    for argument in arguments:
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        if argument.arg == "seed" or set(re.findall(r"\w+", kind)) & OUR_TYPES:
            continue  # the type says what it is
        if argument.end_lineno not in lines:
            gaps.append(f"{name}: parameter {argument.arg} is not explained")
    docstring = ast.get_docstring(function) or ""
    for node in ast.walk(function):
        called = node.exc.func if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else None
        error = getattr(called, "id", "")
        if error and error[0] != "_" and error not in docstring:
            gaps.append(f"{name}: raises {error} and does not say so")
    return gaps


def gaps_of(path: Path) -> set[str]:
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), comment_lines(source)
    public = public_names(tree)
    (notebook,) = [nb for nb in NOTEBOOKS if nb.parent == NBS and nb.stem.partition("_")[2] == path.stem]
    examples = "\n".join(code for code in code_of(notebook) if not re.match(r"#\| ?export", code))
    gaps = []
    for node in tree.body:
        if getattr(node, "name", None) not in public:
            continue
        name = node.name.replace("_", "-") if path.stem == "cli" else node.name  # as the shell calls it
        if not re.search(rf"\b{name}\b", examples):
            gaps.append(f"{node.name}: no example")
        if path.stem == "cli":
            continue  # what Typer shows as help is tested in test_cli.py
        if isinstance(node, ast.FunctionDef):
            gaps += undocumented(node, node.name, lines, method=False)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and (member.name == "__init__" or member.name[0] != "_"):
                    gaps += undocumented(member, f"{node.name}.{member.name}", lines, method=True)
    return {f"{path.stem}: {gap}" for gap in gaps}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_are_explained_and_shown(path):
    assert not (gaps := gaps_of(path)), "\n".join(sorted(gaps))


def test_gaps_are_found():
    source = "def f(\n    a: int,\n    b: int,  # what b is\n    base: Base,\n):\n    'Text.'\n    raise KeyError(a)\n"
    function = ast.parse(source).body[0]
    assert undocumented(function, "f", comment_lines(source), method=False) == [
        "f: parameter a is not explained",
        "f: raises KeyError and does not say so",
    ]


def test_nothing_of_this_is_left_out():
    assert len(TUTORIALS) >= 5 and len(PAGES) >= 4 and os.access(ROOT / ".ci" / "llms", os.X_OK)
    assert os.access(ROOT / ".ci" / "pages", os.X_OK) and NBS / "favicon.svg" in project_files()
