"""What this package relies on in private parts of Keras and JAX, and that nothing outside `upstream` does."""

import ast
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from gemma_lora_sentiment.backend import jax, keras
from gemma_lora_sentiment.upstream import use_program_store, without_drawing, without_values

# --- the hooks ------------------------------------------------------------------------------------------------------


def kernel_of(**arguments):
    layer = keras.layers.Dense(4, **arguments)
    layer.build((None, 3))
    return layer.kernel


def test_variables_that_would_be_random_are_zero_without_a_program():
    """Fails when Keras gives variables their first values by other means than `_initialize_with_initializer`."""
    usual, compiled = keras.Variable._initialize_with_initializer, []

    def listen(event, seconds, **more):
        if "backend_compile" in event:
            compiled.append(more)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with without_drawing():
            for name in ("glorot_uniform", "random_normal", "random_uniform", "truncated_normal", "zeros"):
                kernel = kernel_of(kernel_initializer=name)
                assert kernel.shape == (3, 4) and not kernel.numpy().any(), name
        assert compiled == []
        assert kernel_of().numpy().any() and compiled, "outside it is drawn, and this can fail"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    with without_drawing():
        embedding = keras.layers.Embedding(5, 2, dtype="bfloat16")
        embedding.build()
        assert (kernel_of(kernel_initializer="ones").numpy() == 1).all(), "what is not drawn is as it was"
    assert str(embedding.embeddings.value.dtype) == "bfloat16" and embedding.embeddings.path.endswith("embeddings")
    assert keras.Variable._initialize_with_initializer is usual


def test_another_thread_draws_on():
    drawn = []
    with without_drawing():
        thread = threading.Thread(target=lambda: drawn.append(kernel_of().numpy().any()))
        thread.start()
        thread.join()
    assert drawn == [True]


def test_it_is_put_back_after_an_error():
    usual = keras.Variable._initialize_with_initializer
    with pytest.raises(KeyError), without_drawing():
        raise KeyError
    assert keras.Variable._initialize_with_initializer is usual


def test_variables_without_values_take_no_memory_and_stay_so():
    """Fails when Keras keeps those that wait for values under another name than `uninitialized_variables`."""
    from keras.src.backend.common import global_state

    with without_values():
        wide = keras.layers.Embedding(10**9, 1000)  # 4 TB
        wide.build()
        waiting = global_state.get_global_attribute("uninitialized_variables")
        assert any(variable is wide.embeddings for variable in waiting)
    assert wide.embeddings.shape == (10**9, 1000) and str(wide.embeddings.dtype) == "float32"
    assert not global_state.get_global_attribute("uninitialized_variables")
    with keras.StatelessScope():  # whose end would fill them
        pass
    assert kernel_of().numpy().any()


def test_without_the_reset_keras_would_fill_them():
    from keras.src.backend.common import global_state

    made = []
    with keras.StatelessScope(initialize_variables=False):
        made.append(kernel_of())
    assert global_state.get_global_attribute("uninitialized_variables")
    with keras.StatelessScope():
        pass
    assert not global_state.get_global_attribute("uninitialized_variables"), "they were filled"
    assert made[0].numpy().any()


class Store:
    """As the cache room has it, in memory."""

    _path = Path()

    def __init__(self):
        self.kept, self.asked = {}, []

    def get(self, key):
        self.asked.append(key)
        return self.kept.get(key)

    def put(self, key, value):
        self.kept[key] = value


@pytest.fixture
def settings():
    """JAX's compile cache on, for any program."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    yield lambda folder: [
        jax.config.update(name, value) for name, value in zip(names, (str(folder), 0.0, True), strict=True)
    ]
    for name, value in before.items():
        jax.config.update(name, value)
    use_program_store(None)


def compute():
    jax.clear_caches()
    return float(jax.jit(lambda x: (x @ x).sum() + 3)(np.ones((16, 16), np.float32)))


def test_jax_keeps_and_finds_programs_in_our_store(settings, tmp_path):
    """Fails when JAX asks another object than `compilation_cache._cache`."""
    settings(tmp_path)
    store = Store()
    assert use_program_store(store)
    assert compute() == 4099.0
    assert store.kept and all(isinstance(value, bytes) for value in store.kept.values())
    assert not list(tmp_path.iterdir()), "JAX's own store got nothing"
    events = []

    def listen(name, **more):
        events.append(name)

    jax.monitoring.register_event_listener(listen)
    try:
        kept = dict(store.kept)
        store.asked.clear()
        assert compute() == 4099.0
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert store.asked and store.kept == kept
    assert any(name.endswith("compilation_cache/cache_hits") for name in events)
    assert use_program_store(None)
    assert compute() == 4099.0 and list(tmp_path.iterdir()), "and now JAX's own"


def test_a_jax_that_keeps_its_programs_otherwise_is_left_alone(monkeypatch):
    import jax._src

    monkeypatch.delattr(jax._src, "compilation_cache")
    monkeypatch.setitem(sys.modules, "jax._src.compilation_cache", None)
    assert not use_program_store(Store())


# --- and nothing else -----------------------------------------------------------------------------------------------

ROOMS = sorted((Path(__file__).resolve().parents[1] / "gemma_lora_sentiment").glob("*.py"))
OTHERS = ("keras", "keras_hub", "keras_nlp", "jax", "jaxlib", "optax")
PRIVATE = re.compile(r"_[A-Za-z]\w*")  # no name with two underscores before it
PRIVATE_MODULE = re.compile(rf"\b({'|'.join(OTHERS)})(\.\w+)*\.(_src|src)\b")
NAMED_AFTER = re.compile(r"_\w*(xla|jax|keras|jit)\w*")  # a function of theirs, told by its name
REACHES = ("getattr", "setattr", "hasattr", "delattr", "__setattr__", "__getattribute__", "attrgetter", "methodcaller",
           "setitem", "patch", "object")  # fmt: skip
OF_PYTHON = {"_asdict", "_fields", "_replace"}  # of named tuples
AT_MOST = 8


def own_names(trees):
    """Private names that the package itself defines: functions, classes, methods, attributes, module variables."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            ):  # fmt: skip
                names.add(node.attr)
    return {name for name in names if PRIVATE.fullmatch(name)}


def strings_as_names(node):
    """Strings by which this node reaches an attribute."""
    parts = []
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        parts = node.args if called in REACHES else []
    elif isinstance(node, ast.Subscript):
        inner = node.value
        of_vars = isinstance(inner, ast.Call) and getattr(inner.func, "id", "") == "vars"
        parts = [node.slice] if of_vars or getattr(inner, "attr", "") == "__dict__" else []
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def root_of(node):
    """The name that a chain of attributes begins with."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def hooks_of(tree, own):
    """Private parts of other packages that this source reaches, by name."""
    found, docstrings = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if PRIVATE_MODULE.search(alias.name)}
            found |= {a.name for a in node.names if a.name.split(".")[0] in OTHERS and "._" in a.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OTHERS and not node.level:
            if PRIVATE_MODULE.search(node.module) or "._" in node.module:
                found.add(node.module)
            found |= {alias.name for alias in node.names if PRIVATE.fullmatch(alias.name) or alias.name == "src"}
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            theirs = root_of(node) in OTHERS or node.attr not in own | OF_PYTHON
            if theirs and root_of(node) not in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Attribute) and node.attr == "src" and root_of(node) in OTHERS:
            found.add(f"{root_of(node)}.src")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if PRIVATE_MODULE.search(node.value) or NAMED_AFTER.fullmatch(node.value):
                found.add(node.value)
        for name in strings_as_names(node):
            if PRIVATE.fullmatch(name) and name not in own:
                found.add(name)
    return found


def all_hooks():
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in ROOMS if path.name != "_modidx.py"}
    own = own_names(tree for name, tree in trees.items() if name != "upstream.py")
    return {name: hooks_of(tree, set() if name == "upstream.py" else own) for name, tree in trees.items()}


def test_private_parts_of_others_are_reached_in_one_room_and_seldom():
    found = {name: hooks for name, hooks in all_hooks().items() if hooks}
    assert set(found) == {"upstream.py"}, found
    assert {"_initialize_with_initializer", "keras.src.backend.common", "jax._src"} <= found["upstream.py"]
    assert len(found["upstream.py"]) <= AT_MOST, found


def test_every_hook_is_named_where_it_is_explained():
    """The notebook of the room says of each what would replace it."""
    import json

    notebook = Path(__file__).resolve().parents[1] / "nbs" / "01c_upstream.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for hook in all_hooks()["upstream.py"]:
        assert hook in text, hook


@pytest.mark.parametrize("source, hook", [
    ("import keras.src.ops", "keras.src.ops"),
    ("from keras.src.backend.common import global_state", "keras.src.backend.common"),
    ("from keras import src", "src"),
    ("def f():\n    from jax._src import core", "jax._src"),
    ("from jax.experimental import _private", "_private"),
    ("x = keras.src.backend", "keras.src"),
    ("backbone._flatten_layers()", "_flatten_layers"),
    ("keras.Variable._value = 1", "_value"),
    ("model.layers[0].attention._mask(1)", "_mask"),
    ("jax.jit(f)._own()", "_own"),  # a name of ours too, and yet theirs
    ("getattr(layer, '_kernel')", "_kernel"),
    ("setattr(layer, '_kernel', 1)", "_kernel"),
    ("object.__setattr__(layer, '_kernel', 1)", "_kernel"),
    ("vars(layer)['_kernel']", "_kernel"),
    ("frame.f_code.co_name in ('_xla_gc_callback',)", "_xla_gc_callback"),
    ("attrgetter('_kernel')(layer)", "_kernel"),
    ("layer.__dict__['_kernel']", "_kernel"),
    ("import_module('keras_hub.src.models')", "keras_hub.src.models"),
    ("patch('jax._src.core.Tracer')", "jax._src.core.Tracer"),
])  # fmt: skip
def test_what_counts(source, hook):
    assert hook in hooks_of(ast.parse(source), {"_own"})


@pytest.mark.parametrize("source", [
    "import keras", "self._cache = 1", "fit._own()", "keras.ops.add(1, 2)", "row._asdict()", "x.__class__",
    "'a string about keras'", "_own = 1", "suffixes = ('_first', '_second')", "def f():\n    'see keras.src'",
])  # fmt: skip
def test_what_does_not_count(source):
    assert not hooks_of(ast.parse(source), {"_own"})
