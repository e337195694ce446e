"""kd train, interrupted: what signals do, and what is said."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kd.cache_builder.opening import weighted
from kd.commands.train import stop_on_signals
from kd.common.errors import DataError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals, capsys: pytest.CaptureFixture[str]):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
        assert "once more stops at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_several_caches_without_weights_are_told_so(tmp_path: Path):
    spec = f"{tmp_path},{tmp_path}"
    with pytest.raises(DataError, match="mixed by weights"):
        weighted(spec)
    assert weighted(f"{tmp_path}/a,b") == [(f"{tmp_path}/a,b", 1.0)]  # one name with a comma, not there
