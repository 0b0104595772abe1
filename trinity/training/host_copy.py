"""What the host wants to know of a device, read in one piece while the device goes on working."""

import torch
from torch import Tensor


class HostCopy:
    """Tensors on their way to the host, all in one copy.

    The copy is asked for when this is made and waits for whatever the device has been given so far. What it is given
    afterwards, it works on while the host waits for the copy: so the wait costs the device nothing, as long as that
    work takes longer than the host needs to go on.

    Args:
        tensors: on one device, by name; floating point, or integers below 2⁵³.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._values = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])
        self._arrived: torch.cuda.Event | None = None
        if self._values.is_cuda:
            # a copy that the host need not wait for must end in pinned memory
            pinned = torch.empty_like(self._values, device="cpu", pin_memory=True)
            self._values = pinned.copy_(self._values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> dict[str, Tensor]:
        """The tensors by name, float64 on the CPU, in their shapes."""
        if self._arrived is not None:
            self._arrived.synchronize()
        parts = self._values.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts)}
