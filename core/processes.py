"""One process or many, as torchrun starts them; all do the same and add up what they find.

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

import configurator
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
        self._together(dist.all_reduce, tensor)
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
        self._together(dist.all_reduce, flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))

    def wait(self):
        """Until all are here."""
        self._together(dist.barrier)

    def _together(self, call, *arguments):
        try:
            call(*arguments)
        except RuntimeError as error:  # the only sign that another died, or is stuck
            raise Lost(f'process {self.rank} of {self.world} stops: another one ended or did not answer within '
                       f'timeout_s ({str(error).strip().splitlines()[-1][-120:]}). Go on from the last checkpoint with '
                       '--init_from=resume') from None


class Lost(UserError):
    """Another process of the run is gone."""


@contextmanager
def processes(config):
    """Processes, as torchrun's environment says; one alone without it.

    Many end here and do not return: by the interpreter's own exit gloo's threads abort now and then
    ("terminate called without an active exception", 3 times in 36 runs of torch 2.13), after all was
    done and saved.
    """
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
    procs = Processes(rank, world, device)
    procs._together(dist.init_process_group, backend, None, timedelta(seconds=config.timeout_s))
    try:
        yield procs
        procs.wait()  # nobody leaves while another still needs it
        status = 0
    except UserError as error:
        if isinstance(error, Lost):
            print(error, file=sys.stderr)
        else:
            configurator.report(error)
        status = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopRequest:
    """Ctrl-C or SIGTERM: the step is finished and saved; a second one stops at once."""

    def __init__(self, silent):
        self.asked, self.silent = False, silent

    def __enter__(self):
        self.before = {name: signal.signal(name, self.ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        """The signal handler."""
        self.asked = True
        self.__exit__()
        if not self.silent:  # not print, which may be what was interrupted
            os.write(2, b'\n' * os.isatty(2) + b'stopping after this step; once more to stop at once and lose what is not saved\n')

    def __exit__(self, *_):
        for name, handler in self.before.items():
            signal.signal(name, handler)
