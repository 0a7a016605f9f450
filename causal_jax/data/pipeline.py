"""From a source to batches: tokens made once, rows packed, order a function of (seed, step, batch)
alone.

Training row number i of the run (i = step * batch + place in the batch) is row `order(seed,
epoch)[i mod n]` of epoch i div n, whatever the number of processes; process p of P serves the p-th
contiguous P-th of every batch. So a run resumed at a step, on any number of processes, sees
exactly what it would have seen.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from causal_jax.data import _store
from causal_jax.data.packing import ConcatRows, FitRows, Row, Stream
from causal_jax.data.sources import Corpus, Source, Task
from causal_jax.data.sources.task import HELD_OUT_SEED
from causal_jax.data.tokenizers import Bytes, Ids, Tokenizer, TokenizerSpec, load_tokenizer
from causal_jax.errors import InputError

PACKINGS = ("concat", "fit")
RECORD = "data.json"


@dataclass(frozen=True)
class Data:
    """What a model is trained and validated on.

    Args:
        source: where the text (or the task's rows) comes from.
        tokenizer: trained on the training documents and saved beside the run.
        context: tokens per row; 0 with a task source means the task's own length.
        batch: rows per step, over all processes.
        packing: "concat" cuts the line of all documents into rows (with `shuffle` at other places
            in every epoch); "fit" keeps documents whole where they fit. See `data/packing.py`.
        shuffle: rows in a new random order every epoch; False is the order of the source.
        seed: of that order.
        threads: threads that make batches ahead of the training step; 0 makes them when asked for.
    """

    source: Source = Corpus()
    tokenizer: TokenizerSpec = Bytes()
    context: int = 256
    batch: int = 16
    packing: str = "concat"
    shuffle: bool = True
    seed: int = 0
    threads: int = 1

    def __post_init__(self):
        task = isinstance(self.source, Task)
        if self.context < (0 if task else 1):
            raise InputError(f"data.context is {self.context}; at least 1")
        if self.batch < 1:
            raise InputError(f"data.batch is {self.batch}; at least 1")
        if self.packing not in PACKINGS:
            raise InputError(f"data.packing is {self.packing!r}; one of {', '.join(PACKINGS)}")
        if not 0 <= self.seed < 1 << 31:
            raise InputError(f"data.seed is {self.seed}; from 0 to {(1 << 31) - 1}")
        if self.threads < 0:
            raise InputError(f"data.threads is {self.threads}; 0 or more")
        if task:
            self._check_task()

    def _check_task(self) -> None:
        length, vocab = self.source.task.length, self.source.task.vocab  # type: ignore[attr-defined]
        if self.context not in (0, length):
            raise InputError(
                f"data.context is {self.context}, the task's rows have {length} tokens; "
                "give 0, or set the task's own length"
            )
        if self.tokenizer not in (Bytes(), Ids(vocab)):
            raise InputError(
                f"data.tokenizer is {self.tokenizer}, but a task has no text; leave it at its default"
            )
        if self.packing != "concat" or not self.shuffle:
            raise InputError(
                "data.packing and data.shuffle say nothing about a task, whose rows are all different and "
                "never packed; leave them at their defaults"
            )

    def prepare(self, folder: Path | str | None = None, **kwargs: Any) -> "Prepared":
        """`prepare(self, folder, ...)`."""
        return prepare(self, folder, **kwargs)


class Batches(Sequence[Row]):
    """Validation batches of this process, in a fixed order; the last one is filled up with weight
    0.

    Attributes:
        targets: how many targets have weight 1, over all batches and processes.
        bytes: UTF-8 bytes that these targets stand for, over all batches and processes (0 for a
            task). Every byte of the text counts once; the end mark of a document is a target, its
            nats are spent, but it is no byte of the text. So `nats / ln 2 / bytes` can be set
            beside a compressor or an n-gram model of the same bytes, and errs, if at all, against
            this model.
    """

    def __init__(
        self, rows: Sequence[Row], batch: int, process: tuple[int, int], limit: int | None, sizes
    ):
        whole = -(-len(rows) // batch)
        self._rows, self._batch = rows, batch
        self._index, self._count = process
        self._length = whole if limit is None else min(limit, whole)
        self._sizes = sizes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        local = self._batch // self._count
        first = (index % len(self)) * self._batch + self._index * local
        rows = [self._rows[i] for i in range(first, min(first + local, len(self._rows)))]
        return stack(rows + [_blank(self._rows[0])] * (local - len(rows)))

    @functools.cached_property
    def _totals(self) -> tuple[int, int]:
        targets = size = 0
        for i in range(min(len(self) * self._batch, len(self._rows))):
            row = self._rows[i]
            counted = row["targets"][row["weights"] > 0]
            targets += counted.size
            size += int(self._sizes[counted].sum()) if self._sizes is not None else 0
        return targets, size

    @property
    def targets(self) -> int:
        return self._totals[0]

    @property
    def bytes(self) -> int:
        return self._totals[1]

    def bits_per_byte(self, nats: float) -> float:
        """Bits per byte of text, from the summed nats of all weighted targets."""
        if not self.bytes:
            raise InputError("bits per byte: a task has no text, and so no bytes")
        return nats / math.log(2) / self.bytes


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
        return self.tokenizer.vocab

    @property
    def rows_per_epoch(self) -> int:
        """Rows before the training text repeats; 0 for a task, which never does."""
        return len(_rows(self.config, self.streams["train"])) if self.streams else 0

    def validation(
        self,
        context: int | None = None,
        batch: int | None = None,
        stride: int | None = None,
        limit: int | None = None,
    ) -> Batches:
        """The validation split as batches, rows always "concat" (every target once, no padding but
        at the end).

        Args:
            context: tokens per row; None is the one trained with.
            batch: rows per batch over all processes; None is the one trained with.
            stride: targets that a row adds; None is `context`, less gives every target more tokens
                before it (at least context - stride of its document), at context / stride times
                the work.
            limit: at most this many batches.

        Raises:
            InputError: nothing is held out; an impossible size.
        """
        context = self.config.context if context is None else context
        batch = self.config.batch if batch is None else batch
        for name, value in (("context", context), ("batch", batch), ("limit", limit)):
            if value is not None and value < 1:
                raise InputError(f"validation {name} is {value}; at least 1")
        _check_divisible("validation batch", batch, self.process[1])
        if not self.streams:
            if context != self.config.context or stride not in (None, context):
                raise InputError(
                    f"validation context is {context}: a task's rows have {self.config.context} tokens, "
                    "each in one row; set the task's own length"
                )
            rows: Sequence[Row] = TaskRows(self.config, held_out=True)
            return Batches(rows, batch, self.process, limit, None)
        stream = self.streams["validation"]
        if not stream.pairs:
            raise InputError(
                f"validation: {type(self.config.source).__name__} holds no text out; "
                "give it a held_out above 0 or a validation text"
            )
        if stride is not None and not 0 < stride <= context:
            raise InputError(f"validation stride is {stride}; from 1 to the context {context}")
        rows = ConcatRows(stream, context, stride)
        return Batches(rows, batch, self.process, limit, self.tokenizer.piece_bytes())

    @property
    def validation_bytes(self) -> int:
        """`validation().bytes`: UTF-8 bytes of the whole validation text (0 for a task)."""
        if not self.streams:
            return 0
        return int(
            self.tokenizer.piece_bytes()[self.streams["validation"].tokens].sum(dtype=np.int64)
        )

    def check_vocab(self, vocab: int) -> None:
        """Refuse a model whose embedding has too few rows for these tokens (more are harmless)."""
        if vocab < self.vocab:
            raise InputError(
                f"model.vocab is {vocab}, the tokenizer has {self.vocab} ids; "
                f"set model.vocab to {self.vocab} (or 0, to have it filled in)"
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
            text or tokenizer other than the run began with are refused. None writes nothing.
        tokenizer: use this one instead of `config.tokenizer`.
        process: (index, count) of this process; None asks JAX.

    Raises:
        InputError: whatever is wrong with source, sizes or the resumed run; before any long work.
    """
    if process is None:
        import jax

        process = jax.process_index(), jax.process_count()
    _check_divisible("data.batch", config.batch, process[1])
    fingerprint = config.source.fingerprint()
    _check_source(folder, config, fingerprint)
    if isinstance(config.source, Task):
        task = config.source.task
        config = dataclasses.replace(config, context=task.length)
        tokenizer = _tokenizer(folder, config, tokenizer, lambda: Ids(task.vocab).train([]))
        streams, serve = {}, _task_batches
    else:
        make = functools.partial(_store.trained, config.tokenizer, config.source, fingerprint)
        tokenizer = _tokenizer(folder, config, tokenizer, make)
        if tokenizer.bos is None:
            raise InputError(
                f"data.tokenizer is {tokenizer.spec()}, which has no marks for begin and end; for text use "
                "Bytes() or BPE()"
            )
        streams, serve = _store.token_streams(config.source, fingerprint, tokenizer), _text_batches
        if streams["train"].pairs < config.context:
            raise InputError(
                f"data.context is {config.context}, but the training text has only "
                f"{streams['train'].pairs} tokens; give a shorter context or more text"
            )
    if folder is not None and process[0] == 0:
        _record(Path(folder), fingerprint, tokenizer, config)
    train = serve(config, streams, process)
    return Prepared(config, tokenizer, train, fingerprint, streams, process)


def _text_batches(config: Data, streams: dict[str, Stream], process: tuple[int, int]):
    import grain

    rows = _rows(config, streams["train"])
    n, context, seed = len(rows), config.context, config.seed

    @functools.lru_cache(maxsize=4)
    def shift(epoch: int) -> int:
        return int(np.random.default_rng([seed, epoch]).integers(context))

    def row(item: tuple[int, int]) -> Row:
        epoch, index = item
        if config.shuffle and isinstance(rows, ConcatRows):
            return rows.row(index, shift(epoch))
        return rows[index]

    order = grain.MapDataset.range(n)
    if config.shuffle:
        order = order.shuffle(seed=seed)
    order = order.repeat().map_with_index(lambda i, index: (i // n, index))
    return _batches(order, config, process, row)


def _task_batches(config: Data, streams: dict[str, Stream], process: tuple[int, int]):
    import grain

    rows = TaskRows(config, held_out=False)
    return _batches(grain.MapDataset.range(len(rows)), config, process, rows.__getitem__)


def _batches(order, config: Data, process: tuple[int, int], row):
    """Batches of row numbers are global and cheap; only this process's share is made into rows."""
    import grain

    index, count = process
    local = config.batch // count

    def make(items: Sequence[Any]) -> Row:
        return stack([row(item) for item in items[index * local : (index + 1) * local]])

    batches = order.batch(config.batch, drop_remainder=True, batch_fn=list).map(make)
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4 * config.threads)
    return batches.to_iter_dataset(options)


class TaskRows(Sequence[Row]):
    """The rows of a task: as good as endless for training, a fixed number from another seed held out."""

    def __init__(self, config: Data, held_out: bool):
        source: Any = config.source
        self._task, self._held_out = source.task, held_out
        self._length = source.validation_rows if held_out else sys.maxsize // 2
        # Every run is validated on the same rows, whatever it is trained with.
        self._seed = HELD_OUT_SEED + (1 << 31) if held_out else config.seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        n = self._task.length
        row = {k: np.asarray(v) for k, v in self._task.sample(self._seed, index).items()}
        row["segments"], row["positions"] = np.zeros(n, np.int32), np.arange(n, dtype=np.int32)
        return row


def _rows(config: Data, stream: Stream) -> ConcatRows | FitRows:
    kind = ConcatRows if config.packing == "concat" else FitRows
    return kind(stream, config.context)


def stack(rows: Sequence[Row]) -> Row:
    """Rows to a batch: every array gets a leading axis."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _blank(row: Row) -> Row:
    blank = {name: np.zeros_like(value) for name, value in row.items()}
    blank["segments"] -= 1
    return blank


def _check_divisible(field: str, batch: int, processes: int) -> None:
    if batch % processes:
        raise InputError(
            f"{field} is {batch}, which {processes} processes cannot share evenly; "
            f"give a multiple of {processes}"
        )


def _check_source(folder: Path | str | None, config: Data, fingerprint: str) -> None:
    began = _began(folder)
    if began and began["source"] != fingerprint:
        raise InputError(
            f"data.source = {config.source}: its content is not what the run in {folder} began with "
            f"({began['source'][:12]} then, {fingerprint[:12]} now); put the old text back, or begin a new run "
            "in another folder"
        )


def _tokenizer(folder: Path | str | None, config: Data, given: Tokenizer | None, make) -> Tokenizer:
    """The run's own tokenizer if it has one, and then nothing else will do; or the given, or a new one."""
    if folder is None or not (Path(folder) / "tokenizer").is_dir():
        return make() if given is None else given
    saved = load_tokenizer(Path(folder) / "tokenizer")
    if given is not None:
        same, wanted = given.fingerprint() == saved.fingerprint(), f"another {given.spec()}"
    else:
        task = isinstance(config.source, Task)
        same, wanted = task or saved.spec() == config.tokenizer, str(config.tokenizer)
    if not same:
        raise InputError(
            f"data.tokenizer is {wanted}, but the run in {folder} began with {saved.spec()}; "
            "keep that, or begin a new run in another folder"
        )
    return saved


def _began(folder: Path | str | None) -> dict[str, Any] | None:
    if folder is None or not (Path(folder) / RECORD).is_file():
        return None
    try:
        record = json.loads((Path(folder) / RECORD).read_text())
        return {"source": str(record["source"]), "tokenizer": str(record["tokenizer"])}
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{Path(folder) / RECORD} is damaged ({e}); delete it to go on without the check that the "
            "data is what the run began with"
        ) from None


def _record(folder: Path, fingerprint: str, tokenizer: Tokenizer, config: Data) -> None:
    tokenizer.save(folder / "tokenizer")
    record = {"source": fingerprint, "tokenizer": tokenizer.fingerprint(), "config": repr(config)}
    part = folder / (RECORD + ".part")
    part.write_text(json.dumps(record, indent=1))
    part.replace(folder / RECORD)
