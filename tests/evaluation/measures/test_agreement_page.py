"""The page of agreement marks the rows with the largest KL, and its student is the student."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.progress import final
from kd.evaluation.measures.agreement import evaluate_agreement
from kd.evaluation.measures.agreement_page import MARKED, write_agreement_page


def test_the_page_marks_what_differs_most_with_both_distributions(
    student, student64, cache: Path, tmp_path: Path
) -> None:
    import torch

    reader = CacheReader(cache)
    result = final(evaluate_agreement(student, reader, limit=12))
    assert result.row_kl.mean() == pytest.approx(result.kl.value)
    write_agreement_page(student, reader, result.row_kl, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
    marked = [int(n) for n in re.findall(r'class="t picked[^"]*" data-t="(\d+)"', page)]
    apart = [float(re.findall(r"([\d.]+) nats apart", data[n]["heading"])[0]) for n in marked]
    assert apart == pytest.approx(np.sort(result.row_kl)[::-1][:MARKED], abs=6e-4)
    example, row = (int(x) for x in re.findall(r"<h2>example (\d+): .*?, token (\d+)</h2>", unescape(page))[0])
    one = reader[example]
    with torch.no_grad():
        z = student64(input_ids=torch.from_numpy(one.input_ids.astype(np.int64))[None]).logits[0, :, :400]
    q = z[len(one.context_ids) - 1 + row].softmax(-1)
    teacher, pupil = data[marked[0]]["sides"]
    assert (teacher["name"], pupil["name"]) == ("teacher", "student")
    assert [p for _, p, _ in pupil["top"]] == pytest.approx(q.topk(10).values.tolist(), rel=1e-4)
    rank = 1 + int((q > q[int(one.targets.gold_ids[row])]).sum())
    assert f"rank {rank:,}" in dict(pupil["said"])["in the text"]
