"""Compiles what a search needs at its end beside its first generations, while devices are busy and the host is not."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from ses_jax.engine import generation
from ses_jax.engine.denoising import Rows
from ses_jax.engine.tasks import FINALS, Task
from ses_jax.loading import partition

LOG = logging.getLogger("ses_jax")


def compile_render(task: Task) -> Future[None] | None:
    """Starts to compile the final renders in a thread; to be waited for before they are called.

    None where there is nothing to gain, or harm: devices that are this host's cores, which are busy, and where the
    thread's compiler keeps memory; and several processes, which have to compile the same programs in the same order.
    """
    mesh = task.program.model.mesh
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform == "cpu" or jax.process_count() > 1:
        return None
    pool = ThreadPoolExecutor(1, "ses_jax-compile")
    compiled = pool.submit(_compile, task)
    pool.shutdown(wait=False)
    return compiled


def _compile(task: Task) -> None:
    """What is compiled here is not compiled again by a call; what fails here fails there, with its own words."""
    try:
        _lower_render(task).compile()
    except Exception as error:
        LOG.debug("the final renders were not compiled ahead: %s", error)


def _lower_render(task: Task) -> jax.stages.Lowered:
    """Of arrays that lie where the call's do: programs for shapes are not always those for arrays."""
    program, rows = task.program, FINALS * len(task.prompts)
    noise = np.zeros((rows, *task.noise.shape[1:]), np.float32)
    sigmas = np.zeros((task.config.steps + 1,), np.float32)
    arrays = (jax.device_put(sigmas), task.inputs.condition), Rows(noise, np.zeros((rows,), np.int32))
    arrays = partition.replicate(program.model.mesh, arrays)
    return generation.render.lower(program.model, program.chunk, task.params[0], *arrays)
