"""The vocabulary inside a GGUF file as a `tokenizers.Tokenizer`.

GGUF names a model ("gpt2": byte-level BPE with merges, "llama": SentencePiece BPE with scores) and,
for the first, the way text is cut before it (`tokenizer.ggml.pre`).
"""

from collections.abc import Mapping
from typing import Any

from causal_jax.data.tokenizers.bpe import tokenizers_library
from causal_jax.data.tokenizers.pretrained import Marks, Pretrained, PretrainedTokenizer
from causal_jax.errors import InputError

# How text is cut before the merges, by the names of llama.cpp: a regular expression (whose matches
# are kept apart), or whether digits stand alone before GPT-2's own expression.
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CUTS = {
    "gpt-2": None,
    "gpt-neox": None,
    "olmo": None,
    "smollm": "digits",
    "starcoder": "digits",
    "llama3": _SHORT + _WORDS % r"\p{N}{1,3}",
    "llama-bpe": _SHORT + _WORDS % r"\p{N}{1,3}",
    "qwen2": _SHORT + _WORDS % r"\p{N}",
}
_LLAMA3 = ("llama3", "llama-bpe")
_CONTROL, _USER = 3, 4  # token types
_KEY = "tokenizer.ggml."


def gguf_tokenizer(metadata: Mapping[str, Any], source: str) -> PretrainedTokenizer:
    """The tokenizer that a GGUF file's metadata describe.

    Args:
        metadata: key -> value.
        source: the file's name.

    Raises:
        InputError: a kind or a cut that is not known here, or a vocabulary that is missing.
    """
    lib = tokenizers_library()
    kind, words = metadata.get(_KEY + "model"), metadata.get(_KEY + "tokens")
    if not words:
        raise InputError(f"{source}: no vocabulary inside ({_KEY}tokens)")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{source}: tokenizer {kind!r} is not supported, only 'gpt2' and 'llama'")
    if len(set(words)) != len(words):
        raise InputError(f"{source}: a token occurs twice in {_KEY}tokens")
    model = (_byte_level if kind == "gpt2" else _sentencepiece)(lib, metadata, source)
    types = metadata.get(_KEY + "token_type") or [1] * len(words)
    added = [
        lib.AddedToken(word, special=t == _CONTROL, normalized=False)
        for word, t in zip(words, types)
        if t in (_CONTROL, _USER)
    ]
    model.add_tokens(added)
    eos = metadata.get(_KEY + "eos_token_id")
    by_default = kind == "llama" or metadata.get(_KEY + "pre") in _LLAMA3
    front = metadata.get(_KEY + "add_bos_token", by_default)
    bos = metadata.get(_KEY + "bos_token_id") if front else None
    if bos is not None:
        word = words[bos]
        model.post_processor = lib.processors.TemplateProcessing(
            single=[word, "$A"], pair=[word, "$A", word, "$B"], special_tokens=[(word, bos)]
        )
    marks = Marks(
        bos=bos,
        eos=eos,
        stops=tuple(s for s in (eos, metadata.get(_KEY + "eot_token_id")) if s is not None),
        chat_template=metadata.get("tokenizer.chat_template"),
    )
    return PretrainedTokenizer(model, marks, Pretrained(source))


def _byte_level(lib: Any, metadata: Mapping[str, Any], source: str) -> Any:
    words, merges = metadata[_KEY + "tokens"], metadata.get(_KEY + "merges") or []
    pre = metadata.get(_KEY + "pre", "gpt-2")
    if pre not in _CUTS:
        known = ", ".join(_CUTS)
        raise InputError(f"{source}: {_KEY}pre={pre!r} is not known here, only {known}")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    model = lib.Tokenizer(
        lib.models.BPE(
            {word: i for i, word in enumerate(words)}, pairs, ignore_merges=pre in _LLAMA3
        )
    )
    cut, cuts = _CUTS[pre], lib.pre_tokenizers
    if cut is None:
        model.pre_tokenizer = cuts.ByteLevel(add_prefix_space=False)
    elif cut == "digits":
        parts = [cuts.Digits(individual_digits=True), cuts.ByteLevel(add_prefix_space=False)]
        model.pre_tokenizer = cuts.Sequence(parts)
    else:
        split = cuts.Split(lib.Regex(cut), behavior="isolated")
        letters = cuts.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = cuts.Sequence([split, letters])
    if pre == "qwen2":
        model.normalizer = lib.normalizers.NFC()
    model.decoder = lib.decoders.ByteLevel()
    return model


def _sentencepiece(lib: Any, metadata: Mapping[str, Any], source: str) -> Any:
    """Merges are those of two known words into a known one, the best score first."""
    words, scores = metadata[_KEY + "tokens"], metadata.get(_KEY + "scores")
    if not scores or len(scores) != len(words):
        raise InputError(f"{source}: {_KEY}scores is missing or has not one score per token")
    ids = {word: i for i, word in enumerate(words)}
    merges = []
    for word, score in zip(words, scores):
        cuts = [(word[:n], word[n:]) for n in range(1, len(word))]
        known = [c for c in cuts if c[0] in ids and c[1] in ids]
        known.sort(key=lambda c: (ids[c[0]], ids[c[1]]))
        merges += [(score, c) for c in known]
    merges.sort(key=lambda m: m[0], reverse=True)
    unknown = words[metadata.get(_KEY + "unknown_token_id", 0)]
    model = lib.Tokenizer(
        lib.models.BPE(
            ids, [c for _, c in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    space = metadata.get(_KEY + "add_space_prefix", True)
    replace = lib.normalizers.Replace(" ", "▁")
    prepend = [lib.normalizers.Prepend("▁")] if space else []
    model.normalizer = lib.normalizers.Sequence([*prepend, replace])
    steps = lib.decoders
    strip = [steps.Strip(content=" ", left=1)] if space else []
    model.decoder = steps.Sequence(
        [steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), *strip]
    )
    return model
