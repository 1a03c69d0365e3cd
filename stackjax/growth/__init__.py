"""Growth operators: pure functions from a small model to a large one."""

from stackjax.runtime.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
