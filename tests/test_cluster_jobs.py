"""Which cluster is meant, nuclei and classes by real worker processes, and what is said where something is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from support_cluster import OPTIONS, PRELOAD, Watcher, data_files, wait_until, write_slides
from support_runs import make_run
from typer.testing import CliRunner

from wsi_engine import ExplainSettings, FeatureStore, classify, extract, segment_slides
from wsi_engine.cli.app import app
from wsi_engine.cli.cluster import ClusterDisplay
from wsi_engine.cluster.choice import ClusterChoice
from wsi_engine.cluster.messages import Tally
from wsi_engine.cluster.places import WorkerShare, check_shared
from wsi_engine.cluster.session import Session
from wsi_engine.errors import ClusterError, EncoderError, ModelError, SettingsError
from wsi_engine.jobs import SlideResult
from wsi_engine.runs import FeatureOrigin
from wsi_engine.workers import usable_cores

try:
    import distributed
except ImportError:
    distributed = None

needs_dask = pytest.mark.skipif(distributed is None, reason="needs Dask")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("local:3", ClusterChoice("local", workers=3)),
        ("local", ClusterChoice("local", workers=usable_cores())),
        ("slurm:12", ClusterChoice("slurm", workers=12)),
        ("slurm", ClusterChoice("slurm", workers=4)),
        ("tcp://node7:8786", ClusterChoice("address", "tcp://node7:8786")),
        ("tls://10.0.0.1:8786", ClusterChoice("address", "tls://10.0.0.1:8786")),
        ("node7:8786", ClusterChoice("address", "node7:8786")),
        ("/scratch/scheduler.json", ClusterChoice("file", "/scratch/scheduler.json")),
    ],
)
def test_a_cluster_by_its_name(text: str, choice: ClusterChoice) -> None:
    assert ClusterChoice.parse(text) == choice


@pytest.mark.parametrize(
    "text", ["", "local:0", "local:two", "slurm:-1", "local:", "node7", "node7:", "nowhere at all"]
)
def test_what_is_no_cluster(text: str) -> None:
    with pytest.raises(SettingsError, match="is no cluster: use local:N"):
        ClusterChoice.parse(text)


@pytest.mark.parametrize(
    "values",
    [{"kind": "cloud"}, {"kind": "local"}, {"kind": "address"}, {"kind": "local", "workers": 1, "part_tiles": 0},
     {"kind": "client", "retry_seconds": 0.0}, {"kind": "client", "reconnect_seconds": float("nan")}],
)  # fmt: skip
def test_choices_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        ClusterChoice(**values)


def test_no_tile_counts_twice() -> None:
    """A worker dies after 30 of 100 tiles of which it had stored 20; another goes on from there."""
    heard: list[Any] = []
    tally = Tally(lambda *slide: heard.append(slide), heard.append)
    for part, done in ((0, 0), (0, 30), (0, 20), (0, 60)):
        tally.hear({"slide": "a", "part": part, "tiles": 100, "done": done})
    tally.end("a")
    tally.hear({"slide": "a", "part": 0, "tiles": 100, "done": 100})
    assert heard == [("a", 100, 0), 30, 30, 40]
    heard.clear()
    tally.begin("b", 100, 10)
    for part, done in ((50, 0), (100, 10), (50, 25), (100, 50), (50, 50)):
        tally.hear({"slide": "b", "part": part, "tiles": 50, "done": done})
    assert heard == [("b", 100, 10), 25, 40, 25]
    heard.clear()
    tally.end("c")  # its first message comes later than its result
    tally.hear({"slide": "c", "part": 0, "tiles": 7, "done": 0})
    assert heard == [("c", 7, 0), 7]


def test_one_bar_for_slides_side_by_side() -> None:
    console = Console(force_terminal=True, width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with ClusterDisplay(console, lambda result: Text(result.status)) as display:
        display.run_started(4)
        display.slide_started("a", 100, 0)
        display.slide_started("b", 300, 50)
        display.tiles_done(150)
        assert display._bar is not None
        task = display._bar.tasks[0]
        assert (task.completed, task.total) == (200, 800)
        assert task.fields["slides"] == "[0/4] 2 at work"
        display.slide_finished(SlideResult("a", "a.svs", "done"))
        assert task.fields["slides"] == "[1/4] 1 at work"
    assert "[1/4] a: done" in console.export_text()


def test_slides_that_are_complete_say_nothing_of_the_others() -> None:
    """A run that is resumed: 90 of 100 slides are passed over, and the first of the others has begun."""
    console = Console(force_terminal=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    with ClusterDisplay(console, lambda result: Text(result.status)) as display:
        display.run_started(100)
        for number in range(90):
            display.slide_finished(SlideResult(f"s{number}", "", "already complete"))
        display.slide_started("s90", 1000, 0)
        assert display._bar is not None
        assert display._bar.tasks[0].total == 10_000
        display.slide_finished(SlideResult("s90", "", "done"))
        display.slide_finished(SlideResult("s91", "", "failed"))
        assert display._bar.tasks[0].total == 9_000


def test_a_plain_line_has_no_pace_before_there_is_one() -> None:
    console = Console(force_terminal=False, width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with ClusterDisplay(console, lambda result: Text(result.status)) as display:
        display.run_started(2)
        display.slide_started("a", 100, 0)
        display._printed -= 60
        display.tiles_done(8)
    assert "[0/2] 1 at work: 8/200 tiles\n" in console.export_text()


def test_threads_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_engine.cluster.places.usable_cores", lambda: 16)
    assert WorkerShare(peers=4).count_threads() == 4
    assert WorkerShare(peers=32).count_threads() == 1
    assert WorkerShare(threads=3, peers=4).count_threads() == 3


class _Scheduler:
    """A client that tells of workers on two machines, one of which has GPUs."""

    status = "running"
    places = (("10.0.0.1", {}), ("10.0.0.1", {}), ("10.0.0.1", {}), ("10.0.0.2", {"GPU": 1}))

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        workers = {f"tcp://{host}:{port}": {"resources": has} for port, (host, has) in enumerate(self.places, 4000)}
        return {"workers": workers}


def test_what_a_task_asks_of_a_worker() -> None:
    session = Session(ClusterChoice("address", "tcp://10.0.0.1:8786"), lambda seconds: _Scheduler())  # type: ignore[arg-type,return-value]
    assert session.find_resources("cuda") == session.find_resources("auto") == {"GPU": 1.0}
    assert session.find_resources("cpu") == {}
    assert (session.peers, session.count_workers(), session.threads) == (3, 4, None)
    session.client.places = session.client.places[:3]  # type: ignore[attr-defined]
    assert session.find_resources("auto") == {}


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    (tmp_path / "mark").touch()
    check_shared(tmp_path, "mark")
    with pytest.raises(ClusterError, match="does not see the output folder"):
        check_shared(tmp_path / "elsewhere", "mark")


def test_without_dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides = write_slides(tmp_path / "slides", 1, 200)
    monkeypatch.setitem(sys.modules, "distributed", None)
    arguments = ["extract", str(slides), "-o", str(tmp_path / "out"), "--encoder", "texture", "--cluster", "local:2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert 'error: --cluster needs Dask: pip install "wsi-engine[cluster]"' in result.output
    result = CliRunner().invoke(app, [*arguments[:-1], "two machines"])
    assert result.exit_code == 2
    assert "is no cluster" in result.output


def test_a_job_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that would be sent, by the user's configuration; no Slurm is needed to write it."""
    from wsi_engine.cluster.interrupts import keep_interrupts
    from wsi_engine.cluster.session import open_session

    with keep_interrupts():
        pytest.importorskip("dask_jobqueue")
        from wsi_engine.cluster.slurm import make_slurm_cluster
    import dask

    described = {"cores": 8, "processes": 2, "memory": "32GB", "walltime": "04:00:00", "queue": "gpu",
                 "worker-extra-args": ["--resources", "GPU=1"], "interface": None}  # fmt: skip
    with dask.config.set({f"jobqueue.slurm.{key}": value for key, value in described.items()}):
        cluster = make_slurm_cluster()
        try:
            script = cluster.job_script()  # type: ignore[no-untyped-call,unused-ignore]
        finally:
            cluster.close()
    assert "#SBATCH -p gpu" in script
    assert "#SBATCH --cpus-per-task=8" in script
    assert "#SBATCH -t 04:00:00" in script
    (command,) = (line for line in script.splitlines() if "distributed" in line)
    words = command.split()
    assert words[words.index("--nworkers") + 1] == "2"
    assert words[words.index("--resources") + 1] == "GPU=1"
    assert [words[place + 1] for place, word in enumerate(words) if word == "--nthreads"][-1] == "1"
    assert [words[place + 1] for place, word in enumerate(words) if word == "--memory-limit"][-1] == "0"
    with dask.config.set({"jobqueue.slurm.cores": None}), pytest.raises(ClusterError, match=r"jobqueue\.yaml"):
        make_slurm_cluster()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="sbatch"), open_session("slurm"):
        pass


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two workers."""
    if distributed is None:
        pytest.skip("needs Dask")
    import dask

    os.environ["WSI_TEST_LOG"] = str(tmp_path_factory.mktemp("log"))
    with (
        dask.config.set(
            {
                "distributed.worker.preload": [str(PRELOAD)],
                "distributed.deploy.lost-worker-timeout": "1 week",  # a worker that was killed may start slowly
            }
        ),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=None, dashboard_address=":0", silence_logs=50
        ) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slides(tmp_path_factory.mktemp("slides"), 3, 400)


def test_nuclei(cluster: Any, slides: Path, tmp_path: Path) -> None:
    """One worker is killed when the first slide has ended."""
    segment_slides(slides, tmp_path / "alone", "stain", slide_mpp=0.5)
    with distributed.Client(cluster, set_as_default=False) as client:
        pids = list(client.run(os.getpid).values())
        heard = Watcher()
        finished = heard.slide_finished

        def kill(result: Any) -> None:
            finished(result)
            if len(heard.ended) == 1:
                os.kill(pids[0], signal.SIGKILL)

        heard.slide_finished = kill  # type: ignore[method-assign]
        out = tmp_path / "out"
        report = segment_slides(slides, out, "stain", slide_mpp=0.5, cluster=client, progress=heard)
        again = segment_slides(slides, out, "stain", slide_mpp=0.5, cluster=client)
        with pytest.raises(SettingsError, match="no method 'magic'"):
            segment_slides(slides, out, "magic", slide_mpp=0.5, cluster=client)
    assert [result.slide_id for result in report.results] == ["slide0", "slide1", "slide2"]
    assert {result.status for result in report.results} <= {"done", "already complete"}
    assert {result.status for result in again.results} == {"already complete"}
    assert data_files(tmp_path / "out") == data_files(tmp_path / "alone") != {}
    for kind in ("csv", "geojson", "png", "labels.tif"):
        for slide in range(3):
            name = f"slide{slide}.stain.{kind}"
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert heard.tiles == sum(heard.slides.values()) > 0
    assert len(heard.ended) == 3


def test_classes(cluster: Any, slides: Path, tmp_path: Path) -> None:
    """Features that are missing are made by the cluster, and the table is that of one process to the last byte."""
    extract(slides / "slide0.png", tmp_path / "first", "texture", **OPTIONS)
    origin = FeatureOrigin.of(FeatureStore.open(tmp_path / "first" / "slide0.zarr"))
    run = make_run(tmp_path / "run", origin, temperatures=(1.0, 1.5))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    given = [slides / "slide1.png", broken, slides / "slide0.png", slides / "slide2.png"]
    how: dict[str, Any] = {"slide_mpp": 0.5, "batch_size": 8, "reader": "image"}
    how["settings"] = ExplainSettings(heatmaps=False, geojson=False, top=2)
    alone = classify(given, run, tmp_path / "alone", **how)
    with distributed.Client(cluster, set_as_default=False) as client:
        heard = Watcher()
        report = classify(given, run, tmp_path / "out", cluster=client, progress=heard, **how)
    assert [one.status for one in report.results] == ["done", "failed", "done", "done"]
    assert [one.slide_id for one in heard.ended] == ["slide1", "broken", "slide0", "slide2"]
    assert "broken.png" in report.failed[0].message
    both = zip(report.results, alone.results, strict=True)
    pairs = [(Path(ours.files["tiles"]), Path(one.files["tiles"])) for ours, one in both if ours.status == "done"]
    for ours, one in [*pairs, (tmp_path / "out" / "predictions.csv", tmp_path / "alone" / "predictions.csv")]:
        assert ours.read_bytes() == one.read_bytes()
    assert data_files(tmp_path / "out" / "features") == data_files(tmp_path / "alone" / "features") != {}


@needs_dask
def test_what_is_loaded_cannot_be_sent(slides: Path, tmp_path: Path) -> None:
    from wsi_engine import create_encoder, load_ensemble
    from wsi_engine.nuclei.method import create_method

    with pytest.raises(EncoderError, match="give its name"):
        extract(slides, tmp_path, create_encoder("texture"), cluster="local:1", **OPTIONS)
    with pytest.raises(SettingsError, match="give its name"):
        segment_slides(slides, tmp_path, create_method("stain"), slide_mpp=0.5, cluster="local:1")
    extract(slides / "slide0.png", tmp_path / "first", "texture", **OPTIONS)
    origin = FeatureOrigin.of(FeatureStore.open(tmp_path / "first" / "slide0.zarr"))
    model = load_ensemble(make_run(tmp_path / "run", origin), device="cpu")
    with pytest.raises(ModelError, match="give the folder"):
        classify(tmp_path / "first", model, tmp_path / "out", cluster="local:1")


@needs_dask
def test_the_command(slides: Path, tmp_path: Path) -> None:
    """Two processes of its own, started and stopped by the command."""
    import json

    arguments = ["extract", str(slides), "-o", str(tmp_path), "--encoder", "texture", "--slide-mpp", "0.5"]
    result = CliRunner().invoke(app, [*arguments, "--tile-px", "48", "--cluster", "local:2", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [slide["status"] for slide in report["slides"]] == ["done"] * 3
    assert "[3/3]" in result.stderr


@needs_dask
def test_an_interrupted_command_says_one_sentence(slides: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the command and its workers; the next run goes on."""
    code = "import sys; from wsi_engine.cli import main; sys.argv = ['wsi', *sys.argv[1:]]; main()"
    arguments = ["extract", str(slides), "-o", str(tmp_path / "out"), "--encoder", "texture", "--slide-mpp", "0.5",
                 "--tile-px", "32", "--batch-size", "2", "--cluster", "local:2"]  # fmt: skip
    script = tmp_path / "command.py"
    script.write_text(f'if __name__ == "__main__":\n    {code}\n')
    settings = {"DASK_DISTRIBUTED__WORKER__PRELOAD": f'["{PRELOAD}"]', "WSI_TEST_LOG": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, script, *arguments], env=os.environ | settings | {"WSI_TEST_SECONDS": "0.3"},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        wait_until((tmp_path / "encoded").exists)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "error: interrupted: what was finished is kept" in said
    report = extract(slides, tmp_path / "out", "texture", slide_mpp=0.5, tile_px=32, batch_size=2)
    assert {result.status for result in report.results} <= {"done", "already complete"}
