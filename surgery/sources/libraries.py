"""The three model libraries, imported when asked for and never otherwise; and our own modules."""

from __future__ import annotations

import importlib
import importlib.util
import re
from types import ModuleType
from typing import Any, cast

from surgery.errors import SourceError
from surgery.version import __version__

NAMES = ("timm", "transformers", "diffusers")
#: What stands for a library where a model is one of this project's own backbones.
PLAIN = "plain"
_PLAIN_PACKAGE = "architectures.backbones."

# What a library raises when its arguments do not make a model. Anything else is a bug to see raw.
BUILD_ERRORS = (
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    AssertionError,
    IndexError,
    RuntimeError,
    ImportError,
    NotImplementedError,
    ZeroDivisionError,
    OSError,
)


def require(name: str) -> ModuleType:
    """Import one of the three libraries.

    Raises:
        SourceError: it is not installed; the message names the extra that installs it.
    """
    if not installed(name):
        raise SourceError(
            f"{name} is not installed",
            hint=f"pip install 'model-surgery[{name.partition('.')[0]}]'",
        )
    return importlib.import_module(name)


def installed(name: str) -> bool:
    """Whether ``name`` could be imported, found out without importing it."""
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def version(library: str) -> str:
    """The version of one of the three libraries, or of this project for its own backbones."""
    return __version__ if library == PLAIN else str(require(library).__version__)


def attributes(obj: object) -> dict[str, Any]:
    """What an object or a class carries in its own ``__dict__``."""
    return dict(vars(obj))


def library_of(cls: type) -> str | None:
    """The library that defines ``cls``, ``plain`` for our own backbones, or None for a user's."""
    if cls.__module__.startswith(_PLAIN_PACKAGE):
        return PLAIN
    package = cls.__module__.partition(".")[0]
    return package if package in NAMES else None


def stock_class(obj: object) -> type:
    """The class the library defined, beneath the subclass that surgery grafts onto an object."""
    marks = (cls.__dict__.get("__surgery__") for cls in type(obj).__mro__)
    mark = cast("Any", next((found for found in marks if found is not None), None))
    return type(obj) if mark is None else mark.base


def class_path(obj: object) -> str:
    """The dotted path of the library's class of ``obj``."""
    cls = stock_class(obj)
    return f"{cls.__module__}.{cls.__qualname__}"


_MODEL_MODULE = {
    "transformers": re.compile(r"transformers\.models\.\w+\.modeling_\w+"),
    "diffusers": re.compile(r"diffusers\.models(\.\w+)+"),
}


def resolve_class(library: str, path: str, base: str) -> Any:
    """The class at the dotted ``path``, if it is a model class that ``library`` itself defines.

    A description may come from a downloaded file, so nothing outside the model modules of an
    installed library is ever imported for one.

    Args:
        library: "transformers" or "diffusers".
        path: ``module.ClassName``.
        base: Name of the class, at the top of the library, that it must derive from.

    Raises:
        SourceError: the path leads anywhere else.
    """
    module_name, _, class_name = path.rpartition(".")
    if not _MODEL_MODULE[library].fullmatch(module_name):
        raise SourceError(
            f"refused to resolve {path!r}: only the model classes of {library} are looked up"
        )
    top = require(library)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SourceError(
            f"{library} {top.__version__} has no module {module_name!r}",
            hint=f"the model was described under another version of {library}; install that one",
        ) from error
    found = module.__dict__.get(class_name)
    defined_here = (
        isinstance(found, type)
        and issubclass(found, getattr(top, base))
        and found.__module__ == module_name
    )
    if not defined_here:
        raise SourceError(f"{path!r} is not a model class of {library} {top.__version__}")
    return found
