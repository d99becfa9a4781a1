"""The main job, start to end: ``make demo``.

Data, services, five federations, an evaluation after every round, a report, the release gate, and the gateway in
front of the released adapter with one allowed and one blocked chat. ``run_demo`` below is the whole story.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from stack.arms import ARMS, evaluate, train
from stack.chats import show_chats
from stack.data import prepare_data
from stack.processes import Processes, free_port
from stack.progress import Stages
from stack.release import release
from stack.report import write_report
from stack.up import gateway_plan, service_plan


@dataclass(frozen=True)
class DemoPlan:
    """What the demo runs; the defaults take about ten minutes on two cores."""

    out: Path
    seed: int = 0
    split_seed: int = 0
    rounds: int = 3
    clients: int = 8
    samples_per_client: int = 48
    harmful_share: float = 0.3
    arms: tuple[str, ...] = ARMS
    limit: int | None = None
    gateway: bool = True


def run_demo(plan: DemoPlan, console: Console) -> None:
    """Run the main job and leave its results in ``plan.out``.

    Every process that is started here is stopped here, also on Ctrl-C or failure.

    Raises:
        ProcessFailed: a service, a federation or an evaluation ended with an error.
        ConfigError: the run folder cannot be written.
    """
    started = time.monotonic()
    services = service_plan(free_port(), free_port(), free_port(), adapters=plan.out)
    stages = Stages(console, total=work(plan))
    with Processes(plan.out / "logs") as processes, stages:
        stages.begin("data: held-out split, client pools, red-team prompts")
        data = prepare_data(plan, processes)

        stages.begin("services: safety, critique, inference")
        for service in services:
            processes.start_service(service)
        for service in services:
            processes.wait_ready(service)
        stages.done(1)

        stages.begin("evaluate the untouched model")
        evaluate(plan, processes, services, data, arm="base", round_number=0)
        stages.done(1)

        for arm in plan.arms:
            stages.begin(f"federation: {arm}")
            train(plan, processes, services, data, arm, on_round=lambda: stages.done(1))
            for round_number in range(1, plan.rounds + 1):
                stages.begin(f"evaluate {arm}, round {round_number}")
                evaluate(plan, processes, services, data, arm, round_number)
                stages.done(1)

        stages.begin("report")
        write_report(plan, processes)

        if plan.gateway:
            stages.begin("release gate")
            release(plan, processes, services)
            stages.begin("gateway")
            gateway = gateway_plan(free_port(), services)
            processes.start_service(gateway)
            processes.wait_ready(gateway)
            stages.done(1)
            show_chats(gateway.url, console)
    console.print(f"[bold]done in {(time.monotonic() - started) / 60:.1f} minutes[/]: {plan.out / 'report.html'}")


def work(plan: DemoPlan) -> int:
    """How many steps the progress bar has: every round is trained and evaluated once."""
    return 2 * plan.rounds * len(plan.arms) + 3
