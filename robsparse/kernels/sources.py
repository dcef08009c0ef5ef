"""The C sources of the kernels: their files, the flags of the compiler, and their digest.

`setup.py` runs this file before the package is installed, so it imports only standard modules.
"""

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
COMPILED = "_kernels.c"
INCLUDED = ("_template.h", "_norm.h", "_pool.h")
# The first list of flags that the compiler accepts counts. Without OpenMP, one thread computes.
FLAGS = (["-O3", "-fopenmp"], ["-O3"])


def digest() -> str:
    """Return a digest of the sources and the flags. A compiled module has the one it is made of."""
    texts = [(FOLDER / name).read_bytes() for name in (COMPILED, *INCLUDED)]
    return hashlib.sha256(b"\0".join([*texts, str(FLAGS).encode()])).hexdigest()[:16]
