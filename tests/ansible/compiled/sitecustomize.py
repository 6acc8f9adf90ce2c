"""Ansible sends its own library with each module, as source in a zip file, and Python compiles it
anew each time. Here the very same library is installed: take it from there, compiled.

Nothing else is taken from there: the modules themselves and the library of our collection come from
the zip file, as on any host.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

LIBRARY = os.environ.get("DENGINE_TEST_MODULE_UTILS", "")  # .../ansible/module_utils


class _Installed:
    @staticmethod
    def find_spec(
        name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("ansible.module_utils"):
            return None
        base = os.path.join(LIBRARY, *name.split(".")[2:])
        package = os.path.join(base, "__init__.py")
        if os.path.exists(package):
            return importlib.util.spec_from_file_location(
                name, package, submodule_search_locations=[base]
            )
        if os.path.exists(base + ".py"):
            return importlib.util.spec_from_file_location(name, base + ".py")
        return None


if LIBRARY:
    sys.meta_path.insert(0, _Installed())
