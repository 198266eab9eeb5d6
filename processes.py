"""One process or many, as torchrun starts them; all do the same and add up what they find.

    torchrun --standalone --nproc_per_node=2 train.py config/finetune_oasst.py
"""
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configurator import UserError
from model import pick_device


@dataclass(frozen=True)
class Processes:
    """This process among all that train together, and where it computes."""
    rank: int
    world: int
    device: str

    def sum(self, numbers):
        """The sums of everybody's numbers, a list of floats."""
        if self.world == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()


    def sum_gradients(self, model):
        """Sum the gradients over the processes, in one call; a process that had no row brings zeros.

        Not DistributedDataParallel: it divides by the number of processes, where a step must divide
        by the number of supervised tokens, and it waits for ever for one that has nothing to do.
        """
        if self.world == 1:
            return
        for p in model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in model.parameters()]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


@contextmanager
def processes(config):
    """Processes, as torchrun's environment says; one alone without it."""
    world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
    device = pick_device(config.device)
    if config.gradient_accumulation_steps % world:
        raise UserError(f'gradient_accumulation_steps={config.gradient_accumulation_steps} cannot be shared '
                        f'equally among {world} processes. Use a multiple of {world}.')
    if world == 1:
        yield Processes(0, 1, device)
        return
    if device == 'cuda':
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend = ('nccl' if device.startswith('cuda') else 'gloo') if config.backend == 'auto' else config.backend
    dist.init_process_group(backend)
    try:
        yield Processes(rank, world, device)
        dist.barrier()  # nobody leaves while another still needs it
    finally:
        dist.destroy_process_group()
    # Not the interpreter's own exit: gloo's threads abort it now and then ("terminate called without
    # an active exception", 3 times in 36 runs of torch 2.13), after all was done and saved.
    sys.stdout.flush()
    os._exit(0)
