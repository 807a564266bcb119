"""Griffe extension: docstrings as `docstrings.to_markdown` has them."""

import importlib.util
import pathlib
from typing import Any

import griffe

_spec = importlib.util.spec_from_file_location(
    "docstrings", pathlib.Path(__file__).with_name("docstrings.py")
)
_docstrings = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_docstrings)


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _docstrings.to_markdown(obj.docstring.value)
