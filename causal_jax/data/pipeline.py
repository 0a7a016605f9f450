"""From a source to batches: text read, tokens made once, rows packed, an exact order to train in.

The order is a function of (seed, step, batch) alone: a run resumed at a step, on any number of
processes, sees exactly what it would have seen.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from causal_jax.data import _store
from causal_jax.data._run import check_source, remember, run_tokenizer
from causal_jax.data.batches import Batches, training_batches
from causal_jax.data.packing import ConcatRows, FitRows, Row, Stream
from causal_jax.data.sources import Corpus, Source, Synthetic
from causal_jax.data.sources._base import check_split
from causal_jax.data.sources.task import TaskRows
from causal_jax.data.tokenizers import Bytes, Tokenizer, TokenizerSpec
from causal_jax.errors import InputError

PACKINGS = ("concat", "fit")


@dataclass(frozen=True)
class Data:
    """What a model is trained and validated on.

    Args:
        source: where the text (or the task's rows) comes from.
        tokenizer: trained on the training documents and saved beside the run. A task of text
            (needle, sniah, babilong) takes any, one of ids has its own.
        context: tokens per row; 0 with a task means the task's own length. A task of text that is
            read by another tokenizer than bytes may have any: its rows are padded behind.
        batch: rows per step, over all processes.
        packing: "concat" cuts the line of all documents into rows (with `shuffle` at other places
            in every epoch); "fit" keeps documents whole where they fit. See `data/packing.py`.
        shuffle: rows in a new random order every epoch; False is the order of the source.
        seed: of that order.
        threads: that make batches ahead of the training step; 0 makes them when asked for.
    """

    source: Source = field(default_factory=Corpus)
    tokenizer: TokenizerSpec = field(default_factory=Bytes)
    context: int = 256
    batch: int = 16
    packing: str = "concat"
    shuffle: bool = True
    seed: int = 0
    threads: int = 1

    def __post_init__(self):
        least = 0 if isinstance(self.source, Synthetic) else 1
        for name, low in (("context", least), ("batch", 1), ("seed", 0), ("threads", 0)):
            if getattr(self, name) < low:
                raise InputError(f"data.{name} is {getattr(self, name)}; at least {low}")
        if self.seed >= 1 << 31:
            raise InputError(f"data.seed is {self.seed}; at most {(1 << 31) - 1}")
        if self.packing not in PACKINGS:
            raise InputError(f"data.packing is {self.packing!r}; one of {', '.join(PACKINGS)}")
        if isinstance(self.source, Synthetic):
            self._check_task(self.source)

    def _check_task(self, source: Synthetic) -> None:
        length = source.task.length
        any_tokens = source.task.textual and self.tokenizer != Bytes()
        if self.context not in (0, length) and not any_tokens:
            raise InputError(
                f"data.context is {self.context}, the task's rows have {length} tokens; give 0, or "
                "set the task's own length"
            )
        if self.tokenizer not in (Bytes(), source.tokenizer()) and not source.task.textual:
            raise InputError(
                f"data.tokenizer is {self.tokenizer}, but the task is written in "
                f"{source.tokenizer()}; leave the field at its default"
            )
        if self.packing != "concat" or not self.shuffle:
            raise InputError(
                "data.packing and data.shuffle say nothing about a task, whose rows are never "
                "packed and all different; leave them at their defaults"
            )

    def prepare(self, folder: Path | str | None = None, **kwargs: Any) -> "Prepared":
        """`prepare(self, folder, ...)`."""
        return prepare(self, folder, **kwargs)


@dataclass(frozen=True)
class Prepared:
    """Data that is ready to be read.

    Attributes:
        config: the `Data` it was made from, `context` filled in.
        tokenizer: as saved beside the run.
        train: a grain `IterDataset` of this process's batches, without end. `iter(train)` is a
            grain iterator: `get_state()` gives a dict that JSON can hold, `set_state` continues
            exactly.
        fingerprint: sha256 of the text.
        streams: the tokens of "train" and "validation"; empty for a task.
        process: (index, count).
    """

    config: Data
    tokenizer: Tokenizer
    train: Any
    fingerprint: str
    streams: dict[str, Stream]
    process: tuple[int, int]

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab

    @property
    def rows_per_epoch(self) -> int:
        """Rows before the training text repeats; 0 for a task, which never does."""
        return len(_packed(self.config, self.streams["train"])) if self.streams else 0

    def validation(
        self,
        context: int | None = None,
        batch: int | None = None,
        stride: int | None = None,
        limit: int | None = None,
    ) -> Batches:
        """The validation split: `batches("validation", ...)`."""
        return self.batches("validation", context, batch, stride, limit)

    def batches(
        self,
        split: str,
        context: int | None = None,
        batch: int | None = None,
        stride: int | None = None,
        limit: int | None = None,
    ) -> Batches:
        """A split in fixed order, rows always "concat": every target once, padding at the end only.

        Args:
            split: "validation" or "train"; a task has only the former.
            context: tokens per row; None is the one trained with.
            batch: rows per batch over all processes; None is the one trained with.
            stride: targets that a row adds; None is `context`. Less gives every target at least
                context - stride tokens before it (as far as its document goes back), at
                context / stride times the work.
            limit: at most this many batches.

        Raises:
            InputError: nothing is held out, or an impossible size.
        """
        context = self.config.context if context is None else context
        batch = self.config.batch if batch is None else batch
        for name, value in (("context", context), ("batch", batch), ("limit", limit)):
            if value is not None and value < 1:
                raise InputError(f"validation {name} is {value}; at least 1")
        if stride is not None and not 0 < stride <= context:
            raise InputError(f"validation stride is {stride}; from 1 to the context {context}")
        _check_divisible("validation batch", batch, self.process[1])
        source = self.config.source
        check_split(split)
        if isinstance(source, Synthetic):
            if split == "train":
                raise InputError("split is 'train': a task trains on rows without end")
            if context != self.config.context or stride not in (None, context):
                raise InputError(
                    f"validation context is {context} (stride {stride}): the task's rows have "
                    f"{self.config.context} tokens, each in one row; set the task's own length"
                )
            rows = TaskRows(source, None, self.config.context, self.tokenizer)
            return Batches(rows, batch, self.process, limit)
        stream = self.streams[split]
        if not stream.pairs:
            raise InputError(
                f"validation: {type(source).__name__} holds no text out; give it a held_out above "
                "0 or a validation text"
            )
        rows = ConcatRows(stream, context, stride)
        return Batches(rows, batch, self.process, limit, self.tokenizer.piece_bytes())

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the whole validation text; 0 for a task, or if nothing is held out."""
        held_out = self.streams and self.streams["validation"].pairs
        return self.validation().bytes if held_out else 0

    def check_vocab(self, vocab: int) -> None:
        """Refuse a model whose embedding has too few rows for these tokens (more are harmless)."""
        if vocab < self.vocab:
            raise InputError(
                f"model.vocab is {vocab}, the tokenizer has {self.vocab} ids; set model.vocab to "
                f"{self.vocab}, or to 0 to have it filled in"
            )


def prepare(
    config: Data,
    folder: Path | str | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    process: tuple[int, int] | None = None,
) -> Prepared:
    """Tokenizer, tokens and batches for a run; quick when all of it was made before.

    Args:
        config: what to prepare.
        folder: the run folder. The tokenizer is saved there (or read, if the run is resumed), and
            other text or another tokenizer than the run began with is refused. None writes nothing.
        tokenizer: use this one instead of `config.tokenizer`.
        process: (index, count) of this process; None asks JAX.

    Raises:
        InputError: whatever is wrong with source, sizes or the resumed run.
    """
    folder = None if folder is None else Path(folder)
    if process is None:
        import jax

        process = jax.process_index(), jax.process_count()
    _check_divisible("data.batch", config.batch, process[1])
    fingerprint = config.source.fingerprint()
    check_source(folder, config.source, fingerprint)
    if isinstance(config.source, Synthetic):
        prepared = _prepare_task(config, config.source, folder, tokenizer, fingerprint, process)
    else:
        prepared = _prepare_text(config, folder, tokenizer, fingerprint, process)
    if folder is not None and process[0] == 0:
        remember(folder, config.source, fingerprint, prepared.tokenizer)
    return prepared


def _prepare_text(config, folder, tokenizer, fingerprint, process) -> Prepared:
    new = functools.partial(_store.trained, config.tokenizer, config.source, fingerprint)
    tokenizer = run_tokenizer(folder, config.tokenizer, tokenizer, new)
    if tokenizer.eos is None:
        raise InputError(
            f"data.tokenizer is {tokenizer.spec()}, which has no mark for the end; for text use "
            "Bytes(), BPE() or a Pretrained() that has one"
        )
    streams = _store.token_streams(config.source, fingerprint, tokenizer)
    pairs = streams["train"].pairs
    if pairs < config.context:
        raise InputError(
            f"data.context is {config.context}, but the training text has only {pairs} tokens; "
            "give a shorter context or more text"
        )
    rows = _packed(config, streams["train"])

    @functools.lru_cache(maxsize=4)
    def shift(epoch: int) -> int:
        return int(np.random.default_rng([config.seed, epoch]).integers(config.context))

    def make(items: Sequence[tuple[int, int]]) -> Row:
        numbers = [i for _, i in items]
        if config.shuffle and isinstance(rows, ConcatRows):
            return rows.batch(numbers, [shift(epoch) for epoch, _ in items])
        return rows.batch(numbers)

    train = training_batches(
        rows,
        make,
        batch=config.batch,
        process=process,
        seed=config.seed if config.shuffle else None,
        threads=config.threads,
    )
    return Prepared(config, tokenizer, train, fingerprint, streams, process)


def _prepare_task(config, source: Synthetic, folder, tokenizer, fingerprint, process) -> Prepared:
    textual = source.task.textual
    spec = config.tokenizer if textual else source.tokenizer()
    new = functools.partial(spec.train, source.samples() if textual else [])
    tokenizer = run_tokenizer(folder, spec, tokenizer, new)
    if not textual and tokenizer.fingerprint() != spec.train([]).fingerprint():
        raise InputError(f"tokenizer: the task is written in {spec}; leave the argument out")
    config = dataclasses.replace(config, context=config.context or source.task.length)
    rows = TaskRows(source, config.seed, config.context, tokenizer)
    rows.batch([0])  # a context that is too short is refused now
    train = training_batches(
        rows,
        lambda items: rows.batch([i for _, i in items]),
        batch=config.batch,
        process=process,
        seed=None,
        threads=config.threads,
    )
    return Prepared(config, tokenizer, train, fingerprint, {}, process)


def _packed(config: Data, stream: Stream) -> ConcatRows | FitRows:
    kind = ConcatRows if config.packing == "concat" else FitRows
    return kind(stream, config.context)


def _check_divisible(field: str, batch: int, processes: int) -> None:
    if batch % processes:
        raise InputError(
            f"{field} is {batch}, which {processes} processes cannot share evenly; give a multiple "
            f"of {processes}"
        )
