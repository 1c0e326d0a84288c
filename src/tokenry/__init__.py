"""tokenry: everything that happens to a token in a transformer.

Importing `tokenry` is instant; torch and transformers are imported by the first name that needs them.
"""

from .errors import InputError
from .lazy import exports

__version__ = "0.1.0"

_MODULES = "attention catalog decode hooks judge measure read represent select tokenize trace train zoo".split()
_HOMES = {
    "Trace": "trace",
    "capture": "trace",
    "generate": "decode.api",
    "load": "models",
    **{name: name for name in _MODULES},
}
__all__ = ["InputError", "__version__", *sorted(_HOMES)]
__getattr__ = exports(__name__, _HOMES)
