"""Every example is drawn as often as the others, and an estimate is off by what its error says."""

from __future__ import annotations

import numpy as np
import pytest

from kd.cache_builder.tokens.text_sample import TextSample, draw_sample
from kd.data.rows.example import Example


def texts(count: int) -> list[Example]:
    """Pairs whose lengths spread over two orders of magnitude."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(4.0, 1.0, (count, 2)).astype(int) + 1
    return [Example(str(i), "t" * target, "p" * prompt) for i, (prompt, target) in enumerate(lengths.tolist())]


def true_values(examples: list[Example]) -> np.ndarray:
    """About a token for every four characters of the target, and some for the prompt."""
    rng = np.random.default_rng(1)
    return np.array([len(e.target) / 4 + len(e.prompt) / 40 + 3 for e in examples]) * rng.uniform(
        0.8, 1.2, len(examples)
    )


def of_sample(sample: TextSample, values: np.ndarray) -> np.ndarray:
    return values[[int(example.id) for example in sample.drawn]]


def test_every_example_is_drawn_equally_often_and_the_order_is_kept():
    examples = texts(20)
    times = np.zeros(20)
    for seed in range(3000):
        numbers = [int(e.id) for e in draw_sample(iter(examples), 5, seed=seed).drawn]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == 5
        times[numbers] += 1
    # 3,000 draws with probability 1/4: a standard deviation of 24; the largest of 20 is below 4 of them
    assert np.abs(times - 750).max() < 95


def test_a_sample_depends_on_the_seed_alone_and_what_is_counted_does_not_depend_on_it():
    examples = texts(300)
    first, again, other = (draw_sample(iter(examples), 40, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.drawn != other.drawn
    counted = [(s.examples, s.prompts, s.targets) for s in (first, other)]
    assert counted == [(300, sum(len(e.prompt) for e in examples), sum(len(e.target) for e in examples))] * 2


@pytest.mark.parametrize("count", [30, 31, 1000])
def test_a_sample_of_everything_is_exact(count):
    examples = texts(30)
    values = true_values(examples)
    sample = draw_sample(iter(examples), count, seed=0)
    assert sample.drawn == tuple(examples)
    assert sample.estimate(values) == (values.sum(), 0.0)


def test_what_follows_from_the_lengths_is_known_without_error():
    examples = texts(500)
    values = np.array([2.0 + 0.5 * len(e.prompt) + 3.0 * len(e.target) for e in examples])
    sample = draw_sample(iter(examples), 30, seed=0)
    total, error = sample.estimate(of_sample(sample, values))
    assert total == pytest.approx(values.sum(), rel=1e-9)
    assert error < 1e-6 * total


def test_about_nineteen_of_twenty_intervals_hold_the_total():
    examples = texts(1000)
    values = true_values(examples)
    held, widths = 0, []
    for seed in range(400):
        sample = draw_sample(iter(examples), 60, seed=seed)
        total, error = sample.estimate(of_sample(sample, values))
        held += abs(total - values.sum()) <= error
        widths.append(error / values.sum())
    # 0.95 with a standard deviation of 0.011; few of the longest texts are drawn, so intervals are a little short (0.91)
    assert 0.88 <= held / 400 <= 0.98
    assert np.mean(widths) < 0.06


def test_equal_lengths_leave_a_mean_and_prompts_without_text_are_no_column():
    examples = [Example(str(i), "text") for i in range(200)]
    values = np.arange(200) % 2
    sample = draw_sample(iter(examples), 50, seed=0)
    drawn = of_sample(sample, values)
    total, error = sample.estimate(drawn)
    assert total == pytest.approx(200 * drawn.mean())
    textbook = 1.96 * 200 * (drawn.var(ddof=1) * (1 - 50 / 200) / 50) ** 0.5
    assert error == pytest.approx(textbook * (50 / 49) ** 0.5)  # leaving one out is that much wider


def test_too_few_to_tell_have_no_end():
    assert draw_sample(iter(texts(10)), 2, seed=0).estimate(np.array([1, 5]))[1] == float("inf")
