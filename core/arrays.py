"""Arrays in files, read without ever unpickling."""

import json
import zipfile
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

MAX_GOLDEN_ROWS = 1024
_NPY_1_0 = (1, 0)
_SAFETENSORS_START = 8  # bytes of the header's length, little-endian


def write_golden(inputs: NDArray[np.float32], outputs: NDArray[np.float32]) -> bytes:
    """`golden.npz`: `inputs` float32 `(n, fields)` and `outputs` float32 `(n, outputs)`."""
    buffer = BytesIO()
    np.savez(buffer, inputs=inputs.astype("<f4"), outputs=outputs.astype("<f4"))
    return buffer.getvalue()


def read_golden(data: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The inputs and outputs of a `golden.npz`.

    Raises:
        ValueError: It is not such a file: anything but two uncompressed float32 matrices, so a
            pickle or a compressed bomb too.
    """
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            return _matrix(archive, "inputs.npy"), _matrix(archive, "outputs.npy")
    except (
        ValueError,
        KeyError,
        OSError,
        EOFError,
        NotImplementedError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"golden.npz is malformed: {error}") from error


def check_safetensors(data: bytes) -> None:
    """Check that `data` is a safetensors file: a length, a JSON header, and raw numbers.

    Raises:
        ValueError: It is not; a pickle under this name never is.
    """
    length = int.from_bytes(data[:_SAFETENSORS_START], "little")
    body = len(data) - _SAFETENSORS_START - length
    try:
        header = json.loads(data[_SAFETENSORS_START : _SAFETENSORS_START + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError("model.safetensors is not a safetensors file") from error
    if body < 0 or max(ends, default=0) != body:
        raise ValueError("model.safetensors: its header does not cover the file")


def _matrix(archive: zipfile.ZipFile, name: str) -> NDArray[np.float32]:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed")
    data = archive.read(name)
    file = BytesIO(data)
    if np.lib.format.read_magic(file) != _NPY_1_0:
        raise ValueError("an array is not in format 1.0")
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.dtype("<f4") or by_column:
        # An array of objects would be a pickle.
        raise ValueError(f"an array is {dtype} and not row-major float32")
    rows, columns = shape if len(shape) == 2 else (0, 0)  # noqa: PLR2004 (a matrix)
    if (
        not 1 <= rows <= MAX_GOLDEN_ROWS
        or rows * columns * dtype.itemsize != len(data) - file.tell()
    ):
        raise ValueError(f"an array of shape {shape} has too many or too few rows or bytes")
    return np.frombuffer(data, np.float32, offset=file.tell()).reshape(rows, columns)
