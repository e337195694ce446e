"""Texts as token ids: which control tokens a text may hold, and a prompt and its target in one piece.

A control token (`<s>`, `<|im_end|>`, `[SEP]`) can be spelled in a text. It is a control token where somebody wrote it as one:
in a prompt, or in a document that begins or ends with one, as chat templates write them. Elsewhere, in a target or in a web
page with `<s>`, its characters are text (`auto`). `control` reads all of them as control tokens, `text` none. Counts say how
many there were.

A prompt and its target are one text: `prompt + separator + target` is tokenised once, and the ids are split at the byte where
the target begins (the *border*). Tokenised apart, a target of a sentencepiece tokenizer began with a word mark that the text
does not have, and ` Because` after the separator ` ` became ` ` and `Because`.

White space of the prompt that is a token of its own only because of the target (` ` before `7`, where ` the` is one token) is
scored with the target. Whoever answers the prompt is asked without that token, and has to write it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from kd.models.tokenizer import (
    WINDOW,
    Stretch,
    Tokenizer,
    control_token_pattern,
    encode_many,
    encode_stretches,
    encode_with_ends,
    stretch_of,
    token_bytes,
)

TEXT_RULES = 3
"""Number of these rules. The identity of a cache has that of the earliest rules that give its rows (`TokenNotes.rules`)."""
PROMPT_RULES = 2
"""Number of the rules for the ids of a prompt that is still to be answered."""
FREQUENT = "the"
"""A word that most tokenizers write with the space before it as one token."""
CONTROL_TOKENS = ("auto", "control", "text")
"""Ways to read a control token that is spelled in a text."""


@dataclass(frozen=True)
class JointText:
    """A prompt and its target, tokenised as one text."""

    data: bytes
    """The whole text in UTF-8."""
    ids: np.ndarray
    """[n] int32, without BOS and EOS that are not in the text."""
    ends: np.ndarray
    """[n] int64: the end of each token in `data`."""
    border: int
    """Byte of `data` where the target begins."""
    pieces: list[bytes]
    """The bytes of every id."""
    space_scored: bool = False
    """Whether the last token before the border is white space that is scored with the target."""

    @property
    def before(self) -> int:
        """Number of tokens that end at or before the border, without white space that is scored."""
        return self._ended - self.space_scored

    @property
    def _ended(self) -> int:
        return int(np.searchsorted(self.ends, self.border, side="right")) if self.border else 0

    @property
    def ends_with_space(self) -> bool:
        """Whether the last token before the border is white space alone and ends there."""
        last = self._ended - 1
        return last >= 0 and int(self.ends[last]) == self.border and self.pieces[self.ids[last]].isspace()

    @property
    def crossing(self) -> str:
        """What the token across the border has of the text before it; empty where a token ends at the border."""
        if self.before == len(self.ids):
            return ""
        start = int(self.ends[self.before - 1]) if self.before else 0
        return self.data[start : self.border].decode("utf-8", "replace")

    def split(self, counts: Counter[str], *, movable: bool) -> tuple[int, int]:
        """Number of tokens of the context, and number of the target's bytes that lie in it.

        A token across the border is scored where it has only white space of the text before: ` Because` is how the text goes
        on. So is one that has more of it and cannot go to the context. Else it is context, and its end is where the scored
        part of the target begins: a character must end there, and something of the target must be left.

        movable   whether bytes of the target may go to the context
        """
        before, crossing = self.before, self.crossing
        if not crossing:
            return before, 0
        end = int(self.ends[before])
        rest = self.data[end:]
        # the token may hold of the target only what a normaliser dropped
        ending = self.pieces[self.ids[before]].strip()
        if ending and crossing.strip().encode("utf-8").endswith(ending):
            return before + 1, 0
        if movable and not crossing.isspace() and rest and rest[0] & 0xC0 != 0x80:
            counts["border_in_context"] += 1
            return before + 1, end - self.border
        counts["space_scored" if self.space_scored else "border_scored"] += 1
        return before, 0


class TextTokens:
    """A tokenizer, the bytes of its tokens and the spelling of its control tokens, worked out once."""

    def __init__(self, tokenizer: Tokenizer, control_tokens: str = "auto") -> None:
        """`control_tokens` is one of `CONTROL_TOKENS`."""
        self.tokenizer, self.pieces, self.policy = tokenizer, token_bytes(tokenizer), control_tokens
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.bos_alone = np.array([] if self.bos is None else [self.bos], dtype=np.int32)
        """The token that opens texts, as ids."""
        self._ids = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._pattern = control_token_pattern(tokenizer)
        self._lengths = np.array([len(piece) for piece in self.pieces], dtype=np.int64)
        self._ahead: dict[tuple[str, bool], tuple[np.ndarray, np.ndarray]] = {}
        self._spaces: dict[str, bool] = {}
        """End of a prompt -> whether its white space is a token of its own before a frequent word."""

    def spelled(self, text: str) -> list[str]:
        """The control tokens that are spelled in a text, in their order."""
        return self._pattern.findall(text) if self._pattern is not None else []

    def framed(self, text: str) -> bool:
        """Whether a text, white space aside, begins or ends with a control token."""
        text = text.strip()
        spelled = self.spelled(text)
        return bool(spelled) and (text.startswith(spelled[0]) or text.endswith(spelled[-1]))

    def ends_with_eos(self, text: str) -> bool:
        """Whether a text, white space aside, ends with the end token, and control tokens in texts are read as such."""
        return self.eos is not None and self.policy != "text" and text.rstrip().endswith(self.tokenizer.eos_token)

    def without_eos(self, text: str) -> str:
        """A text that ends with the end token, without it and what follows it."""
        while self.ends_with_eos(text):
            text = text.rstrip().removesuffix(self.tokenizer.eos_token)
        return text

    def begins_with_bos(self, text: str) -> bool:
        """Whether a text begins with the token that opens texts, and control tokens in texts are read as such."""
        return self.bos is not None and self.policy != "text" and text.startswith(self.tokenizer.bos_token)

    def encode_ahead(self, texts: Iterable[str]) -> None:
        """Tokenise texts in one call, for `encode` to find them; those of the call before are forgotten.

        Texts that are long or spell a control token are left to `encode`.
        """
        short = [t for t in dict.fromkeys(texts) if 0 < len(t) <= WINDOW and not self.spelled(t)]
        encoded = encode_many(self.tokenizer, self.pieces, self._lengths, short)
        self._ahead = {(text, True): one for text, one in zip(short, encoded, strict=True)}

    def ahead(self, text: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids and ends of a text that `encode_ahead` has tokenised; None where it has not."""
        return self._ahead.get((text, True))

    def encode(self, text: str, *, control: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """`encode_with_ends`, also where the tokenizer's own vocabulary spells a control token (T5's `</s>`)."""
        known = self._ahead.get((text, control))
        if known is not None:
            return known
        ids, ends = encode_with_ends(self.tokenizer, self.pieces, text, control=control)
        return self._with_unknown(ids, control), ends

    def _with_unknown(self, ids: np.ndarray, control: bool) -> np.ndarray:
        """The ids, without control tokens where there are to be none."""
        if control or self.tokenizer.unk_token_id is None:
            return ids
        return np.where(np.isin(ids, self._ids), np.int32(self.tokenizer.unk_token_id), ids)

    def document(self, text: str, counts: Counter[str]) -> list[Stretch]:
        """The tokens of a document; `counts` receives its `control_tokens_kept` or `control_tokens_as_text`."""
        known = self.ahead(text)
        if known is not None:
            return [stretch_of(*known)]
        count, control = len(self.spelled(text)), True
        if count:
            control = self.policy == "control" or (self.policy == "auto" and self.framed(text))
            counts["control_tokens_kept" if control else "control_tokens_as_text"] += count
        stretches = encode_stretches(self.tokenizer, self.pieces, text, control=control)
        return [Stretch(self._with_unknown(s.ids, control), s.sizes) for s in stretches]

    def prompt(self, text: str, counts: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `document`, for a text that a model reads and is not scored on."""
        return self.encode(text, control=self._read(text, self.policy != "text", counts))

    def target(self, text: str, counts: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `document`, for a text that a model is scored on."""
        return self.encode(text, control=self._read(text, self.policy == "control", counts))

    def joint(self, prompt: str, target: str, counts: Counter[str], *, control: bool | None = None) -> JointText:
        """A prompt, with its separator, and its target as one text; `control` decides for the target in place of the policy."""
        in_prompt = self._read(prompt, self.policy != "text", counts)
        in_target = self._read(target, self.policy == "control" if control is None else control, counts)
        text = prompt + target
        if in_prompt and not in_target and self.spelled(prompt):
            ids, ends = self._mixed(prompt, target)
        else:
            ids, ends = self.encode(text, control=in_prompt and in_target)
        joint = JointText(text.encode("utf-8"), ids, ends, len(prompt.encode("utf-8")), self.pieces)
        scored = bool(target) and joint.ends_with_space and not self._space_stands_alone(prompt)
        return replace(joint, space_scored=True) if scored else joint

    def _space_stands_alone(self, prompt: str) -> bool:
        """Whether the white space at the end of a prompt ends a token before a frequent word too.

        One character before the white space is looked at, which is as far as tokenizers look.
        """
        tail = prompt[max(0, len(prompt.rstrip()) - 1) :]
        if tail not in self._spaces:
            _, ends = self.encode(tail + FREQUENT)
            self._spaces[tail] = len(tail.encode("utf-8")) in ends.tolist()
        return self._spaces[tail]

    def separator(self, prompt: str, separator: str) -> str:
        """What stands between a prompt and its target.

        Nothing after an empty prompt, and nothing after one that a chat template wrote (it holds control tokens), if it ends
        with white space or with a control token: the template has put there what belongs there.
        """
        if not prompt:
            return ""
        spelled = self.spelled(prompt) if self.policy != "text" else []
        written = bool(spelled) and (prompt[-1].isspace() or prompt.endswith(spelled[-1]))
        return "" if written else separator

    def _read(self, text: str, control: bool, counts: Counter[str]) -> bool:
        """Whether to read the text's control tokens as such, which is so where it has none; those it has are counted."""
        count = len(self.spelled(text))
        if count:
            counts["control_tokens_kept" if control else "control_tokens_as_text"] += count
        return control or not count

    def _mixed(self, prompt: str, target: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and ends where the prompt's control tokens are read as such and the target's are text.

        What follows the prompt's last control token is tokenised with and without control tokens. The first reading is right
        up to the target's own, the second is right but for a word mark at its beginning: they are joined at the first place
        where both go on with the same token.
        """
        last = self.spelled(prompt)[-1]
        head = prompt[: prompt.rindex(last) + len(last)]
        start = len(head.encode("utf-8"))
        ids, ends = self.encode(prompt + target)
        tail, tail_ends = self.encode((prompt + target)[len(head) :], control=False)
        tail_ends = tail_ends + start
        assert self._pattern is not None
        match = self._pattern.search(target)
        stop = len((prompt + target[: match.start() if match else None]).encode("utf-8"))
        for border in [start, *np.intersect1d(ends[(start < ends) & (ends < stop)], tail_ends).tolist()]:
            a, b = (int(np.searchsorted(e, border, side="right")) for e in (ends, tail_ends))
            if a < len(ids) and b < len(tail) and (ids[a], ends[a]) == (tail[b], tail_ends[b]):
                return np.concatenate([ids[:a], tail[b:]]), np.concatenate([ends[:a], tail_ends[b:]])
        first = int(np.searchsorted(ends, start, side="right"))
        return np.concatenate([ids[:first], tail]), np.concatenate([ends[:first], tail_ends])
