"""Turn the attention of a pretrained decoder into gated linear attention, in two stages.

    student = linearize(model, None, key=key)          every layer a `Lawcat`, still the teacher
    ... train r"attention/lawcat/" with AttentionTransfer()              stage one
    student = untaught(student)                        now the students are at work
    ... train r"attention/lawcat/|lora_" with NextToken()                stage two

In stage one each layer's student imitates the softmax attention on the teacher's own stream; the
model as a whole is the teacher, to the bit. `linearized` and `untaught` also take a `Decoder` spec
and then give one: that is how a config says it (`configs/linearize_smollm2.py`), with
`Recipe.start` as the teacher. LAWCAT, arXiv 2509.18467; LoLCATs, arXiv 2410.10254.
"""

import dataclasses
from typing import Any, TypeVar

import jax

from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder, DecoderModel
from causal_jax.nn.lawcat import Lawcat
from causal_jax.nn.mixer import MixerSpec
from causal_jax.surgery import Layers, layers_of, rebuilt, shortest_period

M = TypeVar("M", Decoder, DecoderModel)


def linearized(spec: Decoder, layers: Layers = None, student: Lawcat | None = None) -> Decoder:
    """The decoder in which some layers are students of what they were.

    Args:
        spec: of the teacher.
        layers: a layer, several, or None for all; the others stay as they are.
        student: hyperparameters; None: `Lawcat(teach=True)`, ready for stage one. Its `teacher` is
            filled in, layer by layer.

    Raises:
        InputError: a layer that does not exist, or that is linear already.
    """
    student = Lawcat(teach=True) if student is None else student
    chosen = list(spec.layer_specs())
    for layer in layers_of(layers, spec.layers):
        if isinstance(chosen[layer], MixerSpec):
            raise InputError(
                f"linearize: layer {layer} is no attention any more, it is {chosen[layer]}"
            )
        chosen[layer] = dataclasses.replace(student, teacher=chosen[layer])
    return dataclasses.replace(spec, attention=shortest_period(chosen))


def linearize(
    model: DecoderModel,
    layers: Layers = None,
    student: Lawcat | None = None,
    *,
    key: jax.Array,
) -> DecoderModel:
    """The model in which some layers are students of what they were; see `linearized`.

    All of the teacher's parameters are kept (and shared, where stacks stay whole); what the
    students have of their own is drawn. With `student.teach` it computes what the teacher does.

    Args:
        key: for the gates' small random start.

    Raises:
        InputError: as `linearized`.
    """
    return rebuilt(model, linearized(model.spec, layers, student), key)


def untaught(model: M) -> M:
    """The model (or spec) after stage one: the students' output goes on.

    Raises:
        InputError: no layer is being taught.
    """
    given: Any = model
    spec: Decoder = given.spec if isinstance(given, DecoderModel) else given
    check_taught(spec)
    chosen = [
        dataclasses.replace(s, teach=False) if isinstance(s, Lawcat) else s
        for s in spec.layer_specs()
    ]
    new = dataclasses.replace(spec, attention=shortest_period(chosen))
    out: Any = rebuilt(given, new) if isinstance(given, DecoderModel) else new
    return out


def check_taught(spec: Decoder) -> None:
    """Refuse a decoder in which no layer is being taught.

    Raises:
        InputError: there is none.
    """
    if not any(isinstance(s, Lawcat) and s.teach for s in spec.layer_specs()):
        raise InputError(
            f"attention {spec.attention}: no layer is being taught (stage one needs "
            "Lawcat(teach=True), made by `linearize`, and comes before stage two)"
        )
