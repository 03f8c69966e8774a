"""A run put together: one process's step, validation and loop, and what makes them one of several processes'."""

from __future__ import annotations

from pvae.runtime import Processes, Stop
from pvae.svi.checkpointer import Checkpointer
from pvae.svi.distributed_step import make_passes
from pvae.svi.run import Run
from pvae.svi.settings import Settings
from pvae.svi.step import Step
from pvae.svi.trainable import Trainable
from pvae.svi.validation import Validation

__all__ = ["start_run"]


def start_run(pair: Trainable, settings: Settings, checkpointer: Checkpointer, processes: Processes, stop: Stop) -> Run:
    """Makes a run that stands where it begins or goes on; in the block in which the pair is isolated.

    Args:
        pair: What is trained on what.
        settings: What is asked for.
        checkpointer: What keeps the run, and knows where it goes on.
        processes: Those that train together.
        stop: Whether this process was asked to stop.

    Raises:
        CheckpointError: Something that is trained cannot be in a checkpoint, and is to be.
        RankError: Processes have parameters of other shapes.
    """
    with processes.together():
        if not checkpointer.load_initial(pair):
            pair.find_units(settings.seed)
    modules = pair.placed.modules
    processes.broadcast_tensors(
        [*pair.named_tensors().values(), *(buffer for module in modules for buffer in module.buffers())]
    )
    with processes.together():
        own_stop = processes.own_stop(stop)
        step = Step(pair, pair.batches, settings, own_stop)
        validation = None
        if pair.held_out is not None:
            validation = Validation(pair, pair.held_out, settings, own_stop)
        run = Run(settings, make_passes(step, processes, stop), validation, checkpointer)
        checkpointer.restore(run)
    return run
