"""On a device that is not the host every tensor is where it is needed, and nothing waits for it; see `elsewhere.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_selection_the_teacher_pass_and_every_loss_stay_on_the_device_and_wait_for_nothing() -> None:
    script = Path(__file__).with_name("elsewhere.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    watched = {name: failure for name, failure in found.items() if name.startswith("must fail")}
    assert len(watched) == 4
    assert all(watched.values()), watched  # what this test would see
    assert len(found) > 30
    assert {name: failure for name, failure in found.items() if failure and name not in watched} == {}
