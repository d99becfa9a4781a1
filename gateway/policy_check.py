"""``python -m gateway policy check``: what a policy file says, or all that is wrong with it."""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path

from gateway.policy import Direction, Policy
from gateway.policy_file import PolicySet, Route, read_policies
from services.contracts.errors import ConfigError

SUMMARY = """\
Check policy files and print what is in force for each tenant and route.

examples:
  python -m gateway policy check policy.yaml
  python -m gateway policy check policy.yaml --tenant acme --route chat
  python -m gateway policy check environments/*/policy.yaml > /dev/null && echo all are good

exit code: 0 when every file is good; 2 when one is not, with a line 'file:line: field: message' for each problem.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = ArgumentParser(prog="python -m gateway policy", description="Work with policy files.")
    check = parser.add_subparsers(title="commands", required=True, metavar="COMMAND").add_parser(
        "check", help="check policy files", description=SUMMARY, formatter_class=RawDescriptionHelpFormatter
    )
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="policy file, YAML")
    check.add_argument("--tenant", help="only this tenant's; one that the file does not name gets everybody's")
    check.add_argument("--route", choices=[route.value for route in Route], help="only this route's")
    arguments = parser.parse_args(argv)
    return max(_check(file, arguments) for file in arguments.files)


def _check(file: Path, arguments: Namespace) -> int:
    try:
        policies = read_policies(file)
    except ConfigError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    print(f"{file}: good, sha256 {policies.sha256}")
    route = Route(arguments.route) if arguments.route else None
    for heading, policy in _in_force(policies, arguments.tenant, route):
        print(f"\n{heading}", *_lines(policy), sep="\n  ")
    return 0


def _in_force(policies: PolicySet, tenant: str | None, route: Route | None) -> Iterator[tuple[str, Policy]]:
    """Each policy that is asked for, once, with the tenant and the routes that have it."""
    for name in (tenant,) if tenant else (None, *policies.tenants):
        alike: dict[str, tuple[Policy, list[str]]] = {}
        for each in (route,) if route else Route:
            policy = policies.of(name, each)
            alike.setdefault(policy.sha256, (policy, []))[1].append(each)
        who = f"tenant {name}" if name else "everybody else" if policies.tenants else "everybody"
        unnamed = ", which the file does not name" if name and name not in policies.tenants else ""
        for policy, routes in alike.values():
            yield f"{who}{unnamed}, on {', '.join(routes)}", policy


def _lines(policy: Policy) -> Iterator[str]:
    """What a policy says, for people."""
    stream = policy.stream
    yield f"sha256         {policy.sha256}"
    yield "mode           " + ("shadow: recorded, nothing is blocked" if policy.shadow else "enforced")
    yield f"models         {', '.join(policy.models)}"
    yield f"system prompt  {policy.system_prompt!r}" if policy.system_prompt else "system prompt  none"
    yield f"check          within {policy.check_deadline_ms} ms"
    yield f"stream         by {stream.unit}, {stream.max_characters} characters at most, {stream.idle_ms} ms of pause"
    for direction in Direction:
        part = policy.towards(direction)
        when = "if the classifier says unsafe" if part.threshold is None else f"from {part.threshold:g} on"
        yield f"{direction:<14} {part.action} {when}"
        for category, own in sorted(part.categories.items(), key=lambda item: int(item[0][1:])):
            when = "if found unsafe and likely" if own.threshold is None else f"from {own.threshold:g} on"
            yield f"  {category:<12} {own.action or part.action} {when} ({category.readable})"
