import json
import subprocess
import sys

import pytest

ABOVE = {
    "costs": ("shiftaddvit_jax.bench", "shiftaddvit_jax.pictures", "matplotlib"),
    "bench": ("shiftaddvit_jax.pictures", "matplotlib"),
}


@pytest.mark.parametrize("room", ABOVE)
def test_counting_loads_no_timing_and_timing_no_drawing(room):
    program = f"import json, sys, shiftaddvit_jax.{room}; print(json.dumps(list(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(ABOVE[room]) & set(json.loads(finished.stdout))
