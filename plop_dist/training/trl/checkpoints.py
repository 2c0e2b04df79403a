"""Where a TRL trainer goes on from, the last whole checkpoint of this very run, and what it leaves: the adapter."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from plop_dist import ranks
from plop_dist.checkpoints.resumable import check_resumable
from plop_dist.checkpoints.safe_pickle import tensors_only
from plop_dist.config.schema import Config
from plop_dist.errors import RunDirError
from plop_dist.rundir.events import phase
from plop_dist.rundir.layout import RunDir
from plop_dist.training.checkpoint import WITHOUT_IT, fingerprint
from plop_dist.training.loop import StepRefusedError
from plop_dist.training.stopping import stoppable
from plop_dist.training.trl.stop import StopCallback
from plop_dist.values.files import write_text
from plop_dist.values.placement import Placement

_MARK = "depends_on.txt"
_UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip

logger = logging.getLogger(__name__)


def checkpoints_of(config: Config) -> Path:
    """Return the directory of a run's checkpoints."""
    return config.run_path / "train" / "checkpoints"


def last_checkpoint(config: Config, placement: Placement) -> str | None:
    """Return the last whole checkpoint of this very run, or None; others are removed. Collective over the world.

    Raises RunDirError for one that holds more than data: the Trainer and DeepSpeed load what this returns.
    """
    directory, key = checkpoints_of(config), fingerprint(config, placement)
    mark = directory / _MARK

    def find() -> str | None:
        if not mark.is_file() or mark.read_text() != key:
            shutil.rmtree(directory, ignore_errors=True)
            write_text(mark, key)
            return None
        for pickled in directory.glob(f"checkpoint-*/{TRAINING_ARGS_NAME}"):
            pickled.unlink()  # whole objects, which nothing reads
        whole = [path for path in directory.glob("checkpoint-*") if _is_whole(path)]
        if not whole:
            return None
        last = max(whole, key=_step_of)
        check_resumable(last)
        return str(last)

    return ranks.agree(find)


def _step_of(checkpoint: str | Path | None) -> int:
    return 0 if checkpoint is None else int(Path(checkpoint).name.split("-")[1])


def _is_whole(checkpoint: Path) -> bool:
    # trainer_state.json is what the Trainer writes last: without it a checkpoint was cut off.
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return False
    try:
        json.loads(state.read_text())
        for path in checkpoint.rglob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
        damaged = [path for path in checkpoint.rglob("*.pt*") if not zipfile.is_zipfile(path)]  # the rngs are .pth
    except (ValueError, OSError, SafetensorError):
        damaged = [state]
    if damaged:
        logger.warning("%s is damaged; %s", checkpoint, WITHOUT_IT)
    return not damaged


@contextmanager
def saving_to(directory: Path) -> Iterator[None]:
    """Raise RunDirError naming the directory when a checkpoint or an adapter cannot be written in the block."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        is_other_system_error = isinstance(error, OSError) and error.errno not in _UNWRITABLE
        if is_other_system_error or (isinstance(error, RuntimeError) and "PytorchStreamWriter" not in text):
            raise
        raise RunDirError(
            f"{directory} cannot be written: {text}; free space there or delete what is in the way, and run again."
        ) from error


def finish(trainer: Any, config: Config, resume: str | None) -> Path:
    """Run a trainer to its end, from a checkpoint or from the start, and write the adapter; returns where that lies.

    Collective over the world: at ZeRO-3 shards are gathered. Raises RunDirError. Asked to stop, it ends after the step,
    with a checkpoint, by SystemExit. A StepRefusedError of a step leaves a checkpoint of the steps before it.
    """
    trainer.remove_callback(PrinterCallback)  # it prints the dictionaries that our log already holds
    if resume is not None:
        logger.info("training goes on from step %d of %d", _step_of(resume), config.train.max_steps)
    with saving_to(checkpoints_of(config)), stoppable(RunDir(config.run_dir)) as stopping, ExitStack() as loading:
        loading.enter_context(tensors_only())
        trainer.add_callback(_Loaded(loading))
        trainer.add_callback(StopCallback(stopping, trainer.args.device))
        try:
            trainer.train(resume_from_checkpoint=resume)
        except StepRefusedError as error:
            done = trainer.state.global_step
            if done % config.train.save_steps and _step_of(resume) < done:
                trainer._save_checkpoint(trainer.model_wrapped, trial=None)  # a callback is asked after steps alone
            raise StepRefusedError.keeping_others(error) from error
        done = trainer.state.global_step
        if done < trainer.state.max_steps:
            logger.info("training stopped after step %d of %d, with a checkpoint", done, trainer.state.max_steps)
            stopping.leave()
    phase("saving the adapter")
    adapter = config.run_path / "train" / "adapter"
    with saving_to(adapter):
        trainer.save_model(str(adapter))
        if ranks.rank() == 0:
            (adapter / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle has no place in what is passed on
    ranks.barrier()
    return adapter


class _Loaded(TrainerCallback):
    """Ends what holds while a trainer loads its checkpoint: rewards, which run later, load what they like."""

    def __init__(self, loading: ExitStack) -> None:
        self._loading = loading

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note that everything is loaded."""
        self._loading.close()
