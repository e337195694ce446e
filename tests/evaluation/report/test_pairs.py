"""Which arms make a pair: those of one student, and in a sweep all."""

from __future__ import annotations

from kd.evaluation.report.pairs import Arm, pairs_of


def arm(name: str, cache: str, student: str = "demo") -> Arm:
    facts = {
        "cache_fingerprint": cache,
        "loss": "ce",
        "settings": {"student": student, "cache": f"runs/cache-{name}", "seed": 0},
    }
    return Arm(name, {0: name}, 1, facts)


def test_arms_of_another_student_make_a_pair_only_where_that_is_asked_for() -> None:
    arms = [arm("few", "a"), arm("many", "b"), arm("large", "a", student="gpt2")]
    assert pairs_of(arms) == []
    assert [p.other.name for p in pairs_of(arms, "few")] == ["many"]
    pairs = pairs_of(arms, "few", other_students=True)
    assert [(p.baseline.name, p.other.name) for p in pairs] == [("few", "many"), ("few", "large")]
    assert pairs[0].differs == {"cache": ("cache-few", "cache-many")}
    assert pairs[1].differs == {"student": ("demo", "gpt2")}
