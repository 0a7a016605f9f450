"""Measure a trained model: `python -m causal_jax.evaluate --run DIR [--context N,N] [--task NAME]`.

    perplexity = exp(nats / targets),   bits per byte = nats / (ln 2 * bytes of text)

Text: every target of the split is counted once, whatever the rows; with several contexts the rows
overlap and only the last `stride` targets of a row are counted, so each context is measured on the
same targets, each with at least context - stride tokens (of its own document) before it.

Tasks: the answer tokens are compared with the likeliest ones, the earlier tokens of the answer
given. All of a row's answer right is the same as greedy generation writing it without a mistake:
generation leaves the answer at its first wrong token, and not before.

With --window N a task's row is read N tokens at a time, as decoding reads it, and what the model
remembers is carried on: the memory needed is that of one window and of this state, which the table
shows. A model of constant state answers rows of any length so; of attention the state grows.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from causal_jax.data.pipeline import Prepared, prepare
from causal_jax.data.sources.task import HELD_OUT_SEED
from causal_jax.data.tasks import Task, parse_tasks, tasks
from causal_jax.data.tokenizers import IdTokenizer, Tokenizer
from causal_jax.errors import InputError
from causal_jax.scoring import peak_mib, score, state_bytes
from causal_jax.training.run import Run, load_run

TASK_SEED = HELD_OUT_SEED  # the stream that training validates on, never trains on


@dataclass(frozen=True)
class TextScore:
    """How well a text was predicted.

    Attributes:
        targets: tokens predicted (every document's end mark among them).
        bytes: UTF-8 bytes of text they stand for.
        nats: summed -log p.
        correct: targets that were the likeliest token.
    """

    targets: int
    bytes: int
    nats: float
    correct: int

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / self.targets

    def figures(self) -> dict[str, float]:
        """Everything to report, by name."""
        return {
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "accuracy": self.correct / self.targets,
            "targets": self.targets,
            "bytes": self.bytes,
        }


def score_text(
    model: Any, batches: Iterable[Mapping[str, Any]], piece_bytes: np.ndarray
) -> TextScore:
    """Score rows of text; what has weight 0 is context only.

    Args:
        batches: dicts of tokens, targets, weights, segments, positions [B, T].
        piece_bytes: bytes of text that each token id stands for [V].
    """
    targets = size = correct = 0
    nats = 0.0
    for batch in batches:
        nll, best = score(model, batch)
        counted = batch["weights"] > 0
        nats += float(nll[counted].sum(dtype=np.float64))
        correct += int(best[counted].sum())
        targets += int(counted.sum())
        size += int(piece_bytes[batch["targets"][counted]].sum())
    return TextScore(targets, size, nats, correct)


@dataclass(frozen=True)
class TaskScore:
    """How well a task was answered.

    Attributes:
        rows, tokens: how many rows, and answer tokens in them.
        exact: rows whose answer was right from the first to the last token.
        correct: answer tokens that were right.
        nats: summed -log p of the answer tokens.
    """

    rows: int
    tokens: int
    exact: int
    correct: int
    nats: float

    def figures(self) -> dict[str, float]:
        """Everything to report, by name."""
        return {
            "exact": self.exact / self.rows,
            "token": self.correct / self.tokens,
            "loss": self.nats / self.tokens,
            "rows": self.rows,
            "tokens": self.tokens,
        }


def score_task(
    model: Any,
    task: Task,
    *,
    tokenizer: Tokenizer | None = None,
    rows: int = 256,
    batch: int = 32,
    seed: int = TASK_SEED,
    window: int | None = None,
) -> TaskScore:
    """Ask a model rows 0..rows-1 of stream `seed` of a task.

    Args:
        model: its vocabulary holds the task's.
        tokenizer: for a task of text; None means bytes.
        rows: how many rows.
        batch: rows at a time; the result does not depend on it.
        seed: of the stream; the default is the one that training keeps apart.
        window: as of `score`.
    """
    total = TaskScore(0, 0, 0, 0, 0.0)
    for first in range(0, rows, batch):
        # The last batch is filled up, so that one shape is compiled; the filling is not counted.
        indices = range(first, first + batch)
        text = {"tokenizer": tokenizer} if task.textual else {}
        made = task.batch(seed, indices, **text)
        made = _padded(made, 64) if task.textual else made
        nll, best = score(model, made, window)
        asked = np.array(made["weights"]) > 0
        asked[rows - first :] = False
        real = asked.any(axis=1)
        total = TaskScore(
            total.rows + int(real.sum()),
            total.tokens + int(asked.sum()),
            total.exact + int(((best | ~asked).all(axis=1) & real).sum()),
            total.correct + int(best[asked].sum()),
            total.nats + float(nll[asked].sum(dtype=np.float64)),
        )
    return total


def _padded(batch: Mapping[str, np.ndarray], multiple: int) -> dict[str, np.ndarray]:
    """Rows filled up behind to a multiple of `multiple` tokens: few shapes, few compilations."""
    more = -batch["tokens"].shape[1] % multiple
    fill = {"segments": -1}
    return {
        name: np.pad(value, ((0, 0), (0, more)), constant_values=fill.get(name, 0))
        for name, value in batch.items()
    }


def check_task(run: Run, task: Task) -> None:
    """Refuse a task that this run's model cannot be asked.

    Raises:
        InputError: other token ids, or rows longer than a table of learned positions.
    """
    name, ids = tasks.name_of(task), isinstance(run.tokenizer, IdTokenizer)
    if task.textual == ids:
        others = [n for n in tasks.names() if tasks[n].textual != ids]
        has, reads = ("text", "ids") if ids else ("ids", "text")
        raise InputError(
            f"task {name}: it is made of {has}, but this run reads {reads};"
            f" tasks of {reads}: {', '.join(others)}"
        )
    if ids and run.tokenizer.vocab != task.vocab:
        raise InputError(
            f"task {name}: it has {task.vocab} ids, the run was trained with {run.tokenizer.vocab};"
            " give the same dials as in the run's config"
        )
    text = {"tokenizer": run.tokenizer} if task.textual else {}
    tokens = task.batch(0, range(4), **text)["tokens"].shape[1]
    check_positions(run, tokens, f"task {name}: tokens of a row")


def check_positions(run: Run, length: int, what: str) -> None:
    """Refuse rows longer than a table of learned positions; point out those beyond the context.

    Raises:
        InputError: the model has no position for the last tokens.
    """
    context = getattr(run.recipe.model, "context", length)
    if length <= context:
        return
    if getattr(run.recipe.model, "learned_positions", False):
        raise InputError(
            f"{what} {length}: the model has a table of {context} positions; at most that"
        )
    print(f"note: {what} {length}: the model is meant for {context}", file=sys.stderr)


def evaluate_text(
    run: Run,
    prepared: Prepared,
    split: str,
    contexts: Sequence[int] = (),
    *,
    stride: int | None = None,
    batch: int | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Perplexity and bits per byte of a split, once per context.

    Args:
        split: "train" or "validation".
        contexts: row lengths; none: the one trained with, rows side by side as training validates.
        stride: targets counted per row; None: half the shortest context, or with one context all.
        batch: rows at a time; None: as in training. The result does not depend on it.
        limit: at most so many batches.

    Returns:
        One record per context.
    """
    contexts = list(contexts) or [prepared.config.context]
    if stride is None:
        stride = max(1, min(contexts) // 2) if len(contexts) > 1 else contexts[0]
    records = []
    for context in contexts:
        check_positions(run, context, "context")
        batches = prepared.batches(split, context, batch, stride, limit)
        figures = score_text(run.model, batches, prepared.tokenizer.piece_bytes()).figures()
        records.append({"split": split, "context": context, "stride": stride} | figures)
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 the user's input is wrong, 1 interrupted."""
    args = _parser().parse_args(argv)
    try:
        report = _evaluate(args)
        if args.out:
            _write(Path(args.out), report)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 1
    return 0


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("rows", "stride", "batch", "limit", "window"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: at least 1")
    wanted = [task for spec in args.task for task in parse_tasks(spec)]
    contexts = _numbers("--context", args.context)
    run = load_run(args.run, args.checkpoint)
    source: Any = run.recipe.data.source
    text = bool(contexts or args.split or not wanted)
    if hasattr(source, "task") and text:
        if contexts or args.split:
            raise InputError(f"--run {args.run}: trained on a task, which has no text; use --task")
        wanted, text = [source.task], False
    if text and args.window:
        raise InputError(f"--window {args.window}: for tasks; text is read in rows (--context)")
    for task in wanted:
        check_task(run, task)
    report: dict[str, Any] = {"run": str(args.run), "step": run.step, "text": [], "tasks": []}
    print(f"{args.run}, step {run.step}")
    if text:
        prepared = prepare(run.recipe.data, tokenizer=run.tokenizer)
        _warn_if_changed(run, prepared)
        sizes = {"stride": args.stride, "batch": args.batch, "limit": args.limit}
        report["text"] = evaluate_text(run, prepared, args.split or "validation", contexts, **sizes)
        _print(report["text"])
    for task in wanted:
        seed = TASK_SEED if args.seed is None else args.seed
        sizes = {"rows": args.rows, "batch": args.batch or 32, "seed": seed}
        sizes["window"] = args.window
        got = score_task(run.model, task, tokenizer=run.tokenizer, **sizes)
        dials = {"task": tasks.name_of(task)} | dataclasses.asdict(task)
        figures = {"seed": seed} | got.figures()
        if args.window:
            state = state_bytes(run.model, task.length)
            figures |= {"window": args.window, "state_bytes": state, "peak_mib": peak_mib()}
        report["tasks"].append(dials | figures)
    _print(report["tasks"])
    return report


def _numbers(flag: str, text: str | None) -> list[int]:
    try:
        numbers = [int(word) for word in (text or "").split(",") if word.strip()]
    except ValueError:
        raise InputError(f"{flag} {text}: numbers with commas between, such as 128,256") from None
    if any(n < 1 for n in numbers):
        raise InputError(f"{flag} {text}: every number is at least 1")
    return numbers


def _warn_if_changed(run: Run, prepared: Prepared) -> None:
    record = run.folder / "data.json"
    if record.is_file():
        began = json.loads(record.read_text()).get("source")
        if began != prepared.fingerprint:
            print("warning: the data is not what this run was trained on", file=sys.stderr)


def _print(records: Sequence[Mapping[str, Any]]) -> None:
    """A table of records, a new one where the columns change."""
    header: list[str] = []
    for number, record in enumerate(records):
        if list(record) != header:
            header = list(record)
            group = [r for r in records[number:] if list(r) == header]
            cells = [header, *([_cell(r[name]) for name in header] for r in group)]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            print("  ".join(name.rjust(w) for name, w in zip(header, widths, strict=True)))
        row = (_cell(record[name]).rjust(w) for name, w in zip(header, widths, strict=True))
        print("  ".join(row), flush=True)


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _write(path: Path, report: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as e:
        raise InputError(f"--out {path}: cannot be written ({e.strerror})") from e


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m causal_jax.evaluate",
        description="Measure the model of a run folder: perplexity and bits per byte on its text, "
        "accuracy on synthetic tasks. Without --context, --split or --task: what the run was "
        "trained on, its validation split.",
        epilog="example: python -m causal_jax.evaluate --run runs/quickstart --context 64,128,256 "
        "--task needle:length=128/256,depth=0/0.5/1 --out figures.json",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="the run folder that training made")
    add(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest, best (lowest validation loss) or a step number; default %(default)s",
    )
    add("--split", choices=("train", "validation"), help="of the text; default validation")
    add(
        "--context",
        metavar="N,N,...",
        help="row lengths to measure the text with, each on the same targets; default: as trained",
    )
    add(
        "--stride",
        type=int,
        metavar="N",
        help="targets counted per row, the tokens before them being context only; default: half "
        "the shortest of several contexts, all of a single one",
    )
    add(
        "--task",
        action="append",
        default=[],
        metavar="SPEC",
        help=f"{' | '.join(tasks.names())}, with dials: recall:pairs=4/8,length=64; a/b asks for "
        "each; may be given again",
    )
    add(
        "--rows",
        type=int,
        default=256,
        metavar="N",
        help="rows of each task; default %(default)s",
    )
    add("--seed", type=int, metavar="N", help="of the tasks' rows; default: one kept from training")
    add("--batch", type=int, metavar="N", help="rows at a time; changes speed, not results")
    add(
        "--window",
        type=int,
        metavar="N",
        help="read a task's rows N tokens at a time and carry the model's state: any length in the "
        "memory of a window",
    )
    add("--limit", type=int, metavar="N", help="at most so many batches of text")
    add("--out", metavar="FILE", help="write all figures as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
