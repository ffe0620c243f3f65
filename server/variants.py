"""Smaller forms of a model for modest hardware: `variants/` of a release.

They are offered, never assumed to be faster: each host measures before it serves one. Both keep
float32 inputs and outputs, so that a host can take one in place of the other.
"""

import tempfile
from pathlib import Path

# Matrix products with fewer weights than this gain nothing: calling them costs more.
_LEAST_WEIGHTS = 4096


def make_variants(model: bytes, *, num_parameters: int) -> dict[str, bytes]:
    """Variants of an ONNX model by path inside a release; none for a small model.

    Args:
        model: The ONNX model.
        num_parameters: How many weights it has.

    Returns:
        `variants/int8.onnx`: weights as 8-bit integers, scaled at run time.
    """
    if num_parameters < _LEAST_WEIGHTS:
        return {}
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="fedward-variant-") as folder:
        source, target = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model)
        quantize_dynamic(source, target, weight_type=QuantType.QInt8)
        return {"variants/int8.onnx": target.read_bytes()}
