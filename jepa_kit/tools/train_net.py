"""Pretrain an encoder: from a config to a run folder with checkpoints, metrics and curves.

examples:
  # shards first (tools/make_shards.py), then a config of projects/ijepa and the path of the shards
  python tools/train_net.py --config-file projects/ijepa/configs/NAME.yaml --output-dir runs/first \\
      data.shards=shards/photos/train

  # 8 GPUs on this machine: the same global batch, masks and crops
  torchrun --nproc-per-node 8 tools/train_net.py --config-file projects/ijepa/configs/NAME.yaml

  # resume exactly after a stop
  python tools/train_net.py --config-file runs/first --resume

  # resume from an earlier checkpoint of the run, for example if the latest is damaged
  python tools/train_net.py --config-file runs/first --resume runs/first/checkpoint_00001000.pt

  # resume a run of the released code: its weights, optimizer moments and epoch
  python tools/train_net.py --config-file projects/ijepa/configs/NAME.yaml --resume jepa-ep100.pth.tar

  # a new run that starts from weights of any format (docs/checkpoints.md)
  python tools/train_net.py --config-file ... train.init_from=IN1K-vit.h.14-300e.pth.tar

  # checkpoints in an object store; the file registers its handler (docs/faults.md)
  python tools/train_net.py --config-file ... imports='[my_handler.py]' checkpoint.dir=s3://bucket/first

  # a Slurm job on 2 nodes of 8 GPUs, requeued and resumed until the run is complete (docs/clusters.md)
  python tools/train_net.py --config-file ... --submit slurm --nodes 2 --gpus-per-node 8 --partition gpu --time 1-0

  # the same job as a script for sbatch, to read and edit
  python tools/train_net.py --config-file ... --submit sbatch-script --nodes 2 --gpus-per-node 8 --time 1-0

  # another masker and other values; values are YAML
  python tools/train_net.py --config-file ... masker='{name: random, ratio: 0.6}' optim.lr=5e-4 train.epochs=100

--config-file is a YAML file, a run folder, a checkpoint, or the name of a config in projects/.

Exit status:
  0    the run is complete
  1    the run failed at or after its first step, or the processes could not connect
  2    a mistake in the config, the data or the command, found before the first step
  75   SIGTERM, SIGHUP or SIGUSR1: a checkpoint is written, and the same command with --resume continues the run
  130  Ctrl-C: the first one writes a checkpoint, a second one aborts
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from jepa_kit.arguments import add_config, fail, in_order, run_tool, tool_parser
from jepa_kit.config import Config, load_config
from jepa_kit.distributed.signals import INTERRUPTED, Preempted, requeue
from jepa_kit.engine.checkpoint.format import checkpoints
from jepa_kit.engine.job import Job, add_job_options, job_of
from jepa_kit.engine.submit import prepare, submit, write_script
from jepa_kit.errors import RunError
from jepa_kit.run_folder import step_of

NAME = "train_net.py"
MISTAKES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
"""Errors found before the first step, which the user can fix."""
OVERRIDE = re.compile(r"[\w.\[\]]+=")
"""Start of ``key=value``; no URL and no path with a folder matches."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("train_net.py", __doc__)
    add_config(p)
    p.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="resume from the latest checkpoint of the run folder, or from FILE: an earlier checkpoint of the run, or "
        "a released one if the folder has none",
    )
    p.add_argument("--output-dir", metavar="DIR", help="run folder; same as train.output_dir=DIR")
    slurm = p.add_argument_group("Slurm", "submit the run as a job with one process per GPU (docs/clusters.md)")
    slurm.add_argument(
        "--submit",
        choices=["slurm", "sbatch-script"],
        help="slurm: submit through submitit; sbatch-script: write the job's script and print it",
    )
    add_job_options(slurm)
    return p


def submit_run(config: Config, job: Job, how: str, resume: bool, resume_from: str | None, path: Sequence[str]) -> None:
    """Submit the run, or write and print its script."""
    tool = Path(__file__).resolve()
    in_clone = tool.parents[2] / "tools" / tool.name
    tool = in_clone if in_clone.is_file() else tool
    submission = prepare(config, job, tool=tool, resume=resume, resume_from=resume_from, python_path=path)
    if how == "slurm":
        submitted = submit(submission)
        print(f"job {submitted.job_id}: {submission.name}, {job.processes} processes on {job.nodes} node(s)")
        print(f"output: {submitted.paths.stdout}")
        return
    script = write_script(submission)
    print(script.read_text())
    print(f"written to {script}; to submit it:\n  sbatch {shlex.quote(str(script))}")


def run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Train, or submit the run; return the exit status.

    Args:
        arguments: the parsed command line.
        argv: the command line, for the order of overrides; None for the program's own.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError: a mistake in the command,
            the config or the data.
    """
    from jepa_kit.training import train  # not at the top, as --help does not need it

    overrides = list(arguments.overrides)
    resume, resume_from = arguments.resume is not None, arguments.resume or None
    if resume_from is not None and OVERRIDE.match(resume_from):  # `--resume key=value` names no file
        overrides, resume_from = in_order([resume_from, *overrides], argv), None
    output_dir = arguments.output_dir
    if output_dir is None and resume and os.path.isdir(arguments.config_file):
        # The config's path of the run folder is relative to the directory in which the run was started.
        output_dir = arguments.config_file
    if output_dir is not None:
        overrides.append(f"train.output_dir={json.dumps(output_dir)}")
    known, config = set(sys.path), None
    try:
        job = job_of(arguments)
        config = load_config(arguments.config_file, overrides, trust_imports=arguments.trust_imports)
        if job is not None:
            found_in = [path for path in sys.path if path not in known]  # folders of the config's `imports`
            submit_run(config, job, arguments.submit, resume, resume_from, found_in)
            return 0
        train(config, resume=resume, resume_from=resume_from)
    except Preempted as stopped:
        return leave(stopped)
    except RunError as failed:
        if failed.__cause__ is not None:  # perhaps a bug in a user's part: show its traceback
            traceback.print_exception(failed.__cause__)
        return fail(NAME, str(failed), status=1)
    except MISTAKES:
        raise  # run_tool prints it; caught before OSError, of which some are subclasses
    except (FloatingPointError, OSError) as error:
        return fail(NAME, str(error), status=1)
    except KeyboardInterrupt:
        return fail(NAME, interrupted(config), status=INTERRUPTED)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool(NAME, lambda: run(parser().parse_intermixed_args(argv), argv))


def interrupted(config: Config | None) -> str:
    """Return the message for a run that ended without a checkpoint of its last step."""
    kept = "nothing was written"
    if config is not None:
        place = config.checkpoint.dir or config.train.output_dir
        steps = [] if "://" in place else [step_of(path) for path in checkpoints(Path(place))]
        kept = f"--resume continues at step {steps[-1]:,}, its latest checkpoint" if steps else "no checkpoint is there"
        kept = f"--resume continues from the latest checkpoint in {place}" if "://" in place else kept
    return f"interrupted; {kept}"


HEAD_START = 3.0
"""Seconds for rank 0 to requeue the job: srun --kill-on-bad-exit ends all tasks as soon as one ends."""


def leave(stopped: Preempted) -> int:
    """Return the status after a signal. Only SIGUSR1 requeues a Slurm job; the others may be from ``scancel``."""
    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    if is_main and stopped.number == signal.SIGUSR1:
        try:
            if done := requeue():
                print(done, flush=True)
        except RuntimeError as error:
            return fail(NAME, f"{stopped}, but {error}", status=1)
    if not is_main and "SLURM_STEP_ID" in os.environ:
        time.sleep(HEAD_START)
    return fail(NAME, str(stopped), status=stopped.status)


if __name__ == "__main__":
    sys.exit(main())
