"""Packages that need not be installed: one that is missing is no error, one that is broken is."""

from __future__ import annotations

import importlib
from types import ModuleType

from ksa_model.config import ModelConfigError


def import_if_installed(module: str, package: str) -> ModuleType | None:
    """`module`, which needs `package`; None where that is not installed.

    Raises `ModelConfigError` for any other failure, such as half an installation or a library that cannot be loaded:
    slower kernels in its place would go unnoticed.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return None
        detail = " ".join(str(error).split())
        raise ModelConfigError(
            f"{package} is installed, but {module} cannot be imported ({type(error).__name__}: {detail}): install "
            f"{package} again, or remove it to do without its kernels"
        ) from error
