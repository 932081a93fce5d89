"""Which kernel tests a process runs: the interpreter's, the compiler's, or those that need no Triton.

TRITON_INTERPRET=1 (set before Triton is imported): the operations on Triton's kernels, in the watched interpreter.
Otherwise: the operations in plain PyTorch, and where Triton is importable, the compile checks.
"""

import importlib.util
import os

import pytest

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
PORTABLE = ["test_custom_ops.py", "test_checks.py", "test_dispatch.py", "test_portable.py"]

collect_ignore = []
if INTERPRET:
    collect_ignore += [*PORTABLE, "test_compiled.py"]
else:
    collect_ignore += ["test_interpreter.py"]
    if importlib.util.find_spec("triton") is None:
        collect_ignore += ["test_compiled.py"]

if INTERPRET:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")        # its threads fight over small products
    import interpreter

    interpreter.repair()
    interpreter.watch()


@pytest.fixture(scope="session", autouse=True)
def _kernels_take_cpu_tensors():
    """Under the interpreter the kernels run on CPU tensors, so nothing stands against them there."""
    if INTERPRET:
        from pack_loader import load

        load(".kernels.dispatch").why_not_triton = lambda *_: None
    yield
