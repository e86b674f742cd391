"""What the computer says of itself."""

import subprocess
import sys

import numpy as np

from unremember.machine import peak_memory

CHILD = "from unremember.machine import peak_memory; print(peak_memory())"


def test_a_childs_peak_is_its_own():
    """The C library's figure is handed on: a small child of a large parent would seem as large."""
    filled = np.ones(2**27 + 2**26)  # 1.5 GB, touched
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, timeout=60)
    assert peak_memory() > filled.nbytes > 4 * int(child.stdout) > 0
