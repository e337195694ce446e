"""A prompt and its target are one text, control tokens are read where they are meant, and ids lose nothing of the text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.document_blocks import document_blocks
from kd.data.tokenizing.pair_rows import first_rules, tokenize_pair, tokenize_prompt
from kd.data.tokenizing.text_tokens import TextTokens
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.tokenizer import load_tokenizer, vocabulary_size

REAL = ["tokenizers/gpt2", "tokenizers/smollm2", "tokenizers/gpt-neox-20b", "weights/stories260K", "tokenizers/t5"]
LOSSLESS = REAL[:4]
SEPARATORS = ["\n", " ", "", "\n\n"]
PAIRS = [
    ("One day, a girl named Lily went to the park.", "She saw a big dog."),
    ("The un", "happy man"),
    ("She said ", "Because"),
    ("x\n", "\nfoo"),
    ("Wo ist 日本", "語 é😀, bitte?"),
    ("tabs\t", "\tand  spaces "),
    ("", "She"),
]
RENDERED = "<|im_start|>user\nTwo plus two?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def words(shared: Path):
    """`words(name)`: a real tokenizer as `TextTokens`, made once."""
    made: dict[str, TextTokens] = {}

    def load(name: str) -> TextTokens:
        if name not in made:
            made[name] = TextTokens(load_tokenizer(str(shared / name)))
        return made[name]

    return load


def pair(text: TextTokens, prompt: str, target: str, notes: TokenNotes | None = None, **config) -> TokenRows:
    return tokenize_pair(Example("p", target, prompt=prompt), text, BlockConfig(**config), notes)


def names(text: TextTokens, ids) -> list[str]:
    return text.tokenizer.convert_ids_to_tokens(np.asarray(ids).tolist())


def slow_pair(tokenizer, prompt: str, separator: str, target: str) -> tuple[list[int], list[int]]:
    """A slow twin of the split: tokens are added to the context as long as they decode to nothing of the target.

    A last one that is white space goes to the target where no token ends at the border before another word.
    """
    text = prompt + separator + target
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, border = encoding["input_ids"], len(prompt + separator)
    context: list[int] = []
    for token, (_, end) in zip(ids, encoding["offset_mapping"], strict=True):
        if end > border:
            break
        context.append(token)
    start, end = encoding["offset_mapping"][len(context) - 1]
    other = tokenizer(prompt + separator + "the", add_special_tokens=False, return_offsets_mapping=True)
    if end == border and text[start:end].isspace() and border not in [end for _, end in other["offset_mapping"]]:
        context.pop()
    return context, ids[len(context) :]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("separator", SEPARATORS)
def test_the_ids_of_a_pair_are_those_of_the_joint_text(words, name: str, separator: str):
    text = words(name)
    for prompt, target in PAIRS[:-1]:
        row = pair(text, prompt, target, separator=separator)
        whole = text.tokenizer(prompt + separator + target, add_special_tokens=False)["input_ids"]
        bos, eos = [text.bos] if text.bos is not None else [], [text.eos]
        assert row.input_ids.tolist() == [*bos, *whole, *eos]


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("separator", SEPARATORS)
def test_context_and_target_decode_to_the_joint_text(words, name: str, separator: str):
    text = words(name)
    for prompt, target in PAIRS:
        row = pair(text, prompt, target, separator=separator)
        decoded = text.tokenizer.decode(row.input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert decoded == prompt + (separator if prompt else "") + target


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("separator", SEPARATORS)
def test_the_split_is_where_a_slow_twin_has_it(words, name: str, separator: str):
    text = words(name)
    for prompt, target in [PAIRS[0], PAIRS[2], PAIRS[3]]:  # one byte a character, and nothing of a word in both
        row = pair(text, prompt, target, separator=separator)
        context, rest = slow_pair(text.tokenizer, prompt, separator, target)
        assert row.context_ids.tolist() == [text.bos, *context]
        assert row.target_ids.tolist() == [*rest, text.eos]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("separator", SEPARATORS)
def test_byte_ends_cover_the_target(words, name: str, separator: str):
    text = words(name)
    for prompt, target in PAIRS[:-1]:
        row = pair(text, prompt, target, separator=separator)
        assert len(row.byte_end) == len(row.target_ids)
        assert (np.diff(row.byte_end) >= 0).all()
        assert row.byte_end[0] >= 0
        assert row.byte_end[-1] == len(row.example.target.encode())
        if name in LOSSLESS:
            data = row.example.target.encode()
            starts = [0, *row.byte_end[:-2].tolist()]
            spelled = [data[a:b] for a, b in zip(starts, row.byte_end[:-1].tolist(), strict=True)]
            pieces = [text.pieces[i] for i in row.target_ids[:-1]]
            assert spelled[1:] == pieces[1:]
            assert pieces[0].endswith(spelled[0])  # it may begin with white space of the prompt


@settings(max_examples=80)
@given(
    prompt=st.text(min_size=1, max_size=20),
    target=st.text(min_size=1, max_size=20),
    separator=st.sampled_from(SEPARATORS),
)
def test_any_pair_keeps_its_text_and_its_ids(tokenizer, prompt: str, target: str, separator: str):
    text = TextTokens(tokenizer)
    row = pair(text, prompt, target, separator=separator)
    ids = tokenizer(prompt + separator + target, add_special_tokens=False)["input_ids"]
    assert row.input_ids.tolist() == [text.bos, *ids, text.eos]
    assert prompt + separator + target == row.example.prompt + separator + row.example.target
    assert b"".join(text.pieces[i] for i in row.input_ids[1:-1]) == (prompt + separator + target).encode()


def test_a_sentencepiece_target_has_no_word_mark_that_the_text_has_not(words):
    text = words("weights/stories260K")
    prompt, target = PAIRS[0]
    assert names(text, pair(text, prompt, target).target_ids)[:3] == ["S", "he", "▁saw"]
    apart = first_rules(Example("p", target, prompt=prompt), text, BlockConfig())
    assert names(text, apart[1])[:2] == ["▁She", "▁saw"]


@pytest.mark.parametrize(("name", "first"), [("tokenizers/gpt2", "ĠBecause"), ("tokenizers/t5", "▁Because")])
def test_a_word_after_a_space_is_one_token_and_is_scored(words, name: str, first: str):
    text, notes = words(name), TokenNotes()
    row = pair(text, "Why?", "Because", notes, separator=" ", bos=True)
    assert names(text, row.target_ids)[0] == first
    assert row.byte_end[0] == len("Because")
    assert notes.document() == {"border_scored": {"count": 1, "first": "p"}}


def test_a_token_with_letters_of_the_prompt_is_context_where_the_text_can_be_cut_after_it(words):
    text, notes = words("tokenizers/gpt2"), TokenNotes()
    row = pair(text, "The un", "happy man", notes, separator="")
    assert names(text, row.context_ids) == ["<|endoftext|>", "The", "Ġunhappy"]
    assert (row.example.prompt, row.example.target) == ("The unhappy", " man")
    assert notes.document() == {"border_in_context": {"count": 1, "first": "p"}}
    notes = TokenNotes()
    row = pair(text, "The un", "happy", notes, separator="")  # nothing would be left to score
    assert names(text, row.target_ids) == ["Ġunhappy", "<|endoftext|>"]
    assert notes.document() == {"border_scored": {"count": 1, "first": "p"}}


def test_without_bos_one_token_cannot_be_all_of_prompt_and_target(words):
    text, notes = words("tokenizers/gpt2"), TokenNotes()
    row = pair(text, "hel", "lo", notes, separator="", bos=False)
    assert names(text, row.context_ids) == ["hel"]
    assert names(text, row.target_ids) == ["lo", "<|endoftext|>"]
    assert notes.document() == {"border_cut": {"count": 1, "first": "p"}}


def test_the_first_target_token_of_a_sentencepiece_model_costs_what_the_text_costs(words, shared: Path):
    """100 pairs of paragraphs: 10.1 nats for a token with a word mark, 1.3 for the token that the text has."""
    from transformers import AutoModelForCausalLM

    text = words("weights/stories260K")
    model = AutoModelForCausalLM.from_pretrained(shared / "weights/stories260K").eval()
    stories = (shared / "tinystories" / "tinystories.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    paragraphs = [story.strip().split("\n") for story in stories]
    examples = [Example("p", p[1][:80], prompt=p[0][-200:]) for p in paragraphs if len(p) > 1 and p[1]][:100]
    assert len(examples) == 100
    rows = [tokenize_pair(e, text, BlockConfig()) for e in examples]
    joint = [(r.context_ids, r.target_ids) for r in rows]
    apart = [first_rules(e, text, BlockConfig()) for e in examples]
    assert 0.9 < first_token_nats(model, joint) < 1.7
    assert 9.0 < first_token_nats(model, apart) < 11.0


def first_token_nats(model, pairs) -> float:
    """Mean NLL of the first target token."""
    found = []
    for context, target in pairs:
        with torch.inference_mode():
            logits = model(torch.from_numpy(context.astype(np.int64))[None]).logits[0, -1]
        found.append(-float(logits.log_softmax(0)[int(target[0])]))
    return float(np.mean(found))


@pytest.mark.parametrize("prompt", ["The un", "Tell me </s>"])
@pytest.mark.parametrize("separator", ["", " "])
def test_what_a_normaliser_drops_at_the_border_moves_no_token_of_the_prompt(words, prompt: str, separator: str):
    text = words("tokenizers/t5")
    row = pair(text, prompt, "\u200bhappy", separator=separator)
    assert names(text, row.context_ids)[-1] == ("</s>" if "</s>" in prompt else "▁un")
    assert text.eos not in row.target_ids[:-1].tolist()
    assert row.byte_end[-1] == len(row.example.target.encode())


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory) -> TextTokens:
    """A WordPiece tokenizer, which drops white space and marks what goes on inside a word."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["the fox is unhappy because she saw a big dog go home"] * 4, trainer)
    return TextTokens(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
        )
    )


@pytest.mark.parametrize("separator", SEPARATORS)
def test_word_pieces_are_split_between_words(word_pieces: TextTokens, separator: str):
    for prompt, target in [("The fox saw", "she is home"), ("the un", "happy dog"), ("why?", "because [SEP] she saw")]:
        row = pair(word_pieces, prompt, target, separator=separator)
        control = "[SEP]" not in target
        whole, _ = word_pieces.encode(prompt + separator + target, control=control)
        assert row.input_ids.tolist() == [word_pieces.bos, *whole, word_pieces.eos]
        assert row.byte_end[-1] == len(row.example.target.encode())
        assert (np.diff(row.byte_end) >= 0).all()
        first = row.example.target.encode()[: row.byte_end[0]].decode().strip().lower()
        assert names(word_pieces, row.target_ids[:1])[0].removeprefix("##") == first


# control tokens


def test_a_prompt_of_a_chat_template_gets_no_second_bos_and_no_separator(words):
    text, notes = words("tokenizers/smollm2"), TokenNotes()
    row = pair(text, RENDERED, "Four.", notes)
    assert names(text, row.context_ids)[:2] == ["<|im_start|>", "user"]
    assert names(text, row.context_ids)[-2:] == ["istant", "Ċ"]
    assert names(text, row.target_ids) == ["Four", ".", "<|im_end|>"]
    assert {n: e["count"] for n, e in notes.document().items()} == {
        "control_tokens_kept": 3,
        "bos_in_text": 1,
        "separator_in_prompt": 1,
    }
    assert notes.changed


@pytest.mark.parametrize("target", ["Four.<|im_end|>", "Four.<|im_end|>\n", "Four.<|im_end|><|im_end|>"])
def test_a_target_that_ends_with_the_end_token_has_one(words, target: str):
    text, notes = words("tokenizers/smollm2"), TokenNotes()
    row = pair(text, "Two plus two?", target, notes)
    assert names(text, row.target_ids) == ["Four", ".", "<|im_end|>"]
    assert row.example.target == "Four."
    assert notes.document() == {"eos_in_text": {"count": 1, "first": "p"}}


@pytest.mark.parametrize("prompt", ["Which token?", RENDERED])
@pytest.mark.parametrize("encoder", [False, True])
def test_a_control_token_in_the_middle_of_a_target_is_text(words, prompt: str, encoder: bool):
    text, notes = words("tokenizers/smollm2"), TokenNotes()
    row = pair(text, prompt, "Use <|im_end|> to end.", notes, encoder=encoder)
    assert row.target_ids.tolist().count(text.eos) == 1
    spelled = text.tokenizer.decode(row.target_ids[:-1])
    assert spelled == "Use <|im_end|> to end."
    assert notes.document()["control_tokens_as_text"] == {"count": 1, "first": "p"}
    assert names(text, row.context_ids).count("<|im_start|>") == (0 if encoder else 1) + (prompt == RENDERED) * (
        2 if encoder else 1
    )


def test_the_setting_reads_all_control_tokens_as_such_or_none(shared: Path):
    tokenizer = load_tokenizer(str(shared / "tokenizers/smollm2"))
    target = "Use <|im_end|> to end."
    kept = pair(TextTokens(tokenizer, "control"), RENDERED, target, control_tokens="control")
    assert kept.target_ids.tolist().count(tokenizer.eos_token_id) == 2
    none = pair(TextTokens(tokenizer, "text"), RENDERED, "Four.<|im_end|>", control_tokens="text")
    special = set(tokenizer.all_special_ids)
    assert [i in special for i in none.input_ids] == [True] + [False] * (len(none.input_ids) - 2) + [True]
    assert tokenizer.decode(none.input_ids[1:-1]) == RENDERED + "\n" + "Four.<|im_end|>"


def test_after_a_prompt_with_control_tokens_a_sentencepiece_target_is_still_one_text_with_it(words):
    """The target's own control token is text, and nothing else changes."""
    text = words("weights/stories260K")
    mixed = pair(text, "<s>Tell me", "a </s> b", bos=True)
    plain = pair(text, "<s>Tell me", "a <x> b", bos=True)
    assert mixed.context_ids.tolist() == plain.context_ids.tolist()
    assert names(text, mixed.target_ids) == ["a", "▁", "<", "/", "s", ">", "▁b", "</s>"]
    straight = pair(text, "<s>", "a </s> b", separator="")
    assert names(text, straight.target_ids)[0] == "a"  # no word mark right after a control token


def test_t5_s_own_pieces_do_not_spell_a_control_token(words):
    text = words("tokenizers/t5")
    ids, _ = text.encode("say </s> now", control=False)
    assert text.eos not in ids.tolist()


def test_a_document_begins_with_one_bos_and_ends_with_one_end_token(words):
    text = words("weights/stories260K")
    for document in ("<s>Once there was a fox.</s>", "Once there was a fox.", "<s>Once there was a fox."):
        notes = TokenNotes()
        (block,) = document_blocks(Example("d", document), text, BlockConfig(eos=True), notes)
        assert names(text, block.input_ids).count("<s>") == names(text, block.input_ids).count("</s>") == 1
        assert notes.changed == document.startswith("<s>")


def test_control_tokens_inside_a_document_are_text_unless_a_template_wrote_it(words):
    text = words("tokenizers/smollm2")
    web, chat = "Models end with <|im_end|> and go on.", RENDERED + "Four.<|im_end|>\n"
    notes = TokenNotes()
    (block,) = document_blocks(Example("d", web), text, BlockConfig(), notes)
    assert text.eos not in block.target_ids.tolist()
    assert "".join(b.example.target for b in [block]) == web
    assert notes.document() == {"control_tokens_as_text": {"count": 1, "first": "d"}}
    notes = TokenNotes()
    (block,) = document_blocks(Example("d", chat), text, BlockConfig(), notes)
    assert block.input_ids.tolist().count(text.eos) == 2
    assert notes.document()["control_tokens_kept"]["count"] == 4


def test_a_document_whose_ids_are_those_of_the_first_rules_changes_nothing(words):
    text, notes = words("tokenizers/gpt2"), TokenNotes()
    list(document_blocks(Example("d", "A plain text.\n\nOf two paragraphs."), text, BlockConfig(), notes))
    assert not notes.changed
    pair(text, "Q", "A", notes)
    assert not notes.changed  # byte-level BPE does not merge a line break with a word
    pair(text, "Q", "A", notes, separator=" ")
    assert notes.changed


# prompts that wait for an answer


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("separator", SEPARATORS)
def test_the_context_before_an_answer_is_the_one_before_a_known_target(words, name: str, separator: str):
    text = words(name)
    config = BlockConfig(separator=separator)
    for prompt in ("One day, a girl went to the park.", "Why? ", "Q:\n"):
        known = pair(text, prompt, "because it is so", separator=separator)
        context, lead = tokenize_prompt(Example("p", "", prompt=prompt), text, config)
        assert context.tolist() == known.context_ids.tolist()
        assert (prompt + separator).endswith(lead)
        assert not lead.strip()


def test_a_prompt_inside_a_word_is_read_whole(words):
    text = words("tokenizers/gpt2")
    context, lead = tokenize_prompt(Example("p", "", prompt="The un"), text, BlockConfig(separator=""))
    assert (names(text, context), lead) == (["<|endoftext|>", "The", "Ġun"], "")


def test_counts_are_of_the_texts(words):
    text, counts = words("weights/stories260K"), Counter[str]()
    text.document("<b>a <s>b</s> c</b>", counts)
    text.prompt("a <s>b</s> c", counts)
    assert counts == {"control_tokens_as_text": 2, "control_tokens_kept": 2}
    assert vocabulary_size(text.tokenizer) == 512
