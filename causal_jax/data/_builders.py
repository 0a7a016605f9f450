"""The embedded texts as tensorflow-datasets builders: array_record, without TensorFlow."""

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causal_jax.data._cache import made_once
from causal_jax.errors import InputError


def library() -> Any:
    """The module tensorflow_datasets (it does not import TensorFlow)."""
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as e:
        raise InputError(
            f'this source needs the package {e.name}: pip install "causal_jax[data]"'
        ) from None
    return tfds


class DocumentSequence(Sequence[str]):
    """The text field of an array_record data source, decoded when asked for."""

    def __init__(self, records: Any, field: str, where: str):
        self._records, self._field, self._where = records, field, where

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        data = self._records[index % len(self)][self._field]
        try:
            return data.decode("utf-8") if isinstance(data, bytes) else str(data)
        except UnicodeDecodeError as e:
            raise InputError(
                f"{self._where}, record {index}: not UTF-8 text (byte {e.start} is "
                f"0x{e.object[e.start]:02x})"
            ) from None


def embedded(name: str, about: str, key: str, splits: dict[str, list[tuple[str, str]]]) -> Any:
    """A prepared builder of (title, text) documents, made on first use in the cache folder.

    Args:
        name: dataset name; `tfds.builder(name, data_dir=...)` finds it afterwards.
        about: one line of description.
        key: fingerprint of the content, part of the folder's name.
        splits: documents of each split, in their order.
    """
    tfds = library()

    class Documents(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")
        # Nothing is downloaded, so there are no checksums to look for beside the code (and the
        # search needs a package that tensorflow-datasets does not declare).
        code_path = None

        def _info(self):
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                description=about,
                features=tfds.features.FeaturesDict({"title": text, "text": text}),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(docs) for split, docs in splits.items() if docs}

        def _generate_examples(self, documents):
            for i, (title, text) in enumerate(documents):
                yield i, {"title": title, "text": text}

    Documents.name = name

    def make(folder: Path) -> None:
        with quiet(tfds):
            Documents(data_dir=folder, file_format="array_record").download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )

    folder = made_once(f"datasets/{name}-{key[:16]}", make)
    return tfds.builder_from_directory(folder / name / "1.0.0")


@contextlib.contextmanager
def quiet(tfds: Any):
    """No progress bars, prints or log lines for work that takes a fraction of a second."""
    from tensorflow_datasets.core.utils import tqdm_utils

    log = logging.getLogger("absl")
    shown, level = getattr(tqdm_utils, "_active", True), log.level
    tfds.disable_progress_bar()
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(shown)
        log.setLevel(level)
