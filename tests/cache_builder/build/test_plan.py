"""A plan names the rules by which texts became ids where they make a difference, and says what was found in the texts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from kd.cache_builder.build.estimate import estimate
from kd.cache_builder.build.plan import BuildPlan, plan_build
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import CacheManifest, fingerprint_of, load_manifest
from kd.cache_builder.upkeep.merge_caches import merge_caches
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.summary import cache_summary
from kd.common.errors import CacheMismatchError, DataError
from kd.data.sources import load_corpus
from kd.data.tokenizing.block_config import BlockConfig

END = "<|endoftext|>"
PAIRS = [("Where did the fox go?", "to the river"), ("How many ships?", "seven ships")]


@pytest.fixture
def pairs_request(tmp_path: Path, build_request):
    """`make(name, pairs, separator=…)`: a build of these pairs."""

    def make(name: str, pairs: Sequence[tuple[str, str]] = PAIRS, **blocks):
        text = tmp_path / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"prompt": p, "target": t}) + "\n" for p, t in pairs))
        request = build_request(tmp_path / name, text=text)
        return dataclasses.replace(request, blocks=BlockConfig(seq_len=64, **blocks))

    return make


def rules(plan: BuildPlan | CacheManifest) -> dict[str, object]:
    identity = plan.manifest.identity if isinstance(plan, BuildPlan) else plan.identity
    return {k: v for k, v in identity["tokenizer"].items() if k in ("text_rules", "control_tokens")}


def test_rules_that_change_no_id_are_not_part_of_the_fingerprint(pairs_request, build_request, tmp_path):
    assert rules(plan_build(pairs_request("a"))) == {}
    assert rules(plan_build(pairs_request("b", control_tokens="text"))) == {}
    assert rules(plan_build(build_request(tmp_path / "documents"))) == {}


def test_rules_that_change_an_id_are_part_of_the_fingerprint(pairs_request):
    plan = plan_build(pairs_request("a", separator=" "))
    assert rules(plan) == {"text_rules": 2}
    spaced = plan_build(pairs_request("b", [*PAIRS, ("How many?", "7")], separator=" "))
    assert rules(spaced) == {"text_rules": 3}
    assert spaced.notes.document()["space_scored"] == {"count": 1, "first": "b.jsonl:2"}
    identity = plan.manifest.identity
    old = {**identity, "tokenizer": {k: v for k, v in identity["tokenizer"].items() if k != "text_rules"}}
    assert plan.manifest.fingerprint != fingerprint_of(old)
    assert plan.notes.document()["border_scored"]["count"] == 2


def test_how_control_tokens_are_read_is_named_where_it_changes_an_id(pairs_request):
    pairs = [*PAIRS, ("Which token ends a text?", f"It is {END} here.")]
    plans = {c: plan_build(pairs_request(c, pairs, control_tokens=c)) for c in ("auto", "text", "control")}
    assert rules(plans["auto"]) == {"text_rules": 2}
    assert rules(plans["text"]) == {"text_rules": 2, "control_tokens": "text"}
    assert rules(plans["control"]) == {}  # as all caches were before
    assert len({p.manifest.fingerprint for p in plans.values()}) == 3
    for name, plan in plans.items():
        note = "control_tokens_kept" if name == "control" else "control_tokens_as_text"
        assert plan.notes.document() == {note: {"count": 1, "first": f"{name}.jsonl:2"}}
    with pytest.raises(DataError, match="way to read control tokens"):
        pairs_request("other", control_tokens="maybe")


def test_plan_build_and_info_say_the_same_of_the_texts(pairs_request, run_build):
    request = pairs_request("a", [*PAIRS, ("What ends it?", f"this{END}")])
    expected = {"eos_in_text": {"count": 1, "first": "a.jsonl:2"}}
    assert estimate(plan_build(request))["token_notes"] == expected
    run_build(request)
    assert load_manifest(request.out).provenance["token_notes"] == expected
    assert cache_summary(request.out)["token_notes"] == expected
    stored = CacheReader(request.out)[2]
    assert stored.target == "this"
    assert stored.targets.gold_ids.tolist().count(0) == 1


def test_a_cache_is_extended_by_a_text_whose_ids_the_rules_change(pairs_request, run_build):
    text = [*PAIRS, ("What ends it?", f"this{END}")]
    first = pairs_request("first", PAIRS)
    run_build(first)
    longer = pairs_request("longer", text)
    longer = dataclasses.replace(longer, extend=first.out)
    run_build(longer)
    assert rules(load_manifest(first.out)) == {}
    assert rules(load_manifest(longer.out)) == {"text_rules": 2}


def older(root: Path) -> None:
    """Make a cache one of an earlier release, which did not name the rules."""
    manifest = load_manifest(root)
    provenance = {
        k: v for k, v in manifest.provenance.items() if k not in ("text_rules", "control_tokens", "token_notes")
    }
    dataclasses.replace(manifest, provenance=provenance).save(root, "manifest.json")


def test_caches_of_all_rules_merge_unless_an_older_one_may_have_other_ids(pairs_request, run_build, tmp_path):
    plain, changed = pairs_request("plain"), pairs_request("changed", [("Q", f"this{END}")])
    for request in (plain, changed):
        run_build(request)
    list(merge_caches([plain.out, changed.out], tmp_path / "both"))
    both = load_manifest(tmp_path / "both")
    assert rules(both) == {"text_rules": 2}
    assert both.provenance["token_notes"] == {"eos_in_text": {"count": 1, "first": "changed.jsonl:0"}}
    list(slice_cache(tmp_path / "both", tmp_path / "part", top_k=4))
    assert rules(load_manifest(tmp_path / "part")) == {"text_rules": 2}
    spaced = pairs_request("spaced", [("How many?", "7")], separator=" ")
    run_build(spaced)
    second = pairs_request("second", separator=" ")
    run_build(second)
    list(merge_caches([second.out, spaced.out], tmp_path / "third"))
    assert rules(load_manifest(tmp_path / "third")) == {"text_rules": 3}
    manifest = load_manifest(second.out)
    dataclasses.replace(manifest, provenance=manifest.provenance | {"text_rules": 2}).save(second.out, "manifest.json")
    with pytest.raises(CacheMismatchError, match="cannot be merged"):
        list(merge_caches([second.out, spaced.out], tmp_path / "fourth"))
    older(plain.out)
    assert load_manifest(plain.out).blocks.control_tokens == "control"
    with pytest.raises(CacheMismatchError, match="cannot be merged"):
        list(merge_caches([plain.out, changed.out], tmp_path / "mixed"))
    other = pairs_request("other", [("Q", "A")])
    run_build(other)
    list(merge_caches([other.out, plain.out], tmp_path / "unchanged"))
    assert "text_rules" not in load_manifest(tmp_path / "unchanged").provenance


def test_one_document_of_one_token_does_not_stop_a_build(build_request, run_build, tmp_path):
    (tmp_path / "words.jsonl").write_text('{"text": "A longer line of words."}\n{"text": "a"}\n')
    request = build_request(tmp_path / "cache", text=tmp_path / "words.jsonl")
    request = dataclasses.replace(request, blocks=BlockConfig(seq_len=32, bos=False))
    plan = plan_build(request)
    assert plan.left_out.document() == {"too_short": {"count": 1, "first": "words.jsonl:1"}}
    run_build(request)
    assert load_manifest(request.out).provenance["left_out"] == plan.left_out.document()
    assert load_corpus(str(tmp_path / "words.jsonl")).kind == "documents"
