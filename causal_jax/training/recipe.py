"""The recipe: everything that decides what a run does, as one frozen value."""

import dataclasses
import re

from causal_jax.data.pipeline import Data
from causal_jax.errors import InputError
from causal_jax.models._base import ModelSpec
from causal_jax.objectives._base import Objective
from causal_jax.objectives.next_token import NextToken
from causal_jax.paths import check_pattern
from causal_jax.training.optimizer import AdamW, Optimizer
from causal_jax.training.sharding import MeshSpec


def _at_least(owner: str, cfg: object, **limits: int) -> None:
    for name, limit in limits.items():
        value = getattr(cfg, name)
        if value is not None and value < limit:
            field = f"{owner}.{name}" if owner else name
            raise InputError(f"{field} must be at least {limit}, got {value}")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Validation during and after training.

    Attributes:
        every: steps between validations; 0 validates at the end only.
        batches: at most this many validation batches during training, None for all of them.
        final_batches: the same for the validation after the last step; 0 for none.
        ngrams: at the end, print byte n-gram baselines up to this order beside the bits per byte (0
            for none; left out for more than 16 MiB of text).
    """

    every: int = 200
    batches: int | None = None
    final_batches: int | None = None
    ngrams: int = 5

    def __post_init__(self):
        _at_least("evaluation", self, every=0, batches=1, final_batches=0, ngrams=0)
        if self.ngrams > 7:
            raise InputError(f"evaluation.ngrams must be at most 7, got {self.ngrams}")


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """When the run is saved, and what is kept. The last step is always saved.

    Attributes:
        every: steps between checkpoints; 0 saves at the end (and on a signal) only.
        keep: newest checkpoints to keep.
        keep_best: checkpoints with the lowest validation loss to keep besides.
    """

    every: int = 200
    keep: int = 2
    keep_best: int = 1

    def __post_init__(self):
        _at_least("checkpoint", self, every=0, keep=1, keep_best=0)


@dataclasses.dataclass(frozen=True)
class Report:
    """What is said about a run while it runs.

    Attributes:
        every: steps per line on stdout and per record in metrics.jsonl.
        tensorboard: also write TensorBoard event files (needs tensorboardX).
        profile: steps to record with the JAX profiler, (first, last); () for none.
        peak_flops: of one device, for the utilisation figure; None looks the device up in a table
            (a CPU's is measured).
        plot: draw loss.png at the end.
    """

    every: int = 10
    tensorboard: bool = False
    profile: tuple[int, ...] = ()
    peak_flops: float | None = None
    plot: bool = True

    def __post_init__(self):
        _at_least("report", self, every=1)
        if self.profile and not (
            len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]
        ):
            raise InputError(f"report.profile must be (first, last) step or (), got {self.profile}")
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise InputError(f"report.peak_flops must be positive, got {self.peak_flops}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text to print when training ends.

    Attributes:
        prompt: what the model continues.
        tokens: how many tokens.
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: smallest set of tokens with this probability; 1 for all.
    """

    prompt: str = "\n"
    tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self):
        _at_least("sample", self, tokens=1, temperature=0)
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"sample.top_p must be in (0, 1], got {self.top_p}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run as a value.

    Attributes:
        model: the model.
        data: what it is trained on.
        objective: what it is trained for.
        optimizer: how.
        mesh: on how many devices, and how it is split over them.
        start: weights to begin with instead of random ones: the folder of a run, or what
            `models.pretrained.load` takes (whose spec is `models.pretrained.spec_of`). Parameters
            that only `model` has are drawn.
        steps: optimizer steps.
        seed: of the parameters and of all randomness in the steps.
        accumulate: microbatches per step; the result is that of the whole batch at once.
        trainable: which parameters are trained: a pattern searched for in their names; all others
            stay as they began and cost no optimizer state. Empty: all.
        ema: decay of a moving average of the parameters, which then is what is validated, sampled
            and evaluated; None for none.
        skip: steps in a row whose loss or gradient is not finite that are left out; one more stops
            the run.
        evaluation: validation.
        checkpoint: saving.
        report: lines, records and plots.
        sample: text to print at the end, or None.
        workdir: the run folder; empty for runs/<name of the config>.
    """

    model: ModelSpec
    data: Data = Data()
    objective: Objective = NextToken()
    optimizer: Optimizer = AdamW()
    mesh: MeshSpec = MeshSpec()
    start: str = ""
    steps: int = 1000
    seed: int = 0
    accumulate: int = 1
    trainable: str = ""
    ema: float | None = None
    skip: int = 5
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    report: Report = Report()
    sample: Sample | None = None
    workdir: str = ""

    def __post_init__(self):
        _at_least("", self, steps=1, seed=0, accumulate=1, skip=0)
        check_pattern("trainable", self.trainable)
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise InputError(f"ema must be between 0 and 1, or None, got {self.ema}")
        if self.data.batch % self.accumulate:
            raise InputError(
                f"accumulate = {self.accumulate} must divide data.batch = {self.data.batch}"
            )

    @property
    def trained(self) -> str:
        """The pattern of what is trained: `trainable`, less what the model keeps frozen."""
        frozen = self.model.frozen
        return f"^(?!{re.escape(frozen)}).*?(?:{self.trainable})" if frozen else self.trainable


# Fields that may differ between a run and its continuation; all others decide what is computed.
MAY_CHANGE = (
    "steps",
    "workdir",
    "mesh",
    "accumulate",
    "skip",
    "evaluation",
    "checkpoint",
    "report",
    "sample",
    "data.threads",
    "model.remat",
    "objective.logits_mib",
)
