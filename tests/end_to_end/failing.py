"""What `test_processes.py` has two processes do together."""

import os
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from agent_lightning.exceptions import TrainingError


def ranks(target, first):
    assert (target, first) == ("target", 1)
    return np.asarray(multihost_utils.process_allgather(np.int32(jax.process_index()))).tolist()


def everywhere(target):
    raise TrainingError("all alike")


def killed(target):
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks(target, 1)  # process 0 waits in a collective


def only_in_the_follower(target):
    if jax.process_index() == 1:
        raise ValueError("mine")


def only_in_the_leader(target):
    if jax.process_index() == 0:
        raise ValueError("mine")


def well(leader):
    leader.close()
    sys.exit(0)


def follower_is_killed(leader):
    leader.run(killed, "target")


def leader_is_killed(leader):
    leader.tell(ranks, 1)  # process 1 waits in a collective
    os.kill(os.getpid(), signal.SIGKILL)


def leader_is_terminated(leader):
    os.kill(os.getpid(), signal.SIGTERM)


def follower_fails(leader):
    leader.run(only_in_the_follower, "target")


def leader_fails(leader):
    leader.run(only_in_the_leader, "target")
