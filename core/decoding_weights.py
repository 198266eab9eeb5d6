"""Weights laid out for decoding. On a CPU nearly all of a step's time goes into reading them.

    python sample.py --init_from=resume --dtype=int8 --compile --user="Hi"

float32 gives the same answers as the plain model. bfloat16 and int8 round the weights, so that an
answer may differ; tests/test_decoding_weights.py says by how much.
"""
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from core.device import pick_dtype

DTYPES = ('auto', 'float32', 'bfloat16', 'float16', 'int8')


class PackedLinear(nn.Module):
    """nn.Linear with the weight in `dtype`, laid out once in the order oneDNN reads it.

    F.linear lays it out again in each call, which for a few rows is most of the work. float32 goes
    in and out: (N, in) -> (N, out). torch's own compiler uses the same operators.
    """

    def __init__(self, weight, bias, dtype):
        super().__init__()
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.packed = torch.backends.mkldnn.is_available() and (
            dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)

    def forward(self, x):
        x = x.to(self.weight.dtype)
        if not self.packed:
            return F.linear(x, self.weight, self.bias).float()
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(x, self.weight, self.bias, 'none', [], '').float()


class Int8Linear(nn.Module):
    """nn.Linear with each row of the weight as int8 times its own scale.

    Half the bytes of bfloat16. The error of a weight is at most 1/254 of its row's largest.
    compiled: one row at a time goes through a kernel that torch.compile makes.
    """

    def __init__(self, weight, bias, compiled=False):
        super().__init__()
        self.compiled = compiled
        # The largest weight of each row becomes 127.
        weight = weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.weight = (weight / scale).round().to(torch.int8).contiguous()
        self.scale = scale[:, 0]
        # The kernel would round scale.
        self.ones = torch.ones(len(weight), dtype=torch.bfloat16)
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()

    def forward(self, x):
        if len(x) == 1 and self.compiled:
            return compiled_matvec()(x, self.weight, self.scale, self.bias)
        # The kernel reads the weight once for each row.
        if len(x) <= 4:
            y = torch._weight_int8pack_mm(x.bfloat16(), self.weight, self.ones)
        else:
            y = F.linear(x.bfloat16(), self.weight.bfloat16())
        return torch.addcmul(self.bias, y.float(), self.scale)


@lru_cache
def compiled_matvec():
    """A function that reads the weight (out, in) int8 once, at the speed of memory."""
    def matvec(x, weight, scale, bias):
        return ((weight.float() * x).sum(1) * scale + bias)[None]
    return torch.compile(matvec, dynamic=True)


def prepare(model, device, dtype='auto', compiled=False):
    """Change the model in place into one to decode with; returns its dtype's name.

    dtype: one of DTYPES; auto is bfloat16 on CUDA and float32 elsewhere. On a CPU only the weights
    of linear layers are kept in it: embeddings, norms, attention and sums stay float32.
    """
    # On a CPU bfloat16 would round the answers for little speed: it has to be asked for.
    if dtype == 'auto' and not device.startswith('cuda'):
        dtype = 'float32'
    if dtype == 'int8' and device != 'cpu':
        raise UserError(f'dtype=int8 is for the CPU, found {device}. Use --dtype=auto.')
    kind = torch.int8 if dtype == 'int8' else pick_dtype(dtype, device)
    if device != 'cpu':
        # cuDNN's attention would be planned anew for every length: 20 to 40 ms a token.
        torch.backends.cuda.enable_cudnn_sdp(False)
        model.to(device, kind).eval()
        for p in model.parameters():
            # transformers' weights come as transposed views.
            p.data = p.data.contiguous()
        return str(kind).removeprefix('torch.')

    def convert(weight, bias):
        if kind == torch.int8:
            return Int8Linear(weight, bias, compiled)
        return PackedLinear(weight, bias, kind)

    # One thread a matrix: half of the work is the kernel's, handing out memory.
    n_threads = torch.get_num_threads()
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        unembed = pool.submit(convert, model.transformer.wte.weight, None)
        converted = []
        for block in model.transformer.h:
            for part in (block.attn, block.mlp):
                for name, linear in part.items():
                    future = pool.submit(convert, linear.weight, linear.bias)
                    converted.append((part, name, future))
        for part, name, future in converted:
            part[name] = future.result()
        model.unembed = unembed.result()
    # The pool's setting would hold for all later threads.
    torch.set_num_threads(n_threads)
    model.eval()
    return str(kind).removeprefix('torch.')
