"""The kernel tests run in one of two kinds of process; support/needs.py says which.

TRITON_INTERPRET=1 (set before Triton is imported): the operations on Triton's kernels, in the
watched interpreter. Otherwise: the operations in plain PyTorch, and where Triton is importable, the
compile checks.
"""

import os

import pytest

from support import needs

INTERPRET = needs.INTERPRET and needs.is_here("triton")

if INTERPRET:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads fight over small products
    from support.oracle import interpreter

    interpreter.repair()
    interpreter.watch()


@pytest.fixture(scope="session", autouse=True)
def _kernels_take_cpu_tensors():
    """Under the interpreter the kernels run on CPU tensors, so there is no reason against them."""
    if INTERPRET:
        from pack_loader import load

        load(".kernels.triton_support").obstacle = lambda *_: None
    yield
