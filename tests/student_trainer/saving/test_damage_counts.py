"""The command that counts kills and damages finds none that was missed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "count_training_damage.py"


@pytest.mark.slow
def test_no_kill_loses_anything_and_no_damage_is_missed() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "10", "--stopped", "30", "--finished", "30", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and not line.startswith("| damaged")]
    assert [line.split(" | ")[-1] for line in rows if "`kd " in line] == ["0 |"] * 3, done.stderr
    assert [line for line in rows if "missed" in line and not line.endswith("missed 0 |")] == [], done.stderr
