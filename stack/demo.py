"""The main job, start to end: ``make demo``.

Data, services, five federations, an evaluation of every round, a report, the release gate, and the gateway in front
of the released adapter with one allowed and one blocked chat. ``run_demo`` below is the whole story.
"""

import sys
import time

from rich.console import Console

from services.common.files import replace_file
from services.common.ports import free_port
from services.contracts.errors import ConfigError
from stack.arms import evaluate, train_arms
from stack.data import prepare_data
from stack.plan import DemoData, DemoPlan
from stack.processes import Processes, Service
from stack.progress import Stages
from stack.release import promote, show_chats, write_chats
from stack.up import gateway_plan, service_plan


def run_demo(plan: DemoPlan, console: Console, command: str) -> None:
    """Run the main job and leave its results in ``plan.out``.

    Every process that is started here is stopped here, also on Ctrl-C or failure. The same plan in the same folder
    goes on where it was interrupted.

    Raises:
        ProcessFailed: a service, a federation or an evaluation ended with an error, or the gate refused.
        ConfigError: the run folder holds another demo, or cannot be written.
    """
    open_folder(plan)
    say_which_prompts(plan, console)
    began = time.monotonic()
    services = service_plan(free_port(), free_port(), free_port())
    with Processes(plan.out / "logs") as processes, Stages(console, plan.steps()) as stages:
        stages.begin("data: held-out prompts, client pools, red-team prompts")
        data = prepare_data(plan, processes)

        stages.begin("services: safety, critique, inference")
        processes.start_services(services)

        stages.begin(f"federations: {', '.join(plan.arms)}")
        train_arms(plan, processes, services, data, on_round=stages.step)

        stages.begin("evaluation of every round")
        evaluate_arms(plan, processes, services, data, stages)

        stages.begin("report")
        measure_judge(plan, processes, services)
        console.print(write_report(plan, processes, command), markup=False, highlight=False, soft_wrap=True)

        if plan.release:
            release(plan, processes, services, stages, console)
    minutes = (time.monotonic() - began) / 60
    console.print(
        f"done in {minutes:.1f} minutes: {plan.out / 'report.html'}", style="bold", markup=False, soft_wrap=True
    )


def say_which_prompts(plan: DemoPlan, console: Console) -> None:
    """Say where the prompts come from: figures on built-in prompts must not be taken for AdvBench's."""
    if plan.benchmarks is None:
        note = "FEDWARD_DATA is not set: built-in prompts stand in for AdvBench, Dolly and XSTest (docs/data.md)"
        console.print(f"[yellow]{note}[/]")
    else:
        console.print(f"benchmarks: AdvBench, Dolly and XSTest from {plan.benchmarks}", markup=False)


def release(plan: DemoPlan, processes: Processes, services: list[Service], stages: Stages, console: Console) -> None:
    """Pass the last adapter through the release gate, and chat with it through the gateway."""
    stages.begin("release gate")
    promote(plan, processes, services[-1])
    stages.begin("gateway")
    gateway = gateway_plan(free_port(), services)
    processes.start_services([gateway])
    write_chats(plan.last_file, show_chats(gateway.url, console))


def evaluate_arms(
    plan: DemoPlan, processes: Processes, services: list[Service], data: DemoData, stages: Stages
) -> None:
    """Evaluate the untouched model and then every round of every arm, on the same prompts."""
    evaluate(plan, processes, services, data, "base", 0)
    stages.step("base")
    for arm in plan.arms:
        for round_number in range(1, plan.rounds + 1):
            evaluate(plan, processes, services, data, arm, round_number)
            stages.step(f"{arm}, round {round_number}")


def measure_judge(plan: DemoPlan, processes: Processes, services: list[Service]) -> None:
    """Measure the judge's own accuracy on human labels, for the report; needs the benchmarks."""
    if plan.benchmarks:
        flags = ["--data", str(plan.benchmarks), "--judge", services[0].url, "--out", str(plan.out / "judges.json")]
        processes.run("judges", [sys.executable, "-m", "evaluation", "judges", *flags])


def write_report(plan: DemoPlan, processes: Processes, command: str) -> str:
    """Have the evaluation write summary.json, the plots and report.html; returns its table."""
    seeds = [f"training={plan.seed}", f"split={plan.split_seed}", "decoding=0"]
    report = ["report", str(plan.out), "--command", command, "--seeds", *seeds]
    return processes.run("report", [sys.executable, "-m", "evaluation", *report])


def open_folder(plan: DemoPlan) -> None:
    """Make the run folder, or go on in the folder of an interrupted demo of the same plan.

    Raises:
        ConfigError: the folder holds a finished demo or one of another plan, or cannot be written.
    """
    try:
        if not plan.note.exists() and (plan.out / "summary.json").exists():
            raise ConfigError(f"{plan.out} holds a report on something else; choose another folder with --out")
        if plan.is_finished():
            raise ConfigError(f"{plan.out} holds a finished demo; remove it, or choose another (make demo RUN=...)")
        plan.out.mkdir(parents=True, exist_ok=True)
        replace_file(plan.note, plan.identity().encode())
    except OSError as error:
        raise ConfigError(f"cannot write to {plan.out}: {error.strerror}") from error
