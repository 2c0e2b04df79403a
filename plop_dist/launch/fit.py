"""Runs one attempt of the workers, so that an interrupt or a head that is gone ends it."""

from __future__ import annotations

from pathlib import Path

from ray.train.torch import TorchTrainer

from plop_dist.launch.asked import Asked, head_address

_STOP_WAIT_S = 60.0


def fit(trainer: TorchTrainer, stop_request: Path) -> None:
    """Run the workers to their end, so that an interrupt (SIGINT, connected()'s SIGTERM) raises here and ends them.

    Ray Train would answer SIGINT with its own exit, without a word to the user; it leaves signals alone in a thread.
    Workers that train are asked to stop with a checkpoint first; a second signal, or a long step, does not wait.
    Raises WorkerError where the head no longer answers, and whatever Ray Train raises.
    """
    running = Asked(trainer.fit)
    try:
        running.outcome(head_address())
    except (KeyboardInterrupt, SystemExit):
        if stop_request.is_file():
            stop_request.write_text("stop")
            running.has_ended.wait(_STOP_WAIT_S)
        raise
