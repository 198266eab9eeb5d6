"""One process or many, as torchrun starts them, and signals that ask a run to stop.

    torchrun --standalone --nproc_per_node=2 train.py config/finetune_oasst.py
"""
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import configurator
from configurator import UserError
from core.device import pick_device


@dataclass(frozen=True)
class Processes:
    """This process among all that train together, and where it computes."""
    rank: int
    world: int
    device: str

    def sum(self, *numbers):
        """The sum of each number over all processes, a list of floats."""
        tensor = torch.tensor(numbers, dtype=torch.float64, device='cpu')
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor.tolist()

    def wrap(self, model):
        """A module that maps a Batch to its loss. Gradients become the mean of all processes'."""
        module = LossModule(model)
        if self.world > 1:
            module = DistributedDataParallel(module, gradient_as_bucket_view=True)
        return module


class LossModule(nn.Module):
    """DistributedDataParallel works on a module's forward; ours is the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)


@contextmanager
def processes(config):
    """The Processes that torchrun's environment describes; one alone without torchrun."""
    world = int(os.environ.get('WORLD_SIZE', 1))
    device = pick_device(config.device)
    if world == 1:
        yield Processes(0, 1, device)
        return
    if config.gradient_accumulation_steps % world:
        raise UserError(f'gradient_accumulation_steps={config.gradient_accumulation_steps} cannot '
                        f'be shared equally by {world} processes. Use a multiple of {world}.')
    backend = 'gloo'
    device_id = None
    if device.startswith('cuda'):
        # One GPU each, whichever --device names.
        backend = 'nccl'
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        device_id = torch.device(device)
    status = 2
    try:
        timeout = timedelta(seconds=config.timeout_s)
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        yield Processes(int(os.environ['RANK']), world, device)
        # Nobody leaves while another still needs it.
        dist.barrier()
        status = 0
    except UserError as error:
        configurator.report(error)
    except RuntimeError as error:
        # The only sign that another process ended or hangs. With nccl, torch's watchdog ends us.
        if not isinstance(error, dist.DistError) and 'gloo' not in str(error):
            raise
        print('another process ended or did not answer within timeout_s. Go on from the '
              'last checkpoint with --init_from=resume', file=sys.stderr)
    # Not by way of the interpreter's exit, where gloo's threads abort now and then (torch 2.13).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopRequest:
    """Ctrl-C or SIGTERM: finish the step, save and stop. A second one stops at once."""

    def __init__(self, silent):
        self.asked = False
        self.silent = silent
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, frame):
        """The signal handler."""
        self.asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not self.silent:
            # Not print, which may be what was interrupted.
            os.write(2, b'\nstopping after this step; once more to stop at once, without saving\n')
