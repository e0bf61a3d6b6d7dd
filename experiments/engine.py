"""Carries out many runs: in a loop, on processes of their own, or on a Ray cluster; what fails costs itself alone."""

import collections
import contextlib
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import traceback
from multiprocessing import connection

import tqdm

from experiments import devices, keeper
from experiments.runs import append_row, cores, provenance


def is_workers(text):
    """Whether the text says who carries runs out: a number of processes, "auto", "ray" or "ray://<address>"."""
    return text in ("auto", "ray") or text.startswith("ray://") or (text.isdecimal() and int(text) > 0)


def carry_out(runs, outcome, *, workers, results):
    """Carries out runs, each after the one that it needs, and appends the row of each to a file.

    Args:
        runs: A list of `Run`s. What they come after is carried out before, once, and leaves no row unless it is among
            them.
        outcome: `outcome(run)` returns what the row says beside the key and where it comes from. A function at the top
            level of its module that reads no flag: it may be called in another process, or on another machine.
        workers: "1", a loop in this process; "<n>", so many processes; "auto", one for each GPU, or core; "ray" or
            "ray://<address>", a Ray cluster.
        results: The file of rows.

    Raises:
        SystemExit: In the end, if some runs failed; the others have been carried out, and the message names each.
    """
    waiting = _stages_first(runs)
    failed = {}
    each = max((run.devices for run in waiting), default=1)
    with _progress(sum(run.work for run in waiting)) as bar, _engine(workers, outcome, bar, each) as engine:
        while waiting or engine.running:
            for run in list(waiting):
                if run.after in failed:
                    failed[run] = f"needs {run.after}, which failed"
                    waiting.remove(run)
                elif engine.free > 0 and run.after not in waiting and run.after not in engine.running:
                    waiting.remove(run)
                    engine.start(run)
            for run, row, error in engine.wait() if engine.running else ():
                if error:
                    failed[run] = error.strip().splitlines()[-1]
                    bar.write(f"{run} failed: {error.strip()}", file=sys.stderr)
                elif run in runs:
                    append_row(results, row, run)
    if failed:
        named = "\n".join(f"- {run}: {error}" for run, error in failed.items())
        raise SystemExit(f"{len(failed)} of the runs failed; the same command tries them again.\n{named}")


def _stages_first(runs):
    """Returns the runs and what they need, in an order in which nothing comes before what it needs."""
    ordered = {}
    for run in runs:
        chain = []
        while run is not None:
            chain.append(run)
            run = run.after
        ordered |= dict.fromkeys(run for run in reversed(chain) if run in runs or not _is_done(run))
    return list(ordered)


def _is_done(run):
    return (run.folder / keeper.DONE).exists()


def _row(outcome, run):
    """Carries out a run where this is called, and returns its row."""
    with devices.spread(run.devices):
        where = provenance()  # before: a run of hours may outlast the commit that it began with
        return run.key | where | outcome(run) | ({"devices": run.devices} if run.devices > 1 else {})


@contextlib.contextmanager
def _engine(workers, outcome, bar, each):
    if workers.startswith("ray"):
        engine = _Ray(outcome, bar, workers, each)
    elif workers == "1":
        engine = _Loop(outcome, bar)
    else:
        gpus = _gpus()
        many = max(1, (len(gpus) or cores()) // each)
        engine = _Pool(outcome, bar, many if workers == "auto" else int(workers), gpus, each)
    try:
        yield engine
    finally:
        engine.close()


class _Engine:
    """Starts runs and waits for them. `running`: what each run that has been started has reported, in epochs."""

    def __init__(self, outcome, bar):
        self.outcome, self.bar = outcome, bar
        self.running = {}

    def report(self, run, epochs, note):
        self.running[run] += epochs
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(epochs)

    def finish(self, run, row, error):
        """Returns what became of a run, as `wait` does; the bar is told of the epochs that it did not report."""
        self.bar.update(run.work - self.running.pop(run))
        return run, row, error


class _Loop(_Engine):
    @property
    def free(self):
        return 1 - len(self.running)

    def start(self, run):
        self.running[run] = 0

    def wait(self):
        (run,) = self.running
        before, keeper.report = keeper.report, lambda epochs, note="": self.report(run, epochs, note)
        try:
            answer = _row(self.outcome, run), None
        except Exception:
            answer = None, traceback.format_exc()
        finally:
            keeper.report = before
        return [self.finish(run, *answer)]

    def close(self):
        pass


class _Pool(_Engine):
    """Processes of their own, one run at a time each. One that dies is replaced."""

    def __init__(self, outcome, bar, size, gpus, each):
        super().__init__(outcome, bar)
        self.idle = collections.deque(range(size))
        self.environments = [_environment(slot, size, gpus, each) for slot in range(size)]
        self.workers = {}  # slot: (process, our end of its pipe)
        self.at = {}  # slot: run

    @property
    def free(self):
        return len(self.idle)

    def start(self, run):
        slot = self.idle.popleft()
        if slot not in self.workers or not self.workers[slot][0].is_alive():  # it may have died while it was idle
            self.workers[slot] = self._spawn(slot)
        self.running[run], self.at[slot] = 0, run
        with contextlib.suppress(OSError):  # it has just died, which `wait` sees
            self.workers[slot][1].send(run)

    def _spawn(self, slot):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, self.outcome), daemon=True)
        before = dict(os.environ)
        os.environ.update(self.environments[slot])  # TensorFlow and JAX look at it before the first line of _serve
        try:
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        return process, ours

    def wait(self):
        """Returns [(run, row or None, error or None), ...] of runs that have just ended."""
        pipes = {self.workers[slot][1]: slot for slot in self.at}
        ended = []
        for pipe in connection.wait(list(pipes)):
            slot = pipes[pipe]
            try:
                kind, *content = pipe.recv()
            except (EOFError, OSError):
                process, _ = self.workers.pop(slot)
                process.join()
                kind, content = "ended", (None, f"its process ended with {_exit(process.exitcode)}")
            run = self.at[slot]
            if kind == "epochs":
                self.report(run, *content)
            else:
                ended.append(self.finish(run, *content))
                del self.at[slot]
                self.idle.append(slot)
        return ended

    def close(self):
        for process, _ in self.workers.values():
            process.kill()  # what they were at goes on from its checkpoint, which is whole at any time
        for process, pipe in self.workers.values():
            process.join()
            pipe.close()


def _serve(pipe, outcome):
    """What a process of the pool does: it carries out the runs that come through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends the others
    keeper.report = lambda epochs, note="": pipe.send(("epochs", epochs, note))
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            run = pipe.recv()
            try:
                answer = _row(outcome, run), None
            except BrokenPipeError:
                raise
            except Exception:
                answer = None, traceback.format_exc()
            pipe.send(("ended", *answer))


def _exit(code):
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"


def _environment(slot, size, gpus, each=1):
    """Returns the environment of a process of the pool: GPUs of its own, or a share of some if there are too few."""
    if not gpus:
        return {}
    if each > len(gpus):
        raise ValueError(f"--devices must be at most {len(gpus)}, the GPUs of this machine. Received: {each}.")
    share = 0.9 / math.ceil(size * each / len(gpus))
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(gpus[(slot * each + i) % len(gpus)] for i in range(each)),
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.2f}",
    }


def _gpus():
    """Returns the names of the GPUs that this process may use; asking TensorFlow or JAX would take them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


class _Ray(_Engine):
    """A Ray cluster: `ray.remote` around a run, and nothing else of Ray. It has to see the folder of checkpoints."""

    def __init__(self, outcome, bar, workers, each):
        super().__init__(outcome, bar)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError as error:
            raise ImportError(f"--workers={workers} needs Ray, which is not there: pip install ray.") from error
        self.ray = ray
        local = {"include_dashboard": False, "log_to_driver": False}
        ray.init(**local) if workers == "ray" else ray.init(workers)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self.size = (gpus or int(ray.cluster_resources()["CPU"])) // each
        if self.size == 0:
            raise ValueError(f"The Ray cluster has fewer than --devices={each} GPUs, or cores if it has no GPU.")
        needs = {"num_gpus": each} if gpus else {"num_cpus": each}
        self.remote = ray.remote(max_retries=0, **needs)(_row)
        self.at = {}  # Ray's reference: run

    @property
    def free(self):
        return self.size - len(self.at)

    def start(self, run):
        self.running[run] = 0
        self.at[self.remote.remote(self.outcome, run)] = run

    def wait(self):
        (reference,), _ = self.ray.wait(list(self.at), num_returns=1)
        run = self.at.pop(reference)
        try:
            answer = self.ray.get(reference), None
        except Exception as error:  # of the run, or Ray's own for a process that died
            answer = None, str(error)
        return [self.finish(run, *answer)]

    def close(self):
        self.ray.shutdown()


def _progress(epochs):
    """A bar on a terminal; in a log, a line every half minute."""
    terminal = sys.stderr.isatty()
    return tqdm.tqdm(
        total=epochs,
        unit="epoch",
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.1 if terminal else 30,
        ncols=100,
    )


class _Lines:
    """Standard error, with the bar's carriage returns made into new lines."""

    def write(self, text):
        sys.stderr.write(text.replace("\r", "\n"))

    def flush(self):
        sys.stderr.flush()
