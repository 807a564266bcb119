"""Parts of `gpu_decode.py`. Importing this makes `nqkv_jax` the one of this checkout.

Two of its packages are folders of the repository's root. An installation knows, by the table in
pyproject.toml; where nothing is installed this does, from the same table.
"""

import importlib.abc
import importlib.util
import pathlib
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
_FOLDERS = _PROJECT["tool"]["setuptools"]["package-dir"]


class _Checkout(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in _FOLDERS:
            return None
        folder = ROOT / _FOLDERS[name]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


# In front of what is installed: the code that is measured is the code that is looked at.
sys.meta_path.insert(0, _Checkout())
