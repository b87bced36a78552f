"""Run what results/runs.csv does not hold yet of the sweeps.

    python -m experiments.run                 all of them, in the order in which they need each other
    python -m experiments.run recipe rate     these alone
    python -m experiments.run --dry-run       say what is missing and how long it should take
    torchrun --nproc-per-node=2 -m experiments.run    the same by two processes, each on its own GPU

Needs CIFAR-10. A finished run is in results/runs.csv at once, and skipped the next time.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import math
import os
import time

import torch
from tqdm import tqdm

import utils
from engine import fast, records
from engine.data import load_data, validation_split
from engine.trainer import Trainer
from experiments import ROOT
from experiments.sweeps import PYTORCH_STEP, RUNS, SWEEPS, chain, missing, plan, read_texts, waits, without_row
from experiments.variants import Experiment

# Runs share a GPU, so that one computes while another waits for its small kernels: three of 500 images, as
# bench.py measures, and the more the smaller the batch is. Not measured: where more than 12 stop paying.
IMAGES_AT_ONCE, AT_ONCE = 1_500, (3, 12)
VALIDATION_IMAGES = 5_000
TRAIN_IMAGES = {"test": 50_000, "validation": 50_000 - VALIDATION_IMAGES}


def predict_seconds(sweep, todo, rows):
    """Predict the seconds of runs on one GPU, at the median seconds a step of the GPU runs in `rows`; nan without."""
    seen = rows[~rows["device"].str.startswith("cpu")] if len(rows) else rows
    if seen.empty:
        return math.nan
    columns = ("seconds", "epochs", "batch_size", "train_images")
    seconds, epochs, size, images = (seen[name].astype(float) for name in columns)
    images_now = TRAIN_IMAGES[SWEEPS[sweep][0]]
    steps = sum(one.epochs * (images_now // one.batch_size) for one in todo)
    return (seconds / (epochs * (images // size))).median() * steps


def run_sweep(sweep):
    """Run what is missing of a sweep, a few runs at a time, each written when it ends.

    Rows can call for more runs, as in `tuning`, so this goes on until none is missing.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    done = set()
    while todo := missing_now(sweep):
        if again := done.intersection(todo):
            raise ValueError(f"sweep {sweep}: the row just written is not found again: {again.pop()}")
        done.update(todo)
        todo = todo[rank::world]
        with tqdm(total=len(todo), desc=sweep) as bar:
            for part in parts(todo) if torch.cuda.is_available() else ([one] for one in todo):
                runs = train_together(sweep, part, data_of(part[0].dataset, SWEEPS[sweep][0]))
                records.upsert(RUNS, [run.row for run in runs])
                bar.update(len(runs))


def missing_now(sweep):
    """Return what is missing of a sweep when all processes have written their rows: the same to each of them."""
    wait_for_all()
    todo = missing(sweep, read_texts(RUNS))
    wait_for_all()  # before one writes and another reads
    return todo


def wait_for_all():
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@functools.cache
def data_of(dataset, split):
    """Load a data set, with its validation split as test split if `split` says so."""
    if split == "validation":
        data = data_of(dataset, "test")
        return validation_split(data, VALIDATION_IMAGES // len(data.classes))
    data = load_data(utils.pick_device(), dataset.lower().replace("-", ""), ROOT / "data")
    if data.name != dataset:
        raise ValueError(f"dataset is {dataset!r}; what engine.data.load_data reads for it is {data.name}")
    return data


def parts(todo):
    """Yield lists of the runs that share a GPU, which have the same batch size: small batches, many runs."""
    least, most = AT_ONCE
    for (size, _), alike in itertools.groupby(todo, key=lambda one: (one.batch_size, one.dataset)):
        at_once = min(max(IMAGES_AT_ONCE // size, least), most)
        while part := list(itertools.islice(alike, at_once)):
            yield part


def train_together(sweep, todo, data):
    """Train several nets at the same time on one device: a `utils.Run` for each experiment."""
    if data.images.device.type == "cpu":
        fast.keep_memory()
    fused = False if sweep in PYTORCH_STEP else None
    started = time.perf_counter()
    nets = [one.build() for one in todo]
    trainers = [
        Trainer(net, data, one, fused, stream=number) for number, (net, one) in enumerate(zip(nets, todo, strict=True))
    ]
    for _ in itertools.zip_longest(*map(all_epochs, trainers)):
        pass  # a step of each in turn: all of an epoch would fill the GPU's queue, and the other nets would wait
    for trainer in trainers:
        trainer.means()
    seconds = (time.perf_counter() - started) / len(todo)
    runs = []
    for net, one, trainer in zip(nets, todo, trainers, strict=True):
        diverged = bool(trainer.diverged)
        run = utils.finish(one.net, net, data, one, [], sweep, seconds, diverged, fused)
        runs.append(dataclasses.replace(run, row=run.row | one.columns()))
    return runs


def all_epochs(trainer):
    """Yield after each step of a run, of all epochs up to that in which it diverged."""
    for _ in range(trainer.settings.epochs):
        yield from trainer.epoch()
        with trainer.on_stream():
            if trainer.diverged:
                return


def check_columns(one, columns):
    """Raise ValueError if an experiment and the row of its run differ: no row would be found again."""
    for name, text in one.columns().items():
        if str(columns.get(name)) != text:
            raise ValueError(
                f"Experiment.{name} is {text!r} and the column {name} of its row {columns.get(name)!r}; "
                "a variant needs a name of its own, with the default '' in records.net_columns, too"
            )


def describe(sweep, rows):
    """Return one line: how many runs of a sweep are missing, and how long they should take."""
    listed = plan(rows, chain(sweep))[0][sweep]
    if listed is None:
        return f"{sweep}: waits for {SWEEPS[sweep][2]}"
    todo = without_row(sweep, listed, rows)
    seconds = predict_seconds(sweep, todo, rows)
    minutes = "no GPU run so far to predict from" if math.isnan(seconds) else f"about {seconds / 60:.1f} GPU minutes"
    return f"{sweep}: {len(todo)} of {len(listed)} runs missing, {minutes}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"run these alone: {', '.join(SWEEPS)}")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing, run nothing")
    parser.add_argument("--commit", help="the commit that the rows name, where there is no git")
    options = parser.parse_args(arguments)
    for name in options.sweeps:
        if name not in SWEEPS:
            parser.error(f"sweep is {name!r}; choose from {', '.join(SWEEPS)}")
    chosen = [sweep for sweep in SWEEPS if sweep in (options.sweeps or SWEEPS)]
    if options.dry_run:
        try:
            rows = read_texts(RUNS)
            lines = [describe(sweep, rows) for sweep in chosen]
        except (KeyError, OSError, ValueError) as error:  # KeyError: a column that is missing
            text = f"there is no column {error}" if isinstance(error, KeyError) else str(error)
            parser.error(text if str(RUNS) in text else f"{RUNS}: {text}")
        print(*lines, sep="\n")
        return
    if not torch.cuda.is_available() and not options.sweeps:
        parser.error("there is no GPU here, where all sweeps would take days: name one")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        if options.commit:
            records.set_commit(options.commit)
        records.check_writable(RUNS)  # before hours of training
        records.code_commit()
        data, one = data_of("CIFAR-10", "test"), Experiment()
        columns = utils.settings_columns(one.net, one.build(), data, one, "recipe")
        records.check_writable(RUNS, columns)
        check_columns(one, columns)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    for sweep in chosen:
        if waits(sweep, read_texts(RUNS)):
            print(f"{sweep}: waits for {SWEEPS[sweep][2]}")
        else:
            run_sweep(sweep)


if __name__ == "__main__":
    main()
