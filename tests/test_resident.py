import os
import subprocess
import sys

from tests.runs import ROOT
from train.resident import peak_resident

MIB = 2**20


def test_the_peak_is_this_process_s_own_and_not_that_of_who_started_it():
    held = bytearray(os.urandom(1)) * (300 * MIB)
    script = "from train.resident import peak_resident; print(peak_resident())"
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert peak_resident() > len(held)
    assert MIB < int(said.stdout) < 200 * MIB


def test_a_process_that_has_ended_has_nothing():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert peak_resident(done.pid) == 0
