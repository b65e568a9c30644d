"""Copies of a training's state in the host's memory.

The memory is taken once, in one piece, and exactly as much as the state needs: PyTorch's own allocator of pinned memory
rounds every size up to a power of two, and its stagers for checkpoints differ from release to release.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from minitron.engines.hf.sharding import make_mesh

_ALIGNMENT = 64
"""Bytes; those of a cache line."""


class StateCopies:
    """Copies of tensors, or of this process's shares of them; a copy from a GPU goes to pinned memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Take the memory now, because taking it lasts longer than a copy."""
        self._shares = {name: _get_share(tensor) for name, tensor in tensors.items()}
        sizes = [-(-share.nbytes // _ALIGNMENT) * _ALIGNMENT for share in self._shares.values()]
        self._memory = torch.zeros(sum(sizes), dtype=torch.uint8)
        self._is_pinned = any(share.is_cuda for share in self._shares.values())
        if self._is_pinned:
            cuda = torch.cuda.cudart()
            torch.cuda.check_error(cuda.cudaHostRegister(self._memory.data_ptr(), self._memory.nbytes, 0))
        self._copies = {
            name: _wrap(_view_as(part[: self._shares[name].nbytes], self._shares[name]), tensor)
            for (name, tensor), part in zip(tensors.items(), self._memory.split(sizes), strict=True)
        }

    def update(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy the tensors as they are now; return the copies, which the next update overwrites.

        One thread copies: threads that meet after every tensor take 8 times as long if the cores are busy.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for name in names:
            _get_share(self._copies[name]).copy_(self._shares[name], non_blocking=self._is_pinned)
        torch.set_num_threads(threads)
        if self._is_pinned:
            torch.cuda.synchronize()
        return {name: self._copies[name] for name in names}

    def release(self) -> None:
        """Let the memory be swapped again; the copies stay."""
        if self._is_pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
            self._is_pinned = False


def _get_share(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _view_as(part: Tensor, share: Tensor) -> Tensor:
    """Return a part of the memory as a tensor with a storage of its own: writers copy what has a larger storage."""
    if not len(part):  # a process may have no row of a small tensor
        return torch.empty_like(share, device="cpu")
    return torch.frombuffer(part.numpy(), dtype=share.dtype).view(share.shape)


def _wrap(copy: Tensor, tensor: Tensor) -> Tensor:
    """Return a process's copy as a part of the whole tensor, if it is one."""
    if not isinstance(tensor, DTensor):
        return copy
    mesh = make_mesh("cpu")  # one of GPUs would move the copy to them
    return DTensor.from_local(
        copy, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
