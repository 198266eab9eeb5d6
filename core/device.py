"""Where to compute, and in which precision."""
import ctypes
import sys

import torch

from configurator import UserError


def pick_device(name):
    """'auto' -> cuda, mps or cpu, whichever is there first. UserError for one that is not."""
    available = ['cpu']
    if torch.backends.mps.is_available():
        available.insert(0, 'mps')
    if torch.cuda.is_available():
        available.insert(0, 'cuda')
    if name == 'auto':
        name = available[0]
    numbered = [f'cuda:{i}' for i in range(torch.cuda.device_count())]
    if name not in available + numbered:
        raise UserError(f'device={name!r} is not on this machine; it has '
                        f'{", ".join(available)}. Use --device=auto.')
    if name in numbered:
        torch.cuda.set_device(name)
    if name.startswith('cuda'):
        torch.set_float32_matmul_precision('high')  # TF32 for what stays in float32
    return name


def pick_dtype(name, device):
    """The torch dtype of matrix products; 'auto' is the fastest that the hardware has."""
    cuda = device.startswith('cuda')
    if name == 'float16' and not cuda:
        raise UserError(f'dtype=float16 needs a CUDA device, found {device}. Use --dtype=auto.')
    if name != 'auto':
        return getattr(torch, name)
    if cuda:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    found = torch.cpu.get_capabilities()
    native = found.get('avx512_bf16') or found.get('amx_bf16')
    return torch.bfloat16 if device == 'cpu' and native else torch.float32


def autocast(device, dtype):
    """The context to compute in: weights stay float32, matrix products are in dtype."""
    return torch.autocast(device.split(':')[0], dtype, enabled=dtype != torch.float32)


def keep_freed_memory():
    """Make glibc keep freed memory for the next tensor: a fifth of a step on a CPU.

    By default it maps and zeroes each large tensor anew. The process never shrinks.
    """
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)        # M_MMAP_MAX: take everything from the heap
        libc.mallopt(-1, -1)       # M_TRIM_THRESHOLD: never give its end back
        libc.mallopt(-2, 1 << 29)  # M_TOP_PAD: let it grow by 512 MiB at a time
