"""Which of many processes this one is.

Prompts need nothing from each other, so processes only have to agree who takes which; they meet, learn their places and
part. From then on each is an ordinary JAX of its own with its local devices. (In JAX's connected state the loss of one
process ends all others: of process 0 at once, of any other when its heartbeat fails.)
"""

import logging
from typing import NamedTuple

import jax
from jax._src import distributed  # has the only State besides the global one, which would leave its traces

LOG = logging.getLogger("ses_jax")
MEETING_SECONDS = 300


class Place(NamedTuple):
    """The number of a process, and how many there are."""

    process_id: int = 0
    num_processes: int = 1


def own_place(process_id: int | None = None, num_processes: int | None = None) -> Place:
    """The place that was given; without one, that in `jax.distributed`, where the caller has started it.

    Raises:
      ValueError: for half a place, or one that does not exist.
    """
    if (process_id is None) != (num_processes is None):
        raise ValueError(f"process_id={process_id} and num_processes={num_processes} go together; give both or none")
    if process_id is None:
        return Place(jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else Place()
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id={process_id} must be at least 0 and less than num_processes={num_processes}")
    return Place(process_id, num_processes)


def meet(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    *,
    seconds: int = MEETING_SECONDS,
) -> Place:
    """Waits until all processes have come, and parts from them again. To be called before anything else of JAX.

    Args:
      coordinator: "HOST:PORT" of process 0; None is what the cluster (SLURM, a TPU pod, Open MPI) announces.
      process_id, num_processes: this process's place; None likewise.
      seconds: how long to wait.

    Raises:
      ValueError: if nothing announces what was not given. Where not all come in time, or two come as the same, JAX
        ends the process (SIGABRT).
    """
    LOG.warning(
        "waiting for the other processes for at most %d s; with a process id and a number of processes, and neither "
        "coordinator nor cluster, no process waits for another",
        seconds,
    )
    state = distributed.State()
    preemption = jax.config.jax_enable_preemption_service
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM
    try:
        state.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=seconds,
            shutdown_timeout_seconds=seconds,
        )
        state.shutdown()
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"the processes did not meet: {error}; give coordinator, process_id, num_processes") from error
    finally:
        jax.config.update("jax_enable_preemption_service", preemption)
    return Place(state.process_id, state.num_processes)
