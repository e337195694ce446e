"""`RowMaker`: examples of any kind of text become token rows. It can be sent to another process.

    maker = RowMaker("documents", tokenizer, blocks, chat, spec="texts.jsonl")
    rows = list(maker.rows(examples, found))      # `found` receives what was left out and what was noticed

A text may be tokenised in parts, in any order: the rows of an example depend on it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property

from kd.common.files import digest_of
from kd.data.chat_rows import chat_identity, chat_template, rows_that_fit
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.corpus_rows import document_rows, pair_rows, refuse_documents
from kd.data.tokenizing.text_tokens import TEXT_RULES, TextTokens
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.token_rows import TokenRows
from kd.data.tokenizing.too_long import TooLong
from kd.models.tokenizer import Tokenizer, token_bytes, tokenizer_fingerprint


@dataclass
class Found:
    """What tokenising says of the examples besides their rows."""

    left_out: LeftOut = field(default_factory=LeftOut)
    notes: TokenNotes = field(default_factory=TokenNotes)
    too_long: TooLong = field(default_factory=TooLong)

    def include(self, other: Found) -> None:
        """Go on with what was found in the examples that come next."""
        self.left_out.include(other.left_out)
        for name, count in other.notes.counts.items():
            self.notes.add({name: count}, other.notes.first[name])
        self.notes.changed |= other.notes.changed
        self.too_long.add(other.too_long.first, other.too_long.count)


@dataclass(frozen=True)
class RowMaker:
    """Everything that decides which rows an example becomes."""

    kind: str
    """`documents`, `pairs` or `conversations`."""
    tokenizer: Tokenizer
    blocks: BlockConfig
    chat: ChatSettings
    skip_bad: bool
    """As `Corpus.skip_bad`."""
    spec: str
    """What errors call the text."""

    def rows(self, examples: Iterable[Example], findings: Found) -> Iterator[TokenRows]:
        """The rows of the examples in their order. Raises DataError naming the example that cannot be scored."""
        left_out, notes, too_long = findings.left_out, findings.notes, findings.too_long
        if self.kind == CONVERSATIONS:
            template, pieces = chat_template(self.tokenizer, self.chat), token_bytes(self.tokenizer)
            yield from rows_that_fit(
                examples,
                template,
                pieces,
                self.chat,
                self.blocks,
                left_out,
                notes,
                too_long,
                skip_bad=self.skip_bad,
            )
            return
        text = self._text
        if self.kind == "documents":
            refuse_documents(self.spec, self.blocks)
            yield from document_rows(examples, text, self.blocks, left_out, notes)
        else:
            yield from pair_rows(examples, text, self.blocks, left_out, notes, too_long)

    @cached_property
    def _text(self) -> TextTokens:
        """Worked out once for all parts: the bytes of all pieces of a large vocabulary take a tenth of a second or more."""
        return TextTokens(self.tokenizer, self.blocks.control_tokens)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_text"}

    def digest(self) -> str:
        """A digest of everything that decides which rows an example becomes."""
        chat = chat_identity(self.tokenizer, self.chat) if self.kind == CONVERSATIONS else {}
        return digest_of(
            {
                "kind": self.kind,
                "tokenizer": tokenizer_fingerprint(self.tokenizer),
                "blocks": self.blocks.identity(),
                "control_tokens": self.blocks.control_tokens,
                "rules": TEXT_RULES,
                "chat": chat,
                "template_kwargs": {name: str(value) for name, value in asdict(self.chat).items()},
                "skip_bad": self.skip_bad,
            }
        )
