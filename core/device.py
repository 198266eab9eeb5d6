"""Where to compute, and in which precision."""
import ctypes
import sys
from contextlib import nullcontext

import torch

from configurator import UserError


def pick_device(name):
    """'auto' -> cuda, mps or cpu, whichever is there first. UserError for one that is not."""
    # The best one first.
    available = ['cpu']
    if torch.backends.mps.is_available():
        available.insert(0, 'mps')
    if torch.cuda.is_available():
        available.insert(0, 'cuda')
    if name == 'auto':
        name = available[0]
    # cuda:1 is the second GPU.
    kind, _, number = name.partition(':')
    n_devices = torch.cuda.device_count() if kind == 'cuda' else 1
    if kind not in available or number and not (number.isdigit() and int(number) < n_devices):
        raise UserError(f'device={name!r} is not on this machine; it has {", ".join(available)}. '
                        'Use --device=auto.')
    if kind == 'cuda':
        # set_device refuses a plain 'cuda', which is the current device anyway.
        if number:
            torch.cuda.set_device(name)
        # TF32 for what stays in float32.
        torch.set_float32_matmul_precision('high')
    return name


def pick_dtype(name, device):
    """The torch dtype of matrix products. 'auto' is bfloat16 where the hardware computes in it."""
    kind = device.split(':')[0]
    if name == 'float16' and kind != 'cuda':
        raise UserError(f'dtype=float16 needs a CUDA device, found {kind}. Use --dtype=auto.')
    if name != 'auto':
        return getattr(torch, name)
    if kind == 'cuda':
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if kind == 'cpu':
        found = torch.cpu.get_capabilities()
        if found.get('avx512_bf16') or found.get('amx_bf16'):
            return torch.bfloat16
    return torch.float32


def autocast(device, dtype):
    """The context to compute in: weights stay float32, matrix products are in dtype."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.split(':')[0], dtype)


def keep_freed_memory():
    """Make glibc's malloc keep freed memory for the next tensor instead of giving it back.

    By default each large tensor is mapped and zeroed anew, which is a fifth of a training step on
    a CPU. The price: the process never shrinks below its peak.
    """
    if sys.platform != 'linux':
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # musl has none
    if mallopt:
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
        # Everything comes from the heap, which is reused.
        mallopt(M_MMAP_MAX, 0)
        # Never give the end of the heap back.
        mallopt(M_TRIM_THRESHOLD, -1)
        # Let the heap grow by 512 MiB at a time.
        mallopt(M_TOP_PAD, 1 << 29)
