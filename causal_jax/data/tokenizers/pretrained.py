"""The tokenizer of a pretrained model: tokenizer.json, or the vocabulary inside a GGUF file.

Both end as one object of the package `tokenizers`, which does the encoding; decoding goes by the
table of bytes that every tokenizer here has. Text that spells a mark ("<|im_end|>") is only text:
marks are read in `chat` alone, where the model's own template has written them.

A vocabulary of the SentencePiece kind puts a space in front of every text; `decode` takes it off
again. Lossless they are only as far as they were made so: what a normaliser changes (Unicode forms)
stays changed, and a byte that the vocabulary lacks (SmolLM2: rare lead bytes) is left out.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np

from causal_jax.data.tokenizers._base import (
    DecodeStream,
    Tokenizer,
    TokenizerSpec,
    digest,
    tokenizers,
    utf8,
)
from causal_jax.data.tokenizers.bpe import byte_letters, tokenizers_library
from causal_jax.errors import InputError
from causal_jax.shapes import Int


@dataclass(frozen=True)
class Marks:
    """What stands beside the vocabulary.

    Attributes:
        bos: id in front of every text, or None where the model was trained without.
        eos: id that ends a document, or None.
        stops: further ids that end an answer.
        chat_template: Jinja text that lays out a conversation, or None.
    """

    bos: int | None = None
    eos: int | None = None
    stops: tuple[int, ...] = ()
    chat_template: str | None = None


class PretrainedTokenizer(Tokenizer):
    """A tokenizer that came with a model.

    Args:
        model: a `tokenizers.Tokenizer`; truncation and padding are switched off.
        marks: bos, eos, stops, chat template.
        spec: where it came from.
    """

    def __init__(self, model: Any, marks: Marks, spec: "Pretrained"):
        model.no_truncation()
        model.no_padding()
        self._model, self._spec, self.marks = model, spec, marks
        self._layout = json.loads(model.to_str())
        self._leading_space = _adds_space(self._layout.get("decoder"))
        self.pieces = _pieces(model, self._layout)
        self.bos, self.eos = marks.bos, marks.eos
        for mark in (marks.bos, marks.eos, *marks.stops):
            if mark is not None and not 0 <= mark < len(self.pieces):
                raise InputError(
                    f"tokenizer of {spec.source}: the id {mark} of a mark is not among its ids 0 to"
                    f" {len(self.pieces) - 1}"
                )

    @property
    def chat_template(self) -> str | None:
        """Jinja text that lays out a conversation, or None."""
        return self.marks.chat_template

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((*super().stop_tokens, *self.marks.stops)))

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        utf8(text)
        coded = self._encoder(text=True).encode(text, add_special_tokens=False)
        return np.array(coded.ids, np.int32)

    def encode_documents(self, texts: Sequence[str]) -> list[Int[np.ndarray, "_"]]:
        for t in texts:
            utf8(t)
        coded = self._encoder(text=True).encode_batch(list(texts), add_special_tokens=False)
        return [np.array(c.ids, np.int32) for c in coded]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        text = super().decode(ids)
        return text[1:] if self._leading_space and text.startswith(" ") else text

    def decode_stream(self) -> DecodeStream:
        return _WithoutSpace(self.pieces) if self._leading_space else DecodeStream(self.pieces)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, reply: bool = True
    ) -> Int[np.ndarray, "T"]:
        """Ids of a conversation as the model's template lays it out, marks included.

        Args:
            messages: {"role": "user" | "assistant" | "system", "content": text} each.
            reply: end where the assistant is to go on.

        Raises:
            InputError: no template, or one that refuses these messages.
        """
        text = self._render(messages, reply)
        coded = self._encoder(text=False).encode(text, add_special_tokens=False)
        return np.array(coded.ids, np.int32)

    def fingerprint(self) -> str:
        marks = json.dumps(dataclasses.asdict(self.marks), sort_keys=True)
        return digest("pretrained", json.dumps(self._layout, sort_keys=True), marks)

    def spec(self) -> TokenizerSpec:
        return self._spec

    def export(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `transformers` reads them."""
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name, mark in (("bos_token", self.bos), ("eos_token", self.eos)):
            settings[name] = None if mark is None else self._model.id_to_token(mark)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        text = json.dumps(settings, indent=2)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        self._model.save(str(folder / "tokenizer.json"))

    def _payload(self) -> dict[str, Any]:
        return {"model": self._layout, "marks": dataclasses.asdict(self.marks)}

    def _encoder(self, *, text: bool) -> Any:
        self._model.encode_special_tokens = text  # True: marks in the text are only text
        return self._model

    def _render(self, messages: Sequence[Mapping[str, str]], reply: bool) -> str:
        if self.chat_template is None:
            raise InputError(f"{self._spec.source}: this model has no chat template")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise InputError("a chat template needs the package jinja2") from None

        def refuse(message: str):
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        words = {
            f"{name}_token": "" if mark is None else self._model.id_to_token(mark)
            for name, mark in (("bos", self.bos), ("eos", self.eos))
        }
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=list(messages), add_generation_prompt=reply, **words)
        except TemplateError as e:
            raise InputError(f"{self._spec.source}: the chat template refuses: {e}") from None


class _WithoutSpace(DecodeStream):
    """The stream of a tokenizer that puts a space in front of every text."""

    _begun = False

    def push(self, token: SupportsInt) -> str:
        text = super().push(token)
        if self._begun or not text:
            return text
        self._begun = True
        return text.removeprefix(" ")


def _pieces(model: Any, layout: dict[str, Any]) -> tuple[bytes, ...]:
    """The bytes of each id; special ids and holes in the numbering stand for none."""
    added = model.get_added_tokens_decoder()
    words = {i: w for w, i in model.get_vocab(with_added_tokens=True).items()}
    by_letter = "ByteLevel" in _kinds(layout.get("decoder"))
    letters = byte_letters()
    out = []
    for i in range(max(words, default=-1) + 1):
        word = words.get(i, "")
        if i in added:
            out.append(b"" if added[i].special else word.encode())
        elif by_letter and all(c in letters for c in word):
            out.append(bytes(letters[c] for c in word))
        elif len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            out.append(bytes([int(word[3:5], 16)]))
        else:
            out.append(word.replace("▁", " ").encode())
    return tuple(out)


def _kinds(part: dict[str, Any] | None) -> set[str]:
    """Types in a (nested) decoder of tokenizer.json."""
    if not part:
        return set()
    return {part["type"]}.union(*(_kinds(p) for p in part.get("decoders", ())))


def _adds_space(decoder: dict[str, Any] | None) -> bool:
    """Whether decoding takes a space off the front."""
    if not decoder:
        return False
    if decoder["type"] == "Sequence":
        return any(_adds_space(d) for d in decoder["decoders"])
    if decoder["type"] == "Metaspace":
        return decoder.get("prepend_scheme", "always") != "never"
    return decoder["type"] == "Strip" and decoder.get("start", 0) > 0


@tokenizers.register("pretrained")
@dataclass(frozen=True)
class Pretrained(TokenizerSpec):
    """The tokenizer of a pretrained model, as it is.

    Args:
        source: as `causal_jax.models.pretrained.load` takes it: a folder with tokenizer.json, a
            GGUF file, a hub repository, "smollm2".
    """

    source: str = "smollm2"

    def train(self, texts: Iterable[str]) -> PretrainedTokenizer:
        from causal_jax.data.tokenizers._gguf import gguf_tokenizer
        from causal_jax.gguf_file import open_gguf
        from causal_jax.models.pretrained import resolve

        path = resolve(self.source)
        if path.suffix == ".gguf":
            return gguf_tokenizer(open_gguf(path).metadata, self.source)
        return read_tokenizer_json(path if path.is_dir() else path.parent, self.source)

    def _load(self, record: dict[str, Any]) -> PretrainedTokenizer:
        model = tokenizers_library().Tokenizer.from_str(json.dumps(record["model"]))
        marks = {**record["marks"], "stops": tuple(record["marks"]["stops"])}
        return PretrainedTokenizer(model, Marks(**marks), self)


def read_tokenizer_json(folder: Path | str, source: str | None = None) -> PretrainedTokenizer:
    """The tokenizer in a folder as `transformers` writes it.

    Reads tokenizer.json, and for the marks, where they exist, tokenizer_config.json,
    chat_template.jinja, config.json and generation_config.json.

    Raises:
        InputError: no tokenizer.json, or a damaged one.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"no tokenizer in {folder}: tokenizer.json is missing there")
    try:
        model = tokenizers_library().Tokenizer.from_file(str(path))
    except Exception as e:  # the package raises bare Exception
        raise InputError(f"{path} cannot be read: {e}") from None
    settings = _json(folder / "tokenizer_config.json")
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):  # several by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    stops = []
    for name in ("generation_config.json", "config.json"):
        ids = _json(folder / name).get("eos_token_id")
        stops += ids if isinstance(ids, list) else [] if ids is None else [ids]
    eos = _mark(model, settings.get("eos_token"))
    marks = Marks(
        bos=_front(model),
        eos=eos if eos is not None else next(iter(stops), None),
        stops=tuple(s for s in dict.fromkeys(stops) if s < model.get_vocab_size()),
        chat_template=template,
    )
    return PretrainedTokenizer(model, marks, Pretrained(str(source or folder)))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path} is no JSON: {e}") from None


def _mark(model: Any, token: str | dict[str, Any] | None) -> int | None:
    word = token["content"] if isinstance(token, dict) else token
    return None if word is None else model.token_to_id(word)


def _front(model: Any) -> int | None:
    """The id that the tokenizer itself puts in front of a text, if it does."""
    plain = model.encode("a", add_special_tokens=False).ids
    marked = model.encode("a", add_special_tokens=True).ids
    return marked[0] if marked[:1] != plain[:1] else None
