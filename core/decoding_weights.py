"""Weights laid out for decoding: on a CPU, reading them takes nearly all of the time.

    python sample.py --init_from=resume --dtype=int8 --user="Hi"

float32 gives the same answers as the plain model. bfloat16 and int8 round the weights, so
that an answer may differ; tests/test_decoding_weights.py says by how much.
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from core.device import pick_dtype


class PackedLinear(nn.Module):
    """nn.Linear, float32 in and out, its weight laid out once as oneDNN reads it.

    F.linear would lay it out in each call, which for a few rows is most of the work.
    """

    def __init__(self, weight, bias, dtype):
        super().__init__()
        self.dtype = dtype
        weight = weight.detach().to(dtype).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x):
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(x.to(self.dtype), self.weight, self.bias, 'none', [], '').float()


class Int8Linear(nn.Module):
    """nn.Linear, each row of its weight as int8 times a scale: off by at most 1/254."""

    def __init__(self, weight, bias):
        super().__init__()
        # The largest weight of each row becomes 127.
        weight = weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.weight = (weight / scale).round().to(torch.int8).contiguous()
        self.scale = scale[:, 0]
        # The kernel would round scale.
        self.ones = torch.ones(len(weight), dtype=torch.bfloat16)
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()

    def forward(self, x):
        x = x.bfloat16()
        # The kernel's time grows with the rows. For more, unpacking the weight is faster.
        if len(x) <= 16:
            y = torch._weight_int8pack_mm(x, self.weight, self.ones)
        else:
            y = F.linear(x, self.weight.bfloat16())
        return torch.addcmul(self.bias, y.float(), self.scale)


def prepare(model, device, dtype='auto'):
    """Change the model in place into one to decode with; returns its dtype's name.

    dtype: auto is bfloat16 on CUDA and float32 elsewhere. On a CPU only the weights of
    linear layers are in it: embeddings, norms, attention and sums stay float32.
    """
    if dtype == 'int8' and device != 'cpu':
        raise UserError(f'dtype=int8 is for the CPU, found {device}. Use --dtype=auto.')
    if dtype == 'auto' and not device.startswith('cuda'):
        dtype = 'float32'
    kind = torch.int8 if dtype == 'int8' else pick_dtype(dtype, device)
    linear = None
    if kind == torch.int8:
        linear = Int8Linear
    elif (device == 'cpu' and torch.backends.mkldnn.is_available()
          and (kind == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())):
        linear = partial(PackedLinear, dtype=kind)
    if linear:
        for name, part in list(model.named_modules()):
            if isinstance(part, nn.Linear):
                model.set_submodule(name, linear(part.weight, part.bias))
        model.unembed = linear(model.transformer.wte.weight, None)
    else:
        # cuDNN's attention would be planned anew for every length: 20 to 40 ms a token.
        torch.backends.cuda.enable_cudnn_sdp(False)
        model.to(device, kind)
        for p in model.parameters():
            # transformers' weights come as transposed views.
            p.data = p.data.contiguous()
    model.eval()
    return str(kind).removeprefix('torch.')
