"""The folder in which torch's compiler keeps what it has compiled."""

import atexit
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from pyro_vae.engine.tracing import NotCompiledWarning

__all__ = ["ensure_cache"]

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def ensure_cache() -> None:
    """Where the folder that ``TORCHINDUCTOR_CACHE_DIR`` names cannot be written, another one, for this process alone.

    torch makes the folder when the first optimiser is made, compiled or not, and fails where it cannot.

    Warns:
        NotCompiledWarning: it cannot be written.
    """
    if not (named := os.environ.get(_VARIABLE)):
        return
    try:
        Path(named).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=named).close()
    except OSError as error:
        os.environ[_VARIABLE] = other = tempfile.mkdtemp(prefix="torchinductor_")
        atexit.register(shutil.rmtree, other, ignore_errors=True)
        warnings.warn(
            f"{_VARIABLE}={named}: cannot be written ({error.strerror}), so what is compiled is not kept. "
            "Name a folder that can be.",
            NotCompiledWarning,
            stacklevel=2,
        )
