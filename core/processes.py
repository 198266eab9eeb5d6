"""One process or many, as torchrun starts them, and signals that ask a run to stop.

    torchrun --standalone --nproc_per_node=2 train.py config/finetune_oasst.py
"""
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    works: list = field(default_factory=list)  # sums of gradients that are under way

    def sum(self, *numbers):
        """The sum of each number over all processes, a list of floats."""
        tensor = torch.tensor(numbers, dtype=torch.float64, device='cpu')
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor.tolist()

    def wrap(self, model):
        """A module that maps a Batch to its loss, and sums the gradients of all processes."""
        # DDP averages gradients; the hook below makes it a sum.
        module = LossModule(model)
        if self.world > 1:
            module = DistributedDataParallel(module, gradient_as_bucket_view=True)
            module.register_comm_hook(self.works, sum_gradients)
        return module

    def wait(self):
        """Wait until the gradients are summed, timeout_s at most.

        Without this, reading the loss from a GPU would wait for a lost process forever.
        """
        while self.works:
            self.works.pop(0).wait()


class LossModule(nn.Module):
    """DistributedDataParallel works on a module's forward; ours is the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)


def sum_gradients(works, bucket):
    """Communication hook: the sum, where DDP divides by the number of processes.

    A step divides by its number of supervised tokens instead, see trainer.py.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    works.append(work)
    return work.get_future().then(lambda future: future.value()[0])


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
    if device == 'mps':
        raise UserError('torchrun needs CUDA or --device=cpu: a Mac has one GPU. '
                        'Run without torchrun.')
    backend = 'gloo'
    device_id = None
    if device.startswith('cuda'):
        # One GPU each, whichever --device names. With the variable, wait() notices a lost process.
        backend = 'nccl'
        os.environ['TORCH_NCCL_BLOCKING_WAIT'] = '1'
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        device_id = torch.device(device)
    status = 2
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout_s),
                                device_id=device_id)
        yield Processes(int(os.environ['RANK']), world, device)
        # Nobody leaves while another still needs it.
        dist.barrier()
        status = 0
    except UserError as error:
        configurator.report(error)
    except RuntimeError as error:
        # The only sign that another process ended or hangs.
        if not isinstance(error, dist.DistError) and 'gloo' not in str(error):
            raise
        print('another process ended or did not answer within timeout_s. Go on from the last '
              'checkpoint with --init_from=resume', file=sys.stderr)
    # Not by way of the interpreter's exit, where gloo's threads abort now and then (torch 2.13).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopRequest:
    """Ctrl-C or SIGTERM: finish the step, save and stop. A second one stops at once."""

    def __init__(self, silent):
        self.asked = False
        self.silent = silent
        self.before = {}
        for name in (signal.SIGINT, signal.SIGTERM):
            self.before[name] = signal.signal(name, self.ask)

    def ask(self, number, frame):
        """The signal handler."""
        self.asked = True
        for name, handler in self.before.items():
            signal.signal(name, handler)
        if not self.silent:
            # Not print, which may be what was interrupted.
            os.write(2, b'\nstopping after this step; once more to stop at once, without saving\n')
