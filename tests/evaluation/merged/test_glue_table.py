"""Tables of GLUE figures: averages, errors, the best row."""

from __future__ import annotations

import pytest

from kd.evaluation.merged.glue_figures import Score
from kd.evaluation.merged.glue_table import GlueTable


def test_a_table_marks_the_best_average_and_shows_errors() -> None:
    def scores(share: float) -> dict[str, dict[str, Score]]:
        return {
            "cola": {"accuracy": Score(share, 0.03, 100), "loss": Score(0.5, 0.01, 100), "mcc": Score(0.1, None, 100)},
            "sst2": {"accuracy": Score(0.8, 0.04, 100), "loss": Score(0.3, 0.01, 100)},
        }

    table = GlueTable("scaling", ("cola", "sst2"), {"0": scores(0.5), "0.1": scores(0.7), "0.2": scores(0.7)})
    assert table.best == "0.1"  # the first of several that are equal
    average = table.average("0.1")
    assert (average.value, average.n) == (0.75, 200)
    assert average.stderr == pytest.approx(0.025)  # sqrt(0.03² + 0.04²) / 2
    text = table.markdown()
    assert "| 0.1 | 70.0 ± 3.0 | 80.0 ± 4.0 | **75.0 ± 2.5** |" in text
    assert text.count("**") == 2
    assert "| 0 | 10.0 |" in text
    report = table.report("0")
    assert set(report) == {"cola", "sst2", "average"}
    assert report["average"]["accuracy"] == 0.65
