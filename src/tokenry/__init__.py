"""tokenry: everything that happens to a token in a transformer.

Importing `tokenry` is instant; torch and transformers are imported by the first name that needs them.
"""

from .core.lazy import exports

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = exports(__name__, __file__)
