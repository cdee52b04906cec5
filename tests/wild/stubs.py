"""Libraries of which the modules alone are wanted: their packages without what ``__init__`` would import.

torchaudio's ``__init__`` loads a C extension that is built for another torch; neuralforecast's imports ray.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PACKAGES = ("torchaudio", "neuralforecast")


def stub_packages() -> None:
    """Puts empty packages in the place of these, whose modules are then found as ever."""
    for name in PACKAGES:
        spec = PathFinder.find_spec(name)
        if spec is None or spec.submodule_search_locations is None or name in sys.modules:
            continue
        package = ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = ModuleSpec(name, None, is_package=True)
        package.__spec__.submodule_search_locations = package.__path__
        package.__version__ = "0"  # type: ignore[attr-defined]
        sys.modules[name] = package
