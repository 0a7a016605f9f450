"""A student and its frozen teacher as one model: what distillation trains.

    Pair(student=Decoder(layers=2), teacher=spec_of("smollm2"), weights="smollm2")

One state, one step, one table of shardings for both: the teacher's parameters are named
`teacher/...`, are cut over devices by the same rules as the student's, take part in no gradient and
cost no optimizer state (`frozen`). To everything that reads, generates or measures the pair is its
student.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
from flax import nnx

from causal_jax.errors import InputError
from causal_jax.models._base import ModelSpec, models
from causal_jax.models.decoder import Cache, Decoder, DecoderModel
from causal_jax.nn.linear import Linear
from causal_jax.shapes import Array, Float, Int
from causal_jax.taps import OFF, Tap


@models.register("pair")
@dataclasses.dataclass(frozen=True)
class Pair(ModelSpec):
    """Two decoders over one vocabulary.

    Attributes:
        student: trained.
        teacher: never trained.
        weights: the teacher's: a run folder, or what `models.pretrained.load` takes. Empty: drawn
            at random (for tests). The student's are `Recipe.start`.
        bridge: a learned linear map from the student's width to the teacher's, to compare hidden
            states of different widths.
        offload: keep the teacher's parameters in the host's memory; a step brings them to the
            devices for the teacher's pass. Costs their transfer, saves their room in the backward
            pass and between steps. What is computed is the same.
    """

    student: Decoder = Decoder()
    teacher: Decoder = Decoder()
    weights: str = ""
    bridge: bool = False
    offload: bool = False

    frozen: ClassVar[str] = "teacher/"

    def __post_init__(self):
        sizes = {n for n in (self.vocab, self.student.vocab, self.teacher.vocab) if n}
        if len(sizes) > 1:
            raise InputError(
                f"model.student.vocab = {self.student.vocab} and model.teacher.vocab = "
                f"{self.teacher.vocab} (model.vocab = {self.vocab}): expected one vocabulary, that "
                "of one tokenizer"
            )
        vocab = sizes.pop() if sizes else 0
        object.__setattr__(self, "vocab", vocab)
        for name in ("student", "teacher"):
            object.__setattr__(self, name, dataclasses.replace(getattr(self, name), vocab=vocab))

    @property
    def on_host(self) -> str:
        """Pattern of the parameters that rest in the host's memory; empty: none do."""
        return self.frozen if self.offload else ""

    @property
    def context(self) -> int:
        """The longest sequence that both are meant for."""
        return min(self.student.context, self.teacher.context)

    @property
    def heads(self) -> int:
        """What a mesh axis must divide to cut both models between heads."""
        return math.gcd(self.student.heads, self.teacher.heads)

    @property
    def kv_heads(self) -> int:
        """The same for key/value heads."""
        return math.gcd(self.student.kv_count, self.teacher.kv_count)

    def build(self, key: jax.Array) -> "PairModel":
        """Both modules with freshly drawn parameters."""
        return PairModel(self, rngs=nnx.Rngs(key))

    def flops_per_token(self, length: int) -> float:
        """The student's step and the teacher's forward pass."""
        return self.student.flops_per_token(length) + self.teacher.flops_per_token(length) / 3.0


class PairModel(nnx.Module):
    """The parameters of a `Pair`; its forward passes are the student's."""

    def __init__(self, spec: Pair, *, rngs: nnx.Rngs):
        self.student = DecoderModel(spec.student, rngs=rngs)
        self.teacher = DecoderModel(spec.teacher, rngs=rngs)
        widths = spec.student.width, spec.teacher.width
        self.bridge = Linear(*widths, rngs=rngs) if spec.bridge else None
        self.offload = spec.offload

    @property
    def spec(self) -> Decoder:
        """The student's."""
        return self.student.spec

    def __call__(self, tokens: Int[Array, "B T"], **kw: Any) -> Float[Array, "B T V"]:
        """The student's logits."""
        return self.student(tokens, **kw)

    def hidden(self, tokens: Int[Array, "B T"], **kw: Any) -> Float[Array, "B T D"]:
        """The student's final hidden states."""
        return self.student.hidden(tokens, **kw)

    def unembed(self, h: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The student's logits of its hidden states."""
        return self.student.unembed(h)

    def init_cache(self, batch: int, length: int, **kw: Any) -> Cache:
        """A cache of the student."""
        return self.student.init_cache(batch, length, **kw)

    def extend(
        self, tokens: Int[Array, "B T"], cache: Cache, *, tap: Tap = OFF
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """The student reads T more tokens."""
        return self.student.extend(tokens, cache, tap=tap)

    def extend_hidden(
        self, tokens: Int[Array, "B T"], cache: Cache, *, tap: Tap = OFF
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """`extend` up to the final norm."""
        return self.student.extend_hidden(tokens, cache, tap=tap)


def on_device(pair: PairModel) -> PairModel:
    """The pair with a teacher that can be computed with, wherever its parameters rest."""
    if not pair.offload:
        return pair
    graph, params = nnx.split(pair.teacher)
    both = nnx.merge(*nnx.split(pair))
    both.teacher = nnx.merge(graph, jax.device_put(params, jax.memory.Space.Device))
    return both


def pair_of(student: DecoderModel, teacher: DecoderModel) -> PairModel:
    """Two models as they are, as one.

    Raises:
        InputError: they have different vocabularies.
    """
    spec = Pair(student=student.spec, teacher=teacher.spec)
    pair = nnx.eval_shape(lambda: spec.build(jax.random.key(0)))
    pair.student, pair.teacher = student, teacher
    return pair
