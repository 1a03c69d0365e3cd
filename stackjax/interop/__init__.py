"""Import from and export to Hugging Face transformers and lit-gpt."""

import importlib.util

from stackjax.runtime.errors import UserError


def check_installed(*packages: str) -> None:
    """Raises UserError if an optional package is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install -r requirements-interop.txt"
        )
