"""Comparisons on Ray: each worker holds one loaded model, and takes batches one by one.

A worker that is killed is started again, and its batch with it. Everything is stored by the process that asked for the
comparison. Batches then run side by side, on machines that may differ, so that seconds and peak memory are left out.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..core.errors import InputError
from .compare import Part, identity, outcomes_of
from .experiment import Experiment
from .task import Outcome

__all__ = ["RayWorkers"]

RESTARTS = 4  # of a worker, before it is given up: what kills it then is no accident
UNTIMED = ("seconds", "peak_bytes")


class Builds(Protocol):
    """What makes the same experiment in every process, such as a `Spec`."""

    def build(self) -> tuple[Experiment, dict[str, Any]]: ...


class Worker:
    """Runs in a process of Ray."""

    def __init__(self, spec: Builds) -> None:
        self.experiment, about = spec.build()
        self.samples = list(self.experiment.task.samples())
        self.known = identity(self.experiment, about)

    def identity(self) -> dict[str, Any]:
        return self.known

    def run(self, part: Part) -> list[Outcome]:
        found = outcomes_of(self.experiment, self.samples, part)
        for outcome in found:
            outcome.cost.update({name: float("nan") for name in UNTIMED if name in outcome.cost})
        return found


class RayWorkers:
    """A context manager, and a runner for `compare`.

    Args:
        address: of a cluster, `auto` for the one of this machine, or `local` for one that lives as long as this does.
        spec: what each worker builds. It is built here first, where it keeps files for the next time.

    Raises:
        InputError: Ray is not installed or not there; a worker has another tokenry, model or data; a worker dies again
            and again.
    """

    def __init__(self, address: str, spec: Builds) -> None:
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError("--ray needs the package ray; run `pip install 'tokenry[ray]'`") from None
        self.ray, self.address, self.spec = ray, address, spec
        self.workers: list[Any] = []

    def __enter__(self) -> RayWorkers:
        local = {"object_store_memory": 200 * 2**20, "include_dashboard": False} if self.address == "local" else {}
        try:
            _find(self.address)
            self.ray.init(address=self.address, log_to_driver=False, **local)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"there is no Ray at {self.address!r} ({reason}); give an address, or local") from None
        kind = "num_gpus" if self.ray.cluster_resources().get("GPU") else "num_cpus"
        places = int(self.ray.cluster_resources()["GPU" if kind == "num_gpus" else "CPU"])
        actor = self.ray.remote(**{kind: 1}, max_restarts=RESTARTS, max_task_retries=RESTARTS)(Worker)
        self.workers = [actor.remote(self.spec) for _ in range(places)]
        return self

    def __exit__(self, *_: object) -> None:
        self.ray.shutdown()

    def check(self, known: dict[str, Any]) -> None:
        with self._explained():
            others = self.ray.get([worker.identity.remote() for worker in self.workers])
        differs = [name for other in others for name in known if other.get(name) != known[name]]
        if differs:
            raise InputError(
                f"a worker of Ray has another {differs[0]} than this process; install the same tokenry, models and "
                "data on all machines"
            )

    def __call__(self, experiment: Experiment, parts: Iterable[Part]) -> Iterator[tuple[Part, list[Outcome]]]:
        free, running = list(self.workers), {}
        for part in parts:
            if not free:
                yield self._next(free, running)
            worker = free.pop()
            running[worker.run.remote(part)] = worker, part
        while running:
            yield self._next(free, running)

    def _next(self, free: list[Any], running: dict[Any, tuple[Any, Part]]) -> tuple[Part, list[Outcome]]:
        (done,), _ = self.ray.wait(list(running), num_returns=1)
        worker, part = running.pop(done)
        free.append(worker)
        with self._explained():
            return part, self.ray.get(done)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self.ray.exceptions.RayActorError as error:
            said = str(error).strip().splitlines()[-1]
            raise InputError(
                f"a worker of Ray has died for good ({said}); if memory is short give Ray fewer CPUs, and --resume "
                "goes on with what was measured"
            ) from None
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the task raised, as if it had been raised here


def _find(address: str) -> None:
    """Whether anybody listens at HOST:PORT: Ray itself would try again and again for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
