"""The operator's policy file: YAML in, the policy of every tenant and route out, or all that is wrong with it.

::

    schema_version: 1
    default: {...}             for everybody
    routes:
      generate: {...}          over default, on one route
    tenants:
      acme:
        ...                    over both, for one tenant
        routes:
          chat: {...}          over everything, for one tenant on one route

Fields override one by one: a layer that sets ``prompt.threshold`` leaves ``prompt.action`` as it was. Lists are
replaced whole. The manual, with every field and its default, is docs/policy.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from gateway.policy import Action, Direction, DirectionPolicy, Policy, canonical_sha256, milder
from gateway.policy_yaml import Document, Problem, read_document
from gateway.policy_yaml import Path as FieldPath
from services.contracts.errors import ConfigError


class Route(StrEnum):
    """What a client may ask for; a route and its streaming twin (``/generate_stream``) share a policy."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    GENERATE = "generate"
    MODERATIONS = "moderations"


class TenantSection(Policy):
    """One tenant: fields for all routes, and those for single routes."""

    routes: Mapping[Route, Policy] = Field(default_factory=dict)


TenantName = Annotated[str, Field(pattern=r"^\S{1,200}$", strict=True)]


class PolicyFile(BaseModel):
    """The file as it is written. Its sections are policies of which only the fields that are set count."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1]
    default: Policy = Field(default_factory=Policy)
    routes: Mapping[Route, Policy] = Field(default_factory=dict)
    tenants: Mapping[TenantName, TenantSection] = Field(default_factory=dict)


@dataclass(frozen=True)
class PolicySet:
    """The policies in force: for everybody, and for the tenants that have sections of their own."""

    everybody: Mapping[Route, Policy]
    tenants: Mapping[str, Mapping[Route, Policy]]

    @classmethod
    def uniform(cls, policy: Policy) -> "PolicySet":
        """The same policy for all, for a gateway without a policy file."""
        return cls(dict.fromkeys(Route, policy), {})

    def of(self, tenant: str | None, route: Route) -> Policy:
        """The policy of a tenant on a route; one that the file does not name gets everybody's."""
        return self.tenants.get(tenant or "", self.everybody)[route]

    @cached_property
    def sha256(self) -> str:
        """Hash over all policies in force."""
        tenants = {name: _hashes(routes) for name, routes in self.tenants.items()}
        return canonical_sha256({"everybody": _hashes(self.everybody), "tenants": tenants})


def _hashes(routes: Mapping[Route, Policy]) -> dict[str, str]:
    return {route.value: policy.sha256 for route, policy in routes.items()}


def read_policies(path: Path, *, can_revise: bool = True) -> PolicySet:
    """Read and check a policy file; without ``can_revise`` it may not ask for revisions.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong: one line ``file:line: field: message`` for
            every problem, in the order of the file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the policy: {error.strerror}") from error
    return parse_policies(raw, str(path), can_revise=can_revise)


def parse_policies(raw: bytes, name: str, *, can_revise: bool = True) -> PolicySet:
    """Check a policy file's bytes; ``name`` stands in the messages. Raises ConfigError as ``read_policies`` does."""
    document = read_document(raw)
    problems = document.problems
    if document.lines:  # it is YAML: what it says can be checked as well
        refused = {(problem.line, problem.path) for problem in problems}
        try:
            file = PolicyFile.model_validate(document.content)
        except ValidationError as error:
            details = error.errors(include_url=False)
            problems = problems + [p for d in details if (p := _problem(d, document))[:2] not in refused]
        else:
            problems = problems + list(_without_effect(file, document))
            problems += [] if can_revise else _revisions(file, document)
    if problems:
        in_order = sorted(set(problems), key=lambda problem: (problem.line, problem.told(name)))
        raise ConfigError("\n".join(problem.told(name) for problem in in_order))
    return PolicySet(
        {route: _effective(file, None, route) for route in Route},
        {tenant: {route: _effective(file, tenant, route) for route in Route} for tenant in file.tenants},
    )


def _layers(file: PolicyFile, tenant: str | None, route: Route) -> list[tuple[FieldPath, Policy]]:
    """The sections that apply, each with its place in the file; later ones win."""
    layers: list[tuple[FieldPath, Policy]] = [(("default",), file.default)]
    if route in file.routes:
        layers.append((("routes", route.value), file.routes[route]))
    if tenant is not None:
        section = file.tenants[tenant]
        layers.append((("tenants", tenant), section))
        if route in section.routes:
            layers.append((("tenants", tenant, "routes", route.value), section.routes[route]))
    return layers


def _effective(file: PolicyFile, tenant: str | None, route: Route) -> Policy:
    fields: dict[str, Any] = {}
    for _, section in _layers(file, tenant, route):
        fields = _over(fields, section.model_dump(exclude_unset=True, exclude={"routes"}))
    return Policy.model_validate(fields)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, field by field."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _over(merged[name], value) if both else value
    return merged


def _without_effect(file: PolicyFile, document: Document) -> Iterator[Problem]:
    """Category actions that never come about, anywhere in the file."""
    for tenant in (None, *file.tenants):
        for route in Route:
            policy = _effective(file, tenant, route)
            places = [place for place, _ in _layers(file, tenant, route)]
            for direction in Direction:
                yield from _never_wins(policy.towards(direction), direction, places, document)


def _revisions(file: PolicyFile, document: Document) -> Iterator[Problem]:
    """Fields that ask for revisions, but for those of policies that only record."""
    message = (
        "there is no critique service to revise answers; say where it listens by --critique-url or "
        "FEDWARD_GATEWAY_CRITIQUE_URL, or use redact or refuse"
    )
    for tenant in (None, *file.tenants):
        for route in Route:
            policy = _effective(file, tenant, route)
            places = [place for place, _ in _layers(file, tenant, route)]
            actions: dict[FieldPath, Action | None] = {("response", "action"): policy.response.action}
            for category, own in policy.response.categories.items():
                actions["response", "categories", category.value, "action"] = own.action
            for field, action in actions.items():
                if action is Action.REVISE and not policy.shadow:
                    path = (*places[_layer(document, places, field)], *field)
                    yield Problem(document.lines[path], path, message)


def _never_wins(
    part: DirectionPolicy, direction: Direction, places: list[FieldPath], document: Document
) -> Iterator[Problem]:
    """Category actions that are milder than the direction's action, which wins wherever they apply.

    A worse action in a layer above is another matter: there a tenant has made everything stricter.
    """
    overall = _layer(document, places, (direction.value, "action"))
    for category, own in part.categories.items():
        field = (direction.value, "categories", category.value, "action")
        layer = _layer(document, places, field)
        if own.threshold is None and own.action and milder(own.action, part.action) and layer >= overall:
            path = (*places[layer], *field)
            message = (
                f"{own.action} never comes about: without a threshold of its own, {category} counts only in a text "
                f"that is found unsafe, and there {direction}.action, {part.action}, is worse and wins; "
                f"give {category} a threshold, or make {direction}.action milder and name the categories to treat worse"
            )
            yield Problem(document.lines[path], path, message)


def _layer(document: Document, places: list[FieldPath], field: FieldPath) -> int:
    """The number of the last layer that sets a field; -1 for none."""
    return max((number for number, place in enumerate(places) if (*place, *field) in document.lines), default=-1)


def _problem(detail: ErrorDetails, document: Document) -> Problem:
    path = tuple(part for part in detail["loc"] if part != "[key]")
    known = next(path[:end] for end in range(len(path), -1, -1) if path[:end] in document.lines)
    return Problem(document.lines[known], path, _message(detail, path))


def _message(detail: ErrorDetails, path: FieldPath) -> str:
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown field; known here: {', '.join(_fields(path[:-1]))}"
        case "missing":
            return "is missing"
        case "model_type" | "mapping_type" | "dict_type":
            return "must be a mapping (indented 'field: value' lines)"
        case "bool_type":
            message = "must be true or false"
        case "string_pattern_mismatch":
            message = "a tenant's name has 1 to 200 characters and no white space"
        case "tuple_type":
            return "must be a list, for example [small-model, 'large-*']"
        case "value_error":
            message = str(detail["ctx"]["error"])
        case _:
            message = detail["msg"].replace("Input should", "must")
    shown = detail["input"]
    return message if isinstance(shown, dict | list) else f"{message}; it is {str(shown)[:40]!r}"


def _fields(path: FieldPath) -> list[str]:
    """The names of the fields that the section at ``path`` can have."""
    shape: Any = PolicyFile
    for name in path:
        shape = shape.model_fields[name].annotation if hasattr(shape, "model_fields") else get_args(shape)[1]
    return list(shape.model_fields)
