"""The report on one job: ``summary.json``, ``samples.jsonl``, the plots and one self-contained ``report.html``."""

from pathlib import Path

from evaluation.compare import summarise_job
from evaluation.figures import ReportSummary
from evaluation.files import read_json, write_json, write_jsonl
from evaluation.judge_accuracy import JudgeReport
from evaluation.page import render
from evaluation.plots import draw_all
from evaluation.run_folder import ArmRun, read_run_folder
from evaluation.scoring import Sample
from services.common.files import replace_file

REPORT = "report.html"
JUDGES = "judges.json"


class ArmSample(Sample):
    """A sample with the arm and the round that it is from."""

    arm: str
    round: int


def write_report(folder: Path, *, command: str | None = None, seeds: dict[str, int] | None = None) -> ReportSummary:
    """Compare the arms of a job's folder and write the report into it.

    Args:
        folder: laid out as :mod:`evaluation.run_folder` says.
        command: the command that started the job, where it was not this process.
        seeds: the job's own seeds by name, for the provenance.

    Raises:
        ConfigError: nothing was evaluated, or the evaluations cannot be compared; the message says which and why.
        DataError: a file of the folder is malformed.
        OSError: the folder cannot be written.
    """
    arms = read_run_folder(folder)
    accuracy = read_json(folder / JUDGES, JudgeReport) if (folder / JUDGES).exists() else None
    summary = summarise_job(arms, seeds=seeds or {}, command=command, judge_accuracy=accuracy)
    write_json(folder / "summary.json", summary)
    write_jsonl(folder / "samples.jsonl", (sample for arm in arms for sample in _labelled(arm)))
    plots = draw_all(summary)
    for name, plot in plots.items():
        replace_file(folder / f"{name}.png", plot.light)
    replace_file(folder / REPORT, render(summary, plots).encode())
    return summary


def _labelled(arm: ArmRun) -> list[ArmSample]:
    return [ArmSample(**dict(sample), arm=arm.name, round=arm.last_round) for sample in arm.samples]
