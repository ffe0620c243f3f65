"""Where a site trains: on its GPU if it has one, or as its file says."""

import torch

from fedward.core.errors import ConfigError


def choose_device(asked: str, *, file: str, simulated: bool = False) -> torch.device:
    """The device of a site's training.

    Noise does not depend on it: it is drawn on the processor from the site's own source, added
    there to the sum of clipped gradients, and only then copied to the device.

    Args:
        asked: "auto", "cpu", "cuda" or "cuda:1"; see `[site] device`.
        file: The site file, for an error.
        simulated: A simulated site repeats its bits, so "auto" is the processor.

    Raises:
        ConfigError: There is no such device here.
    """
    if asked == "auto":
        asked = "cuda" if not simulated and torch.cuda.is_available() else "cpu"
    device = torch.device(asked)
    if device.type != "cuda":
        return device
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= found:
        raise ConfigError(
            f'= "{asked}" is not on this machine, where torch {torch.__version__} finds {found} '
            'CUDA devices; use "auto" or "cpu", or install a build of torch for the GPU and its '
            "driver",
            file=file,
            key="[site] device",
        )
    # Norms and sums of gradients are computed apart: with ten bits of precision, as TF32 has
    # them, a clipped gradient could be longer than the bound by a part in a thousand.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return device
