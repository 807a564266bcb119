"""What MkDocs does beside rendering: a page per scheme, and the package as it is installed.

Pages of schemes are made from the docstrings and options of the code, at every build, so that they
cannot grow old.
"""

import atexit
import functools
import importlib.util
import inspect
import pathlib
import shutil
import sys
import tempfile
import types

ROOT = pathlib.Path(__file__).parents[1]
# Of a 7B model, as in the README.
SHAPE = types.SimpleNamespace(num_layers=1, num_kv_heads=32, head_dim=128)
INDEX = """# Schemes

A scheme is a name with options, such as `kivi:bits=4,residual=64`, everywhere: in `generate`, in
`nq.schemes.get`, and on the command line. Bits are stored bits per number of a long cache with 32
KV heads of 128 and default options, with scales and all else that is stored for an encoded token;
`nqkv schemes` counts them for any shape. Sinks and the latest tokens, where a scheme keeps them in
full precision, come on top.

"""


def on_config(config):
    """Where the package is, and which pages there are.

    `models` is a folder of the repository, and `nqkv_jax.models` when it is installed.
    """
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_installed_tree()]
    pages = [f"schemes/{name}.md" for name in scheme_pages()]
    config.nav = [{"Schemes": pages} if "Schemes" in entry else entry for entry in config.nav]
    return config


# Before mkdocstrings reads its configuration.
on_config.mkdocs_priority = 100


@functools.cache  # `mkdocs serve` builds many times
def _installed_tree() -> str:
    """A folder with the package as links, `models` in it; gone when Python ends."""
    tree = tempfile.mkdtemp(prefix="nqkv-jax-docs-")
    atexit.register(shutil.rmtree, tree)
    package = pathlib.Path(tree) / "nqkv_jax"
    package.mkdir()
    for path in (ROOT / "nqkv_jax").iterdir():
        (package / path.name).symlink_to(path)
    (package / "models").symlink_to(ROOT / "models")
    return tree


def on_files(files, config):
    from mkdocs.structure.files import File

    for name, content in scheme_pages().items():
        files.append(File.generated(config, f"schemes/{name}.md", content=content))
    return files


def scheme_pages() -> dict[str, str]:
    """Markdown by file name without suffix: an index, and a page per file of nqkv_jax/schemes."""
    from nqkv_jax import schemes
    from nqkv_jax.schemes import registry

    modules: dict[str, list[str]] = {}
    for name in schemes.names():
        modules.setdefault(registry._REGISTRY[name].__module__, []).append(name)
    pages, rows = {}, []
    for module, names in sorted(modules.items()):
        page = module.rpartition(".")[2]
        pages[page] = _page(sys.modules[module], names)
        for name in names:
            summary = _markdown(schemes.get(name).summary).strip()
            rows.append(f"| [`{name}`]({page}.md) | {_bits(name)} | {summary} |")
    table = ["| scheme | stored bits | what it is |", "| --- | --- | --- |", *rows]
    return dict(index=INDEX + "\n".join(table) + "\n") | pages


def _page(module: types.ModuleType, names: list[str]) -> str:
    from nqkv_jax import schemes

    title, _, rest = inspect.getdoc(module).partition("\n")
    parts = [f"# {_markdown(title).strip()}", "", _markdown(rest)]
    for name in names:
        options, choices = schemes.defaults(name), schemes.choices(name)
        parts += [f"## `{name}`", "", _markdown(schemes.get(name).summary)]
        parts += [f"Stored bits: {_bits(name)}.", ""]
        if options:
            parts += ["| option | default | one of |", "| --- | --- | --- |"]
            valid = {key: ", ".join(f"`{v!r}`" for v in choices.get(key, ())) for key in options}
            parts += [f"| `{k}` | `{default!r}` | {valid[k]} |" for k, default in options.items()]
            parts += [""]
    parts += [f"In the code: `nqkv_jax/schemes/{module.__name__.rpartition('.')[2]}.py`."]
    return "\n".join(parts) + "\n"


def _bits(name: str) -> str:
    from nqkv_jax import schemes
    from nqkv_jax.plan import AbstractCaches

    try:
        bits = AbstractCaches(SHAPE, schemes.get(name)).stored_bits
    except ValueError:  # it has to learn about a model first
        return "depends on its calibration"
    return f"{bits:.4f}".rstrip("0").rstrip(".")


def _load(name: str) -> types.ModuleType:
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_markdown = _load("docstrings").to_markdown
