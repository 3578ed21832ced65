"""Deterministic, resumable order of samples.

The training set is one endless sequence of samples. `lanes` readers each go through their own share of the shards, in
an order drawn anew each epoch and shuffled within blocks; sample q of the sequence comes from lane q mod lanes. Process
p of P takes the samples q = p (mod P), and its workers split those again, so that the sequence is the same however many
processes and workers read it. Every sample carries a cursor, the place in its lane where reading goes on after it: the
cursors of the last samples used are all that a checkpoint needs.
"""

import hashlib
import itertools
import math
import os
import signal
import threading
from collections import Counter

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset

from common.data import BadSample, NoGoodSamples, Sample, read_shard

LANES = 8  # streams open at a time, where processes x workers do not ask for more


def plan_lanes(shards: int, processes: int, workers: int, lanes: int | None = None) -> tuple[int, int]:
    """Number of lanes, and of workers per process that they can feed (0 reads in the main process).

    `lanes` are those of the run that is resumed: they stay, and each still has one reader.
    """
    if lanes is not None:
        if lanes % processes:
            raise ValueError(f"the {lanes} lanes of the checkpoint's data cannot be split over {processes} processes")
        return lanes, max((w for w in range(1, workers + 1) if lanes % (processes * w) == 0), default=0)
    if shards < processes:
        raise ValueError(f"{shards} shards cannot feed {processes} processes: at least one shard each is needed")
    workers = min(workers, shards // processes)
    readers = processes * max(workers, 1)
    few = 1 << (min(LANES, shards).bit_length() - 1)  # a power of two, so that 1, 2, 4 and 8 readers give one order
    lanes = math.lcm(few, readers)
    return (lanes if lanes <= shards else shards // readers * readers), workers


class ShardStream(IterableDataset):
    """This process's share of the endless sequence; each item is one worker's part of one batch, a list of samples."""

    def __init__(self, shards, reader, *, seed, batch_size, process, processes, lanes, shuffle_buffer=1000, state=None):
        self.shards, self.reader, self.seed = shards, reader, seed
        self.batch_size, self.process, self.processes, self.lanes = batch_size, process, processes, lanes
        self.block = max(1, shuffle_buffer // lanes)
        state = state or {"batch": 0, "cursors": {}}
        self.batch, self.cursors = state["batch"], {int(lane): tuple(at) for lane, at in state["cursors"].items()}

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        readers = {}
        barren, faults = set(), Counter()  # shards read to their end, and samples skipped, since the last good sample
        for batch in itertools.count(self.batch):
            samples = []
            for i in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                if i % workers == worker:
                    position = i * self.processes + self.process
                    lane = position % self.lanes
                    if lane not in readers:
                        readers[lane] = self.read_lane(lane, self.cursors.get(lane, (0, 0, 0)), barren, faults)
                    try:
                        sample = next(readers[lane])
                    except NoGoodSamples as error:  # raised here, it would reach the user as a worker's traceback
                        yield error
                        return
                    sample.position = position
                    samples.append(sample)
            yield samples

    def read_lane(self, lane: int, cursor: tuple[int, int, int], barren: set, faults: Counter):
        """Good samples of one lane, from its cursor on, for ever."""
        first_epoch, first_place, first_index = cursor
        for epoch in itertools.count(first_epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))[lane :: self.lanes]
            for place in range(first_place, len(order)):
                shard = int(order[place])
                for index, (key, members) in self.shuffled(shard, epoch, first_index):
                    try:
                        if isinstance(members, str):
                            raise BadSample(members)
                        sample = self.reader(members, f"{epoch} {shard} {key}")
                    except BadSample as cause:
                        faults[str(cause)] += 1
                        continue
                    sample.cursor = (lane, epoch, place, index + 1)
                    sample.faults.update(faults)
                    faults.clear()
                    barren.clear()
                    yield sample
                first_index = 0
                barren.add(shard)
                if len(barren) == len(self.shards):
                    causes = ", ".join(f"{count} x {cause}" for cause, count in faults.most_common())
                    raise NoGoodSamples(
                        f"no usable sample in any of {len(self.shards)} shards: {causes or 'all empty'}"
                    )
            first_place = 0

    def shuffled(self, shard: int, epoch: int, start: int):
        """(index, sample) of a shard, its blocks of consecutive samples shuffled each, without the first `start`.

        Like crop and flip the order follows from the shard's number, so that data may move between run and resume.
        """
        index = 0
        samples = read_shard(self.shards[shard])
        while block := list(itertools.islice(samples, self.block)):
            order = np.random.default_rng((self.seed, epoch, index, shard)).permutation(len(block))
            for i in order:
                if index >= start:
                    yield index, block[i]
                index += 1


def outlive_signals(worker: int):
    """What stops a run reaches its readers too: they must go on until the training process has saved its checkpoint.

    Its own SIGTERM they obey: it sends one to each as it exits, and then waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_when_parent_says, daemon=True).start()


def end_when_parent_says():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Batches:
    """Iterates over lists of samples, one per batch of this process, and knows the position for a checkpoint."""

    def __init__(self, stream: ShardStream, workers: int):
        self.stream, self.parts = stream, max(workers, 1)
        self.batch, self.cursors, self.faults = stream.batch, dict(stream.cursors), Counter()
        options = {"prefetch_factor": 4, "worker_init_fn": outlive_signals} if workers else {}
        self.loader = iter(DataLoader(stream, batch_size=None, num_workers=workers, **options))

    def __next__(self) -> list[Sample]:
        parts = [next(self.loader) for _ in range(self.parts)]
        for part in parts:
            if isinstance(part, NoGoodSamples):
                raise part
        samples = sorted(itertools.chain(*parts), key=lambda sample: sample.position)
        for sample in samples:
            self.cursors[sample.cursor[0]] = sample.cursor[1:]
            self.faults += sample.faults
        self.batch += 1
        return samples

    def state(self) -> dict:
        """Of this process; those of all processes together resume the stream."""
        return {"batch": self.batch, "cursors": self.cursors, "faults": dict(self.faults), "lanes": self.stream.lanes}


def open_batches(args, accelerator, reader, state) -> Batches:
    processes = accelerator.num_processes
    try:
        resumed = state["lanes"] if state else None
        lanes, workers = plan_lanes(len(args.shards), processes, args.dataloader_num_workers, resumed)
    except ValueError as error:
        raise SystemExit(f"--train_shards_path_or_url: {error}") from None
    if workers < args.dataloader_num_workers:
        accelerator.print(f"--dataloader_num_workers: {len(args.shards)} shards feed only {workers} in {lanes} lanes")
    stream = ShardStream(
        args.shards, reader, seed=args.seed, batch_size=args.train_batch_size, process=accelerator.process_index,
        processes=processes, lanes=lanes, state=state,
    )  # fmt: skip
    return Batches(stream, workers)


def gather_states(batches, accelerator) -> tuple[dict, Counter]:
    """Place in the data and samples skipped, of all processes."""
    states = gather_object([batches.state()])
    cursors = {lane: cursor for state in states for lane, cursor in state["cursors"].items()}
    faults = sum((Counter(state["faults"]) for state in states), Counter())
    return {"batch": batches.batch, "lanes": batches.stream.lanes, "cursors": cursors}, faults


class ShardPass(IterableDataset):
    """What fills a cache: all good samples of this process's share of the shards, after a shard's last its name."""

    def __init__(self, shards, reader, *, process, processes):
        self.shards, self.reader, self.process, self.processes = shards, reader, process, processes

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for shard in self.shards[self.process + self.processes * worker :: self.processes * workers]:
            for key, members in read_shard(shard):
                if not isinstance(members, str):
                    try:
                        yield self.reader(members, f"{shard} {key}")
                    except BadSample:
                        pass  # counted when training meets it
            yield shard


def sample_generator(seed: int, position: int) -> torch.Generator:
    """Random numbers that follow from the seed and the sample's place in the global sequence alone."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def stack(rows: list[tuple], device) -> tuple[torch.Tensor, ...]:
    """Draws of samples, one tuple each, as batches on the device."""
    return tuple(torch.stack(column).to(device) for column in zip(*rows, strict=True))
