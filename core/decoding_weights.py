"""Weights laid out for decoding. On a CPU nearly all of a step's time goes into reading them.

    python sample.py --init_from=resume --dtype=int8 --compile --user="Hi"

float32 gives the same answers as the plain model. bfloat16 and int8 round the weights, so that an
answer may differ; tests/test_decoding_weights.py says by how much.
"""
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from core.device import pick_dtype


class PackedLinear(nn.Module):
    """nn.Linear, float32 in and out, its weight in `dtype`, in the order in which oneDNN reads it.

    F.linear would lay it out again in each call, which for a few rows is most of the work.
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

    The error of a weight is at most 1/254 of its row's largest.
    """

    def __init__(self, weight, bias, matvec=None):
        super().__init__()
        self.matvec = matvec
        # The largest weight of each row becomes 127.
        weight = weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.weight = (weight / scale).round().to(torch.int8).contiguous()
        self.scale = scale[:, 0]
        # The kernel would round scale.
        self.ones = torch.ones(len(weight), dtype=torch.bfloat16)
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()

    def forward(self, x):
        if len(x) == 1 and self.matvec:
            return self.matvec(x, self.weight, self.scale, self.bias)
        # The kernel reads the weight once for each row.
        if len(x) <= 4:
            y = torch._weight_int8pack_mm(x.bfloat16(), self.weight, self.ones)
        else:
            y = F.linear(x.bfloat16(), self.weight.bfloat16())
        return torch.addcmul(self.bias, y.float(), self.scale)


def int8_matvec(x, weight, scale, bias):
    """The product with one row x. Compiled, it reads the weight once, at the speed of memory."""
    return ((weight.float() * x).sum(1) * scale + bias)[None]


def prepare(model, device, dtype='auto', compiled=False):
    """Change the model in place into one to decode with; returns its dtype's name.

    dtype: auto is bfloat16 on CUDA and float32 elsewhere. On a CPU only the weights of linear
    layers are kept in it: embeddings, norms, attention and sums stay float32.
    """
    if dtype == 'auto' and not device.startswith('cuda'):
        dtype = 'float32'
    if dtype == 'int8' and device != 'cpu':
        raise UserError(f'dtype=int8 is for the CPU, found {device}. Use --dtype=auto.')
    kind = torch.int8 if dtype == 'int8' else pick_dtype(dtype, device)
    if device == 'cpu':
        pack(model, kind, compiled)
    else:
        # cuDNN's attention would be planned anew for every length: 20 to 40 ms a token.
        torch.backends.cuda.enable_cudnn_sdp(False)
        model.to(device, kind)
        for p in model.parameters():
            # transformers' weights come as transposed views.
            p.data = p.data.contiguous()
    model.eval()
    return str(kind).removeprefix('torch.')


def pack(model, kind, compiled):
    """Replace the linear layers, and give the model one for the product with its embedding."""
    matvec = torch.compile(int8_matvec, dynamic=True) if compiled else None

    def convert(name):
        part = model.get_submodule(name)
        bias = getattr(part, 'bias', None)
        if kind == torch.int8:
            return Int8Linear(part.weight, bias, matvec)
        return PackedLinear(part.weight, bias, kind)

    # One thread a matrix: half of the work is the kernel's, handing out memory.
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    n_threads = torch.get_num_threads()
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        unembed = pool.submit(convert, 'transformer.wte')
        for name, linear in zip(names, pool.map(convert, names)):
            model.set_submodule(name, linear)
        model.unembed = unembed.result()
    # The pool's setting would hold for all later threads.
    torch.set_num_threads(n_threads)
