"""The cached text as a student with any tokenizer reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.tokenizer import encode_with_ends, load_tokenizer, token_bytes
from kd.student_trainer.batches.alignment import Side, align
from kd.student_trainer.batches.student_text import StudentText


@pytest.fixture(scope="session")
def other_tokenizer(t5_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """`other_tokenizer(**settings)`: the unigram pieces as a causal student might have them, BOS or not, EOS or not."""

    def make(**special: str):
        folder = tmp_path_factory.mktemp("other")
        (folder / "tokenizer.json").write_bytes((t5_dir / "tokenizer.json").read_bytes())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(str(folder))

    return make


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """One id per byte, `<s>` and `</s>`: every text is spelled exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("cache_name", ["kl_cache", "pairs_cache"])
def test_with_the_teacher_s_tokenizer_the_cached_tokens_are_read(request, tokenizer, cache_name: str) -> None:
    reader = CacheReader(request.getfixturevalue(cache_name))
    text = StudentText(reader, tokenizer, window=64)
    for cached in reader.read(range(len(reader))):
        mine = text[cached.index]
        assert np.array_equal(mine.context_ids, cached.context_ids)
        assert np.array_equal(mine.input_ids, cached.input_ids)
        assert np.array_equal(mine.side.byte_end, cached.targets.byte_end)
        assert mine.side.start == 0
    tokens, rows = reader.lengths()
    mine_tokens, mine_rows = text.lengths()
    assert np.array_equal(mine_tokens, tokens)
    assert np.array_equal(mine_rows, rows)
    assert text.truncated == 0


def test_another_tokenizer_reads_bos_prompt_separator_target_and_eos(pairs_reader, byte_tokenizer) -> None:
    text = StudentText(pairs_reader, byte_tokenizer, window=None)
    pieces = token_bytes(byte_tokenizer)
    for cached in pairs_reader.read(range(len(pairs_reader))):
        mine = text[cached.index]
        assert mine.context_ids[0] == byte_tokenizer.bos_token_id
        assert b"".join(pieces[i] for i in mine.context_ids[1:]) == f"{cached.prompt}\n".encode()
        assert b"".join(pieces[i] for i in mine.target_ids[:-1]) == cached.target.encode()
        assert mine.target_ids[-1] == byte_tokenizer.eos_token_id
        assert mine.side.has_eos
        assert mine.side.byte_end[-1] == len(cached.target.encode())
    assert all(text.teacher_has_eos)


@pytest.mark.parametrize("separator", ["", " -> "])
def test_the_separator_can_be_chosen_also_with_the_teacher_s_tokenizer(pairs_reader, tokenizer, separator: str) -> None:
    text = StudentText(pairs_reader, tokenizer, window=None, separator=separator)
    for cached in pairs_reader.read(range(len(pairs_reader))):
        expected = encode_with_ends(tokenizer, token_bytes(tokenizer), cached.prompt + separator + cached.target)[0]
        mine = text[cached.index]
        assert mine.input_ids.tolist() == [tokenizer.bos_token_id, *expected, tokenizer.eos_token_id]
        # " happy" in "un happy" is scored from its own beginning, "unhappy" belongs to the prompt
        assert mine.side.start == 0 or (not separator and mine.side.start > 0)


def test_a_student_without_eos_could_not_learn_to_stop(pairs_reader, kl_reader, other_tokenizer) -> None:
    with pytest.raises(DataError, match="no EOS token"):
        StudentText(pairs_reader, other_tokenizer(), window=64)
    StudentText(kl_reader, other_tokenizer(), window=None)  # documents have none to learn


def test_what_does_not_fit_the_window_is_cut_at_the_prompt_s_beginning_and_the_target_s_end(
    pairs_reader, byte_tokenizer
) -> None:
    whole = StudentText(pairs_reader, byte_tokenizer, window=None)
    for window in (2, 5, 20, 40):
        text = StudentText(pairs_reader, byte_tokenizer, window=window)
        cut = 0
        for index in range(len(pairs_reader)):
            mine, full = text[index], whole[index]
            assert len(mine.input_ids) <= window
            assert len(mine.context_ids) >= 1
            n = len(mine.target_ids)
            assert mine.target_ids.tolist() == full.target_ids[:n].tolist()
            assert mine.side.byte_end.tolist() == full.side.byte_end[:n].tolist()
            assert mine.side.has_eos == (n == len(full.target_ids))
            bos = len(mine.context_ids) > 1  # a single token of context is the one before the target
            assert not bos or mine.context_ids[0] == byte_tokenizer.bos_token_id
            kept = len(mine.context_ids) - bos
            assert mine.context_ids[int(bos) :].tolist() == full.context_ids[len(full.context_ids) - kept :].tolist()
            cut += len(mine.input_ids) < len(full.input_ids)
        assert text.truncated == cut > 0
    assert whole.truncated == 0


def test_a_document_s_blocks_are_read_with_the_text_before_them(kl_reader, byte_tokenizer) -> None:
    text = StudentText(kl_reader, byte_tokenizer, window=None)
    pieces = token_bytes(byte_tokenizer)
    later = 0
    for cached in kl_reader.read(range(len(kl_reader))):
        mine = text[cached.index]
        assert mine.context_ids[0] == byte_tokenizer.bos_token_id
        assert b"".join(pieces[i] for i in mine.context_ids[1:]) == cached.prompt.encode()  # no separator
        assert b"".join(pieces[i] for i in mine.target_ids) == cached.target.encode()
        assert not mine.side.has_eos
        later += bool(cached.prompt)
    assert later > 0
    assert not any(text.teacher_has_eos)


def test_the_eos_of_a_document_is_where_the_cache_has_it(tmp_path, build_request, run_build, byte_tokenizer) -> None:
    request = build_request(tmp_path / "cache")
    object.__setattr__(request, "blocks", BlockConfig(seq_len=32, eos=True))
    run_build(request)
    reader = CacheReader(tmp_path / "cache")
    text = StudentText(reader, byte_tokenizer, window=None)
    ends = [text[i].side.has_eos for i in range(len(reader))]
    assert sum(ends) == 8  # one a document
    assert ends == text.teacher_has_eos
    assert [text[i].target_ids[-1] == byte_tokenizer.eos_token_id for i in range(len(reader))] == ends


def test_without_bos_and_prompt_the_first_token_is_seen_and_not_scored(kl_reader, other_tokenizer) -> None:
    tokenizer = other_tokenizer(eos_token="</s>")
    text = StudentText(kl_reader, tokenizer, window=None)
    first = aligned = total = 0
    for cached in kl_reader.read(range(len(kl_reader))):
        mine = text[cached.index]
        assert len(mine.context_ids) >= 1
        if not cached.prompt:
            ids, ends = encode_with_ends(tokenizer, token_bytes(tokenizer), cached.target)
            assert mine.input_ids.tolist() == ids.tolist()
            assert len(mine.context_ids) == 1
            assert mine.side.start == ends[0]
            first += mine.side.start
        aligned += align(Side(cached.targets.byte_end), mine.side).bytes_aligned
        total += len(cached.target.encode())
    # what is lost are the first tokens, and the teacher's tokens they end in
    assert total - aligned >= first
    assert aligned > 0.9 * total


def test_a_target_that_leaves_no_token_is_an_example_without_rows(
    tmp_path, build_request, run_build, other_tokenizer
) -> None:
    pairs = [{"prompt": "yes", "target": ""}, {"prompt": "", "target": ""}, {"prompt": "", "target": "x"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    try:
        run_build(build_request(tmp_path / "cache", text=tmp_path / "pairs.jsonl", seq_len=64))
    except DataError:
        pytest.skip("empty targets do not get into a cache")
    reader = CacheReader(tmp_path / "cache")
    text = StudentText(reader, other_tokenizer(eos_token="</s>"), window=64)
    sides = [text[i].side for i in range(len(reader))]
    assert [side.text_tokens >= 0 for side in sides] == [True] * len(reader)


def test_a_cut_prompt_keeps_no_first_token_for_a_student_without_bos(pairs_reader, other_tokenizer) -> None:
    """The cache opens prompts with BOS; the student has none, and the first token of a prompt is like any other."""
    tokenizer = other_tokenizer(eos_token="</s>")
    assert pairs_reader.manifest.blocks.bos
    whole = StudentText(pairs_reader, tokenizer, window=None)
    for window in range(3, 40):
        cut = StudentText(pairs_reader, tokenizer, window=window)
        for number in range(len(pairs_reader)):
            context = cut[number].context_ids
            assert np.array_equal(context, whole[number].context_ids[len(whole[number].context_ids) - len(context) :])


def built(folder: Path, pairs: list[tuple[str, str]], build_request, run_build, **blocks) -> CacheReader:
    """A cache of these pairs by the teacher of the tests."""
    folder.mkdir(exist_ok=True)
    rows = "".join(json.dumps({"prompt": p, "target": t}) + "\n" for p, t in pairs)
    (folder / "pairs.jsonl").write_text(rows)
    request = build_request(folder / "cache", text=folder / "pairs.jsonl")
    object.__setattr__(request, "blocks", BlockConfig(seq_len=64, **blocks))
    run_build(request)
    return CacheReader(folder / "cache")


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_a_sentencepiece_student_reads_prompt_and_target_as_one_text(
    tmp_path, shared, build_request, run_build, separator: str
) -> None:
    student = load_tokenizer(str(shared / "weights/stories260K"))
    pairs = [("One day, a girl went to the park.", "She saw a big dog."), ("The un", "happy man"), ("Why? ", "Because")]
    reader = built(tmp_path, pairs, build_request, run_build, separator=separator)
    text = StudentText(reader, student, window=None)
    for cached in reader.read(range(len(reader))):
        mine = text[cached.index]
        whole = student(cached.prompt + separator + cached.target, add_special_tokens=False)["input_ids"]
        assert mine.input_ids.tolist() == [student.bos_token_id, *whole, student.eos_token_id]
        assert mine.side.byte_end[-1] == len(cached.target.encode())
        pairs_aligned = align(Side(cached.targets.byte_end, has_eos=True), mine.side)
        assert pairs_aligned.bytes_aligned == len(cached.target.encode()) - mine.side.start


def test_a_student_reads_a_control_token_in_a_target_as_its_teacher_did(
    tmp_path, tokenizer_dir, build_request, run_build
) -> None:
    """The student has the teacher's control token, and other pieces besides."""
    model = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    model["model"]["merges"] = model["model"]["merges"][:-20]
    dropped = {"".join(m) if isinstance(m, list) else m.replace(" ", "") for m in model["model"]["merges"]}
    keep = {p: i for p, i in model["model"]["vocab"].items() if len(p) == 1 or p in dropped or p.startswith("<|")}
    model["model"]["vocab"] = {p: n for n, p in enumerate(keep)}
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(model))
    (folder / "tokenizer_config.json").write_text((tokenizer_dir / "tokenizer_config.json").read_text())
    student = load_tokenizer(str(folder))
    pairs = [("What ends a text?", "It is <|endoftext|> here")]
    for how, count in (("control", 2), ("auto", 1)):
        reader = built(tmp_path / how, pairs, build_request, run_build, control_tokens=how)
        assert reader[0].targets.gold_ids.tolist().count(0) == count
        mine = StudentText(reader, student, window=None)[0]
        assert mine.target_ids.tolist().count(student.eos_token_id) == count
