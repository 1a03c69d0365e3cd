"""The decoder as pure functions: `init`, `apply`, `logical_axes`. Only this room uses Flax."""

from stackjax.runtime.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
