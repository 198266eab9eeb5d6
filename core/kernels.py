"""The same sums, faster: what would be ugly where it is used.

    python bench/training.py

Nothing here changes what is computed; tests/test_kernels.py holds each against the plain way.
"""
import ctypes
import sys
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

# How many logits exist at once. A CPU wants few, to reuse the memory; a GPU enough to fill it.
LOGITS_AT_ONCE = {'cpu': 1 << 25, 'cuda': 1 << 28}


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy in nats of the logits x @ weight.T, without ever holding all of them.

    x (S, C), weight (V, C), targets (S,) int64; logits exist for n_classes <= V of the rows. The
    gradients are made on the way forward, from the probabilities that are there anyway, so that
    neither those nor the logits are kept or computed twice. Computes in autocast's dtype, with the
    softmax and all sums in float32. Idea: Hsu et al. 2024, https://arxiv.org/abs/2410.10989
    """

    @staticmethod
    def forward(ctx, x, weight, targets, n_classes):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        with torch.autocast(kind, enabled=False):
            w, chunk = weight[:n_classes].to(dtype), max(1, LOGITS_AT_ONCE.get(kind, 1 << 25) // n_classes)
            wanted = ctx.needs_input_grad[0]
            grad_x = torch.empty(x.shape, dtype=dtype, device=x.device) if wanted else None
            grad_w = torch.zeros_like(weight) if wanted else None
            loss = x.new_zeros((), dtype=torch.float32)
            for first in range(0, len(x), chunk):
                part, answers = x[first:first + chunk].to(dtype), targets[first:first + chunk]
                log_p = (part @ w.t()).float().log_softmax(-1)  # (chunk, n_classes)
                at = torch.arange(len(part), device=x.device), answers
                loss -= log_p[at].sum()
                if not wanted:
                    continue
                grad = log_p.exp_()
                grad[at] -= 1  # the gradient of the logits: probabilities, less 1 at the target
                grad = grad.to(dtype)
                torch.mm(grad, w, out=grad_x[first:first + chunk])
                if dtype == weight.dtype:
                    grad_w[:n_classes].addmm_(grad.t(), part)
                else:
                    grad_w[:n_classes] += grad.t() @ part
        if wanted:
            ctx.save_for_backward(grad_x, grad_w)
            ctx.x_dtype = x.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x.to(ctx.x_dtype) * grad_loss.to(ctx.x_dtype), grad_w.mul_(grad_loss), None, None


class PackedLinear(nn.Module):
    """nn.Linear for decoding on a CPU: the weight in `dtype`, laid out once as oneDNN reads it best.

    F.linear lays it out anew in each call, which for a few rows is most of the work. What comes in
    and goes out stays float32 (N, in) -> (N, out). The two operators are those that torch's own
    compiler uses; where they are missing, F.linear does it.
    """

    def __init__(self, weight, bias, dtype):
        super().__init__()
        self.weight = weight.detach().to(dtype).contiguous()  # oneDNN is slow at laying out a transposed view
        self.bias = None if bias is None else bias.detach().to(dtype)
        supported = torch.backends.mkldnn.is_available() and (
            dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self.packed = supported and hasattr(torch.ops.mkldnn, '_linear_pointwise')
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)

    def forward(self, x):
        """See above."""
        x = x.to(self.weight.dtype)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '').float()
        return F.linear(x, self.weight, self.bias).float()


class Int8Linear(nn.Module):
    """nn.Linear for decoding on a CPU with each row of the weight as int8 times a scale of its own.

    Half the bytes of bfloat16, and an error of at most 1/254 of the row's largest weight in each.
    float32 (N, in) -> (N, out). compiled: one row by a kernel that torch.compile makes.
    """

    def __init__(self, weight, bias, compiled=False):
        super().__init__()
        self.matvec = _compiled_matvec() if compiled else None
        weight = weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.weight, self.scale = (weight / scale).round().to(torch.int8).contiguous(), scale[:, 0]  # transformers' are views
        self.ones = torch.ones(len(weight), dtype=torch.bfloat16)  # or the kernel would round the scale
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()

    def forward(self, x):
        """See above."""
        if len(x) == 1 and self.matvec:
            return self.matvec(x, self.weight, self.scale, self.bias)
        if len(x) <= 4:  # the kernel reads the weight once for each row
            y = torch._weight_int8pack_mm(x.bfloat16(), self.weight, self.ones)
        else:
            y = F.linear(x.bfloat16(), self.weight.bfloat16())
        return torch.addcmul(self.bias, y.float(), self.scale)


@lru_cache
def _compiled_matvec():
    """x (1, in), weight (out, in) int8, scale and bias (out,) -> (1, out), reading the weight at the memory's speed."""
    def matvec(x, weight, scale, bias):
        return ((weight.float() * x).sum(1) * scale + bias)[None]
    return torch.compile(matvec, dynamic=True)


def keep_freed_memory():
    """Make Linux's malloc keep what is freed for the next tensor, instead of giving it back each time.

    By default each large tensor is mapped anew and zeroed by the kernel a page at a time: a fifth of
    a training step on a CPU. The process never shrinks below its peak.
    """
    if sys.platform == 'linux':
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except AttributeError:  # musl has none
            return
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
        mallopt(M_MMAP_MAX, 0)  # all from the heap, which is reused
        mallopt(M_TRIM_THRESHOLD, -1)  # never give its end back
        mallopt(M_TOP_PAD, 1 << 29)  # and let it grow by 512 MiB at a time
