"""The booster codec: native LightGBM text, compressed, named by its content."""

import hashlib
from dataclasses import dataclass

import pyarrow as pa

from pipeline.models.meta_model import booster_digest


@dataclass(frozen=True)
class EncodedBooster:
    """A booster as it is stored.

    Args:
        booster_id: hash of the text without its ``parameters:`` section.
        sha256: hash of the whole text.
        n_bytes: size of the text.
        text: the native LightGBM text, zstd-compressed.
    """

    booster_id: str
    sha256: str
    n_bytes: int
    text: bytes


def encode_booster(text: str) -> EncodedBooster:
    """Compress a booster's native text; `meta_model.decode_booster` is its inverse, with checks."""
    raw = text.encode()
    return EncodedBooster(
        booster_id=booster_digest(text),
        sha256=hashlib.sha256(raw).hexdigest(),
        n_bytes=len(raw),
        text=pa.Codec("zstd", compression_level=9).compress(raw, asbytes=True),
    )
