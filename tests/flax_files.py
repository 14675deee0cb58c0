"""Files as flax.serialization writes them, in its msgpack format, for the readers' tests."""

from __future__ import annotations

import msgpack
import numpy as np


def array_bytes(x: np.ndarray) -> bytes:
    return msgpack.packb((x.shape, x.dtype.name, x.tobytes()), use_bin_type=True)


def flax_default(x):
    if isinstance(x, np.ndarray):
        return msgpack.ExtType(1, array_bytes(x))
    if isinstance(x, np.generic):
        return msgpack.ExtType(3, array_bytes(np.asarray(x)))
    if isinstance(x, complex):
        return msgpack.ExtType(2, msgpack.packb((x.real, x.imag)))
    raise TypeError(type(x))


def flax_bytes(tree) -> bytes:
    return msgpack.packb(tree, default=flax_default, strict_types=True)


def nested(flat: dict) -> dict:
    tree: dict = {}
    for path, x in flat.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = x
    return tree


def chunked(x: np.ndarray, size: int) -> dict:
    pieces = [x.reshape(-1)[i : i + size] for i in range(0, x.size, size)]
    numbered = [{str(i): y for i, y in enumerate(items)} for items in (x.shape, pieces)]
    return {"__msgpack_chunked_array__": True, "shape": numbered[0], "chunks": numbered[1]}
