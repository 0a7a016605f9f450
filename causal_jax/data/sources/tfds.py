"""Any text set of tensorflow-datasets by name, from array_record, without TensorFlow."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from causal_jax.data.sources._base import Source, check_split, sources
from causal_jax.data.tokenizers._base import digest
from causal_jax.errors import InputError


@sources.register("tfds")
@dataclass(frozen=True)
class Tfds(Source):
    """A named set, prepared beforehand in `data_dir` or downloaded on first use.

    Args:
        name: as in `tfds.builder`: "tiny_shakespeare", "lm1b", "pg19".
        data_dir: folder of prepared sets; "" is tensorflow-datasets' own default (or
            $TFDS_DATA_DIR).
        field: the text feature.
        train, validation: splits, sub-splits included ("train[:90%]", "train[90%:]").
    """

    name: str = ""
    data_dir: str = ""
    field: str = "text"
    train: str = "train"
    validation: str = "validation"

    def documents(self, split: str) -> Sequence[str]:
        from causal_jax.data._builders import DocumentSequence

        check_split(split)
        builder = self.builder()
        wanted = getattr(self, split)
        features = builder.info.features
        if not hasattr(features, "keys") or self.field not in features:
            has = ", ".join(features) if hasattr(features, "keys") else str(features)
            raise InputError(f"Tfds.field is {self.field!r}; {self.name} has: {has}")
        try:
            records = builder.as_data_source(split=wanted)
        except NotImplementedError as e:
            raise InputError(
                f"Tfds.name = {self.name!r} is prepared without random access ({e}); "
                'prepare it anew with tfds.builder(name, file_format="array_record")'
            ) from None
        except (ValueError, KeyError) as e:
            has = ", ".join(builder.info.splits)
            raise InputError(
                f"Tfds.{split} is {wanted!r}; {self.name} has the splits: {has} ({e})"
            ) from None
        return DocumentSequence(records, self.field, f"{self.name}/{wanted}")

    def builder(self) -> Any:
        """The prepared `tfds.core.DatasetBuilder`."""
        from causal_jax.data._builders import library

        tfds = library()
        if not self.name:
            raise InputError("Tfds.name is empty; give a name such as 'tiny_shakespeare'")
        place = self.data_dir or None
        try:
            builder = tfds.builder(self.name, data_dir=place, file_format="array_record")
        except tfds.core.registered.DatasetNotFoundError:
            near = difflib.get_close_matches(
                self.name, tfds.list_builders(with_community_datasets=False), n=1
            )
            hint = f"; did you mean {near[0]!r}?" if near else ""
            where = f" nor prepared in {self.data_dir!r}" if self.data_dir else ""
            raise InputError(
                f"Tfds.name = {self.name!r} is no set that tensorflow-datasets knows{where}{hint}"
            ) from None
        except (ValueError, RuntimeError) as e:
            raise InputError(f"Tfds.name = {self.name!r}: {e}") from None
        if not builder.data_path.exists():
            self._download(tfds, builder)
        return builder

    def _download(self, tfds: Any, builder: Any) -> None:
        from tensorflow_datasets.core.download import downloader

        # Its ten retries keep a machine without a network waiting for more than three minutes.
        retries, downloader.MAX_RETRIES = getattr(downloader, "MAX_RETRIES", None), 4
        try:
            # Copies in Google's storage need TensorFlow and are not array_record: make it here.
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        except ImportError as e:
            raise InputError(
                f"Tfds.name = {self.name!r}: tensorflow-datasets needs the package {e.name} to "
                f"prepare it: pip install {e.name}"
            ) from None
        except Exception as e:  # the network, the disk, the set's own requirements
            raise InputError(
                f"Tfds.name = {self.name!r} is not prepared under {builder.data_path} and "
                f"could not be downloaded ({type(e).__name__}: {str(e)[:200]}); prepare it where "
                "there is a network and give that folder as Tfds.data_dir"
            ) from None
        finally:
            downloader.MAX_RETRIES = retries

    def fingerprint(self) -> str:
        # The documents may be many millions: name, version and the sizes of the shards stand for
        # them.
        info = self.builder().info
        shards = [(s, list(i.shard_lengths), i.num_bytes) for s, i in sorted(info.splits.items())]
        return digest(info.full_name, self.field, self.train, self.validation, repr(shards))
