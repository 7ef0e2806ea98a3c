"""What `sglang_batchllm` itself offers, and what importing it costs."""

import subprocess
import sys

import sglang_batchllm

SCRIPT = """
import sys

def loaded():
    return sorted({"numpy", "sglang", "torch"} & set(sys.modules))

import sglang_batchllm
print(loaded(), sglang_batchllm.__version__, sglang_batchllm.SGLANG_VERSIONS)
assert set(sglang_batchllm.__all__) <= set(dir(sglang_batchllm))
try:
    sglang_batchllm.plan_batches
except AttributeError as error:
    print(error)
plan = sglang_batchllm.plan_batch([[1, 2, 3], [1, 2, 4]])
assert isinstance(plan, sglang_batchllm.BatchPlan)
print(loaded(), plan.report.distinct_tokens)
from sglang_batchllm import get_report
print(loaded(), get_report.__name__)

import sglang_batchllm.client.run_batch  # before SGLang, whose import makes us wrap its functions
from sglang.lang import interpreter
from sglang.lang.backend.base_backend import BaseBackend
print(interpreter.run_program_batch.__wrapped__.__name__)

class Silent(BaseBackend):
    pass

import sglang as sgl

@sgl.function
def program(s, number):
    s += str(number)

states = program.run_batch([{"number": 0}, {"number": 1}], backend=Silent())
print([state.text() for state in states])
"""


def test_what_is_offered_comes_without_sglang_and_our_client_before_it():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        f"[] 0.1.0 {sglang_batchllm.SGLANG_VERSIONS}",
        "module 'sglang_batchllm' has no attribute 'plan_batches'",
        "['numpy'] 4",
        "['numpy'] get_report",
        "run_program_batch",
        "['0', '1']",
    ], run.stderr
