"""Let vLLM's second model runner, the one that returns routed experts, run on a CPU.

It needs Triton, and Triton as published has no CPU backend. Triton's own interpreter runs the same kernels without one
(TRITON_INTERPRET=1); vLLM looks for a backend of that name before it tries, so one is put there. Python imports this
file at its start, when this directory is on the path.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from triton.backends import Backend, backends


class Interpreter:
    """A driver in name only: interpreted kernels never ask for one."""

    @classmethod
    def is_active(cls) -> bool:
        return True


if "cpu" not in backends:
    backends["cpu"] = Backend(compiler=backends["nvidia"].compiler, driver=Interpreter)
