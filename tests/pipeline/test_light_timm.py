"""A teacher is loaded without torch's compiler, and everything that the compiler is for works afterwards."""

import subprocess
import sys

import pytest

_LIGHT = """
import sys

import torch

disable = torch.compiler.disable
from pipeline.teacher import load_teacher

teacher = load_teacher("digits_vit")
teacher.layer_states(torch.zeros(1, 3, 32, 32))
assert "torch._dynamo" not in sys.modules, "a teacher was made, and the compiler came with it"
assert torch.compiler.disable is disable
"""
_COMPILER = """
from torchvision.ops import roi_align

boxes = torch.tensor([[0, 0.0, 0.0, 4.0, 4.0]])
assert roi_align(torch.ones(1, 1, 8, 8), boxes, 2).sum() == 4

late = sys.modules["timm.layers.typing"].disable_compiler
graphs = []


def count(graph, inputs):
    graphs.append(graph)
    return graph.forward


@late
def twice(x):
    return x + x


def both(x):
    return twice(x + 1) * 2


assert torch.compile(both, backend=count)(torch.ones(2)).tolist() == [8.0, 8.0]
assert "torch._dynamo" in sys.modules
assert sys.modules["torch._dynamo.utils"].__file__.endswith("utils.py")
targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
assert len(targets) == 2, targets  # + 1 and * 2 were compiled, the sum of the marked function was not
"""


@pytest.mark.parametrize("more", ["", pytest.param(_COMPILER, marks=pytest.mark.slow)], ids=["light", "then compiled"])
def test_teacher_needs_no_compiler_and_the_compiler_works_after_it(more: str) -> None:
    script = f"{_LIGHT}{more}print('all right')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=500)
    assert (done.returncode, done.stdout) == (0, "all right\n"), done.stderr


@pytest.mark.slow
def test_what_else_is_asked_of_the_stand_in_is_the_real_ones() -> None:
    script = """
import sys
from pipeline.light_timm import _UTILS, _LateUtils
late = sys.modules[_UTILS] = _LateUtils(_UTILS)
from torch._dynamo.utils import counters
assert sys.modules[_UTILS] is not late
import torch._dynamo
assert torch._dynamo.utils.counters is counters
assert late.is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
