"""Comparisons on Ray: the same numbers, a worker that is killed, and going on after an interruption."""

import os
import signal
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.comparing import Roots, experiment

from tokenry import InputError
from tokenry.measure.compare import Interrupted, compare
from tokenry.measure.ledger import evidence
from tokenry.measure.ray_workers import RayWorkers
from tokenry.measure.store import RunStore

ray_is_there = find_spec("ray") is not None
needs_ray = [pytest.mark.slow, pytest.mark.skipif(not ray_is_there, reason="ray is not installed")]


class Logged(Roots):
    """Says in a file what it runs; where one is named, it kills its process once instead."""

    def __init__(self, log: str, kills: str = ""):
        super().__init__()
        self.path, self.kills = Path(log), Path(kills) if kills else None

    def run(self, arm, samples, seed):
        if self.kills and self.kills.exists():
            self.kills.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        with self.path.open("a") as lines:
            print(arm.name, samples[0].id, seed, file=lines)
        return super().run(arm, samples, seed)


@dataclass(frozen=True)
class Spec:
    log: str
    kills: str = ""
    model: str = "none"

    def build(self):
        return experiment(Logged(self.log, self.kills)), {"model": self.model}


@pytest.fixture(autouse=True)
def _workers_find_the_tests(monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    )


def on_ray(spec, store=None, **options):
    built, about = spec.build()
    with RayWorkers("local", spec) as runner:
        return compare(built, store, about=about, runner=runner, **options)


def without_seconds(comparison):
    numbers = comparison.to_dict()
    for row in numbers["subjects"].values():
        row.pop("seconds", None)
    return numbers


@pytest.mark.skipif(ray_is_there, reason="ray is installed")
def test_without_the_package_it_is_refused():
    with pytest.raises(InputError, match=r"pip install 'tokenry\[ray\]'"):
        RayWorkers("local", Spec("x"))


class TestOnRay:
    pytestmark = needs_ray

    def test_numbers_are_those_of_one_process_and_seconds_are_left_out(self, tmp_path):
        spec = Spec(str(tmp_path / "log"))
        here, there = compare(spec.build()[0]), on_ray(spec)
        assert without_seconds(there) == without_seconds(here)
        assert here.costs() == ["seconds", "tokens"] and there.costs() == ["tokens"]
        entries = [evidence(c, c.experiment.findings(c), model="none", command="") for c in (here, there)]
        assert "costs" not in entries[0] and "side by side, on Ray" in entries[1]["costs"]
        assert entries[0]["verdict"] == entries[1]["verdict"]

    def test_a_killed_worker_loses_nothing(self, tmp_path):
        kills = tmp_path / "kill"
        kills.touch()
        spec = Spec(str(tmp_path / "log"), str(kills))
        found = on_ray(spec)
        assert not kills.exists()
        assert without_seconds(found) == without_seconds(compare(experiment()))

    def test_interrupted_it_is_resumed_here_or_there(self, tmp_path):
        spec = Spec(str(tmp_path / "log"))

        def stop(done, total, *what):
            if done >= 8:
                raise KeyboardInterrupt

        with RunStore(tmp_path / "runs.sqlite") as store:
            with pytest.raises(Interrupted, match="of 24"):
                on_ray(spec, store, progress=stop)
            kept = len(store.outcomes(1))
            assert 8 <= kept < 24
            (tmp_path / "log").unlink()
            resumed = on_ray(spec, store, resume=True)
            assert len((tmp_path / "log").read_text().splitlines()) == (24 - kept) // 2
            again = compare(spec.build()[0], store, about={"model": "none"}, resume=True)
        assert without_seconds(resumed) == without_seconds(again) == without_seconds(compare(experiment()))
        assert again.side_by_side

    def test_a_worker_with_another_model_is_refused(self, tmp_path):
        spec = Spec(str(tmp_path / "log"))
        built, _ = spec.build()
        with RayWorkers("local", spec) as runner, pytest.raises(InputError, match="has another model"):
            compare(built, about={"model": "another"}, runner=runner)

    def test_a_task_that_fails_says_what_it_says_in_one_process(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            on_ray(Spec(str(tmp_path / "nowhere" / "log")))

    def test_no_cluster_at_that_address(self):
        with pytest.raises(InputError, match="there is no Ray at"), RayWorkers("127.0.0.1:1", Spec("x")):
            pass


def test_nothing_of_ray_is_imported_without_it():
    assert "ray" not in sys.modules or ray_is_there
