"""Deterministic, resumable order of samples, and batches of one size each.

The training set is one endless sequence of samples. `lanes` readers each go through their own share of the shards, in
an order drawn anew each epoch and shuffled within blocks; sample q of the sequence comes from lane q mod lanes. Process
p of P takes the samples q = p (mod P), and its workers split those again, so that the sequence is the same however many
processes and workers read it. Every sample carries a cursor, the place in its lane where reading goes on after it. A
shard is any part of a dataset, as common.data.sources has it.

A process reads as many samples at a time as a batch has, and each sample waits in its bucket until the bucket has a
batch. So the sequence alone decides which samples make a batch. A checkpoint has, of each lane, the cursor before the
first sample that was not used, and the positions of later samples that were: all others are read again.
"""

import atexit
import functools
import itertools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from dataclasses import replace

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset

from common.data.samples import BadSample, ImageReader, NoGoodSamples, Sample
from common.data.sources import read_part
from common.planning.meter import Meter

LANES = 8  # streams open at a time, where processes x workers do not ask for more
PATIENCE = 128  # reads; a sample waits no longer for its bucket to have a batch
GRACE = 0.5  # seconds in which a reader may end by itself
LIFELINES = []  # an end of a pipe for each loader; where it closes, the loader's readers end
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, are spread evenly


def plan_lanes(shards: int, processes: int, workers: int, lanes: int | None = None) -> tuple[int, int]:
    """Number of lanes, and of workers per process that the lanes can feed (0: the main process reads).

    `lanes` is their number in the run that is resumed, which must stay; each lane still has one reader.
    """
    if lanes is not None:
        if lanes % processes:
            raise ValueError(f"the {lanes} lanes of the checkpoint's data cannot be split over {processes} processes")
        return lanes, max((w for w in range(1, workers + 1) if lanes % (processes * w) == 0), default=0)
    workers = min(workers, shards // processes)
    readers = processes * max(workers, 1)
    few = 1 << (min(LANES, shards).bit_length() - 1)  # a power of two, so that 1, 2, 4 and 8 readers give one order
    lanes = math.lcm(few, readers)
    return (lanes if lanes <= shards else shards // readers * readers), workers


class ShardStream(IterableDataset):
    """This process's share of the endless sequence; each item is one worker's part of one read, a list of samples.

    `shards` are a dataset's number, a part of it, and the share of the part's samples that an epoch visits: 0.25 takes
    each in one epoch of four. `readers` are one for each dataset. Errors begin with `source`, the flag that named the
    data.
    """

    def __init__(
        self, shards, readers, *, seed, batch_size, process, processes, lanes, shuffle_buffer=1000, state=None,
        source="data",
    ):  # fmt: skip
        self.shards, self.readers, self.seed, self.source = shards, readers, seed, source
        self.batch_size, self.process, self.processes, self.lanes = batch_size, process, processes, lanes
        self.block = max(1, shuffle_buffer // lanes)
        state = state or {"starts": {}, "used": []}
        self.starts = {lane: (lane, 0, 0, 0) for lane in range(process, lanes, processes)}  # position and cursor
        self.starts |= {int(lane): tuple(start) for lane, start in state["starts"].items() if int(lane) in self.starts}
        self.used = {position for position in state["used"] if position % lanes in self.starts}

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        lane_samples = {}  # an iterator for each lane
        barren, faults = set(), Counter()  # shards without a good sample, and skipped samples, since the last good one
        first_read = min(position for position, *_ in self.starts.values()) // self.processes // self.batch_size
        for read in itertools.count(first_read):
            samples = []
            for i in range(read * self.batch_size, (read + 1) * self.batch_size):
                position = i * self.processes + self.process
                lane = position % self.lanes
                if i % workers != worker or position < self.starts[lane][0]:
                    continue
                if lane not in lane_samples:
                    lane_samples[lane] = self.read_lane(lane, self.starts[lane][1:], barren, faults)
                try:
                    sample = next(lane_samples[lane])
                except NoGoodSamples as error:  # raised here, it would reach the user as a worker's traceback
                    yield error
                    return
                sample.position = position
                if position in self.used:  # read again only for the cursor after it
                    sample = replace(sample, latents=None, pixels=None, faults=Counter())
                samples.append(sample)
            yield samples

    def read_lane(self, lane: int, cursor: tuple[int, int, int], barren: set, faults: Counter):
        """Yields good samples of one lane, from its cursor on, for ever."""
        first_epoch, first_place, first_index = cursor
        for epoch in itertools.count(first_epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))[lane :: self.lanes]
            for place in range(first_place, len(order)):
                shard = int(order[place])
                fruitless = first_index == 0
                for index, (key, members) in self.shuffled(shard, epoch, first_index):
                    try:
                        if isinstance(members, str):
                            raise BadSample(members)
                        reader = self.readers[self.shards[shard][0]]
                        sample = reader(members, f"{epoch} {shard} {key}", key.rpartition("/")[2])
                    except BadSample as cause:
                        faults[str(cause)] += 1
                        continue
                    sample.cursor = (lane, epoch, place, index + 1)
                    sample.faults.update(faults)
                    faults.clear()
                    barren.clear()
                    fruitless = False
                    yield sample
                first_index = 0
                if fruitless:
                    barren.add(shard)
                if len(barren) == len(self.shards):
                    left_out = (good_samples(part, self.readers[i]) for i, part, share in self.shards if share < 1)
                    if any(map(any, left_out)):
                        barren.clear()
                        continue
                    causes = ", ".join(f"{count} x {cause}" for cause, count in faults.most_common())
                    raise NoGoodSamples(
                        f"{self.source}: no usable sample in any of {len(self.shards)} shards: {causes or 'all empty'}"
                    )
            first_place = 0

    def shuffled(self, shard: int, epoch: int, start: int):
        """Yields (index, sample) of a shard, each block of consecutive samples shuffled, without the first `start`.

        The order follows from the shard's number and not its path, so that data may move before a run is resumed.
        """
        index, (_, part, share) = 0, self.shards[shard]
        samples, offset = read_part(part), np.random.default_rng((self.seed, shard)).random()
        while block := list(itertools.islice(samples, self.block)):
            order = np.random.default_rng((self.seed, epoch, index, shard)).permutation(len(block))
            for i, number in zip(order, order + index, strict=True):
                # A sample's turn comes where the sum of its shares passes a whole number; neighbours' turns differ
                before, after = (math.floor(e * share + offset + number * GOLDEN) for e in (epoch, epoch + 1))
                if index >= start and (share == 1 or after > before):
                    yield index, block[i]
                index += 1


@atexit.register  # and so before multiprocessing, which is there already, waits for the readers
def cut_lifelines():
    while LIFELINES:
        LIFELINES.pop().close()


def follow(reading, worker: int):
    """Keeps a reader process alive when the run is stopped, until its loader or the training process has ended.

    A signal to the whole group comes before the last checkpoint, whose place in the data it must not change.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cut_lifelines()  # the copies that a forked process has

    def wait():
        reading.poll(None)
        time.sleep(GRACE)  # torch asks it to end, too, and would wait for ever for a lock that it had
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Loaded:
    """What reader processes read. They end where this is dropped, or the process ends, be it by SIGKILL."""

    def __init__(self, items, lifeline):
        self.items, self.lifeline = items, lifeline

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.items)

    def __del__(self):  # torch's own comes next, and waits for the readers
        self.lifeline.close()


def load(samples, workers: int, **options):
    """An iterator over what a DataLoader reads."""
    if not workers:
        return iter(DataLoader(samples, batch_size=None, **options))
    reading, lifeline = multiprocessing.Pipe(duplex=False)
    LIFELINES.append(lifeline)
    options |= {"worker_init_fn": functools.partial(follow, reading)}
    return Loaded(iter(DataLoader(samples, batch_size=None, num_workers=workers, **options)), lifeline)


class Batches:
    """An iterator over this process's batches, lists of samples of one bucket, that knows its place in the data.

    When a bucket's first sample has waited too long, the bucket's samples are repeated to make a batch.
    """

    def __init__(self, stream: ShardStream, workers: int, say=print):
        self.stream, self.parts, self.say = stream, max(workers, 1), say
        self.starts, self.used, self.faults = dict(stream.starts), set(stream.used), Counter()
        self.read_since = {lane: deque() for lane in self.starts}  # (position, cursor) of samples since starts[lane]
        self.reads, self.padded = 0, set()
        self.waiting: dict[tuple, list[tuple[int, Sample]]] = {}  # by bucket: number of the read, sample
        self.ready: deque[list[Sample]] = deque()
        self.loader = load(stream, workers, prefetch_factor=4 if workers else None)

    def __next__(self) -> list[Sample]:
        while not self.ready:
            self.read()
        samples = self.ready.popleft()
        for sample in samples:
            self.used.add(sample.position)
            self.faults += sample.faults
        for lane, entries in self.read_since.items():
            while entries and entries[0][0] in self.used:
                position, cursor = entries.popleft()
                self.used.discard(position)
                self.starts[lane] = (position + self.stream.lanes, *cursor)
        size = self.stream.batch_size
        if len(samples) < size:
            self.report_padding(samples[0].bucket)
            # A repeated sample is another visit: it has another position, from which noise and t follow
            again = [replace(sample, position=sample.position + (turn << 48), faults=Counter())
                     for turn in range(1, size) for sample in samples]  # fmt: skip
            samples = [*samples, *again][:size]
        return samples

    def read(self):
        """Sorts one read's samples into buckets, and makes batches of buckets that are full or have waited too long."""
        parts = [next(self.loader) for _ in range(self.parts)]
        for part in parts:
            if isinstance(part, NoGoodSamples):
                raise part
        for sample in sorted(itertools.chain(*parts), key=lambda sample: sample.position):
            self.read_since[sample.cursor[0]].append((sample.position, sample.cursor[1:]))
            if sample.position in self.used:
                continue
            bucket = self.waiting.setdefault(sample.bucket, [])
            bucket.append((self.reads, sample))
            if len(bucket) == self.stream.batch_size:
                self.ready.append([sample for _, sample in self.waiting.pop(sample.bucket)])
        late = [bucket for bucket, entries in self.waiting.items() if entries[0][0] <= self.reads - PATIENCE]
        for bucket in sorted(late, key=lambda bucket: self.waiting[bucket][0][1].position):
            self.ready.append([sample for _, sample in self.waiting.pop(bucket)])
        self.reads += 1

    def report_padding(self, bucket: tuple[int, ...]):
        """Says once of each bucket that its batches have repeated samples."""
        if bucket not in self.padded:
            self.padded.add(bucket)
            self.say(
                f"bucket {'x'.join(map(str, reversed(bucket)))}: fewer than {self.stream.batch_size} samples among "
                f"{PATIENCE * self.stream.batch_size}, its batches are filled by repeating them"
            )

    def state(self) -> dict:
        """This process's place in the data and its faults; the places of all processes resume a stream."""
        places = {"lanes": self.stream.lanes, "starts": dict(self.starts), "used": sorted(self.used)}
        return places | {"faults": dict(self.faults)}


def list_parts(datasets) -> list[tuple[int, object, float]]:
    """A dataset's parts once for each of its visits in an epoch, which spreads the visits over the epoch."""
    shards = []
    for i, dataset in enumerate(datasets):
        shards += [(i, part, 1.0) for part in dataset.parts * int(dataset.visits)]
        shards += [(i, part, dataset.visits % 1) for part in dataset.parts if dataset.visits % 1]
    return shards


def open_batches(args, data, accelerator, readers: list[ImageReader], state, sharing: int = 1, say=None) -> Batches:
    """Batches of the data; `sharing` processes next to each other get the same samples. say(text) prints notes.

    A plan reads no data: it gets None.
    """
    if Meter.running:
        return None
    say = say or accelerator.print
    processes, shards = accelerator.num_processes // sharing, list_parts(data.datasets)
    resumed_lanes = state["lanes"] if state else None
    copies = -(-(resumed_lanes or processes) // len(shards))  # each lane has at least one shard
    if copies > 1:
        say(f"{len(shards)} shards for {processes} processes: an epoch reads each {copies} times, in orders of its own")
        shards = shards * copies
    try:
        lanes, workers = plan_lanes(len(shards), processes, args.dataloader_num_workers, resumed_lanes)
    except ValueError as error:
        raise SystemExit(f"{data.source}: {error}") from None
    if workers < args.dataloader_num_workers:
        say(f"--dataloader_num_workers: {len(shards)} shards feed only {workers} in {lanes} lanes")
    stream = ShardStream(
        shards, readers, seed=args.seed, batch_size=args.train_batch_size, lanes=lanes, state=state,
        process=accelerator.process_index // sharing, processes=processes, source=data.source,
    )  # fmt: skip
    return Batches(stream, workers, say)


def gather_states(batches, accelerator, sharing: int = 1) -> tuple[dict, Counter]:
    """Place in the data and skipped samples of all processes; of those that share samples one counts."""
    states = gather_object([batches.state()])[::sharing]
    starts = {lane: start for state in states for lane, start in state["starts"].items()}
    used = sorted(position for state in states for position in state["used"])
    faults = sum((Counter(state["faults"]) for state in states), Counter())
    return {"lanes": batches.stream.lanes, "starts": starts, "used": used}, faults


class ShardPass(IterableDataset):
    """All good samples of this process's share of the shards, once; after a shard's last sample the shard's number."""

    def __init__(self, shards, readers, *, process, processes):
        self.shards, self.readers, self.process, self.processes = shards, readers, process, processes

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for number in range(self.process + self.processes * worker, len(self.shards), self.processes * workers):
            dataset, part = self.shards[number]
            yield from good_samples(part, self.readers[dataset])
            yield number


def good_samples(part, reader):
    for key, members in read_part(part):
        if not isinstance(members, str):
            try:
                yield reader(members, key, key.rpartition("/")[2])
            except BadSample:
                pass  # counted when training meets it
