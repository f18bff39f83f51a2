"""Find plugins, ask each alone, load backends on first use, and report what is here.

A plugin that fails to import, or whose hook raises, is a `Status` with its reason and never takes
the others down: so plugins are loaded one by one from their entry points, and each is registered
in a pluggy manager only once it has shown that its hooks can be read.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from nibs import hookspecs
from nibs.capabilities import BackendInfo
from nibs.errors import BackendUnavailable, NibsError, UnknownBackend

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from nibs.request import Request
    from nibs.spec import Backend

__all__ = ["GROUP", "Registry", "Status", "backends", "registry"]

GROUP = "nibs"
ENVIRONMENT = "NIBS_PLUGINS"

State = Literal["ready", "broken"]

FAULTS = (Exception, SystemExit)
"""What a guest may raise: anything, also a wish to leave; only the user's Ctrl-C is not a guest's."""


@dataclass(frozen=True, slots=True)
class Status:
    """One backend, or one plugin that could not be asked: what it is and whether it can run.

    name: the backend's, or the plugin's where it never came to name one.
    state: `"ready"` (declared; its load has succeeded or has not been tried) or `"broken"`.
    reason: empty when ready, else what went wrong, in one line.
    distribution: where the plugin comes from, such as `nibs-numpy 0.1.0` or `NIBS_PLUGINS`.
    info: what the plugin declared; None where it never did.
    """

    name: str
    state: State
    reason: str
    distribution: str
    info: BackendInfo | None = None


class _Hooks(pluggy.PluginManager):
    """Looks at names that can be hooks and at no other.

    Older pluggy touches all that `dir(plugin)` gives, and a guest's lazy attribute would load its framework.
    """

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        return super().parse_hookimpl_opts(plugin, name) if name.startswith("nibs_") else None


class Registry:
    """The backends of one process. Reads the installed plugins once, when first asked."""

    def __init__(self) -> None:
        self.hooks = _Hooks("nibs")
        self.hooks.add_hookspecs(hookspecs)
        self._statuses: dict[str, Status] = {}
        self._backends: dict[str, Backend] = {}
        self._owners: dict[type, str | None] = {}
        self._bringers: dict[str, list[str]] = {}
        self._seen: set[str] = set()
        self._looked = self._looking = False
        self._lock = threading.RLock()

    def statuses(self, *, probe: bool = False) -> list[Status]:
        """All backends by name, ready or broken; `probe` loads each to find out."""
        self._look()
        if probe:
            for status in list(self._statuses.values()):
                if status.state == "ready":
                    try:
                        self.load(status.name)
                    except BackendUnavailable:
                        continue  # load() has written the reason down
        return [self._statuses[name] for name in sorted(self._statuses)]

    def info(self, name: str) -> BackendInfo:
        """What the backend declared. Raises UnknownBackend, or BackendUnavailable if it is broken."""
        self._look()
        status = self._statuses.get(name)
        if status is None:
            if not self._statuses:
                raise BackendUnavailable(
                    f"backend '{name}' cannot run here: no backend is installed at all. "
                    "Start with: pip install nibs-numpy"
                )
            raise UnknownBackend(self._unknown(name))
        if status.info is None:
            raise BackendUnavailable(f"backend '{name}' is broken: {status.reason}. {_mend(status)}")
        return status.info

    def load(self, name: str) -> Backend:
        """The backend itself, loaded once. Raises UnknownBackend or BackendUnavailable."""
        if name in self._backends:
            return self._backends[name]
        info = self.info(name)
        with self._lock:
            if name not in self._backends:
                try:
                    self._backends[name] = _backend(info.load())
                except FAULTS as cause:
                    reason = str(cause) if isinstance(cause, NibsError) else _reason(cause)
                    reason = reason.rstrip(".")
                    status = replace(self._statuses[name], state="broken", reason=reason)
                    self._statuses[name] = status
                    raise BackendUnavailable(f"backend '{name}' cannot run here: {reason}. {_mend(status)}") from cause
        return self._backends[name]

    def select(self, request: Request, candidates: Sequence[BackendInfo]) -> str | None:
        """The first answer to `nibs_select`, the plugin that came last asked first; None where all leave it to others.

        A policy that raises, or names no candidate, is passed over with a warning.
        """
        self._look()
        names = [info.name for info in candidates]
        for where, plugin in reversed(self.hooks.list_name_plugin()):
            try:
                answer = self._alone("nibs_select", plugin)(request=request, candidates=candidates)
                if answer is not None and answer not in names:
                    raise ValueError(f"it answered {answer!r}, expected one of {', '.join(names)}")
            except FAULTS as fault:
                warnings.warn(f"nibs_select of {where} is passed over: {_reason(fault)}", RuntimeWarning, stacklevel=2)
                continue
            if answer is not None:
                return str(answer)
        return None

    def owner(self, array: object) -> str | None:
        """Name of the backend that owns this kind of array, or None."""
        kind = type(array)
        if kind not in self._owners:
            self._owners[kind] = self._find_owner(kind)
        return self._owners[kind]

    def add(self, plugin: ModuleType | object, name: str, distribution: str) -> None:
        """Ask one plugin for its backends and keep the answer; never raises for a guest's fault."""
        with self._lock:
            try:
                self.hooks.register(plugin, f"{name} ({distribution})")
                declared = self._ask(plugin)
            except FAULTS as fault:
                if self.hooks.is_registered(plugin):
                    self.hooks.unregister(plugin)
                self._put(Status(name, "broken", _reason(fault), distribution))
                return
            for info in declared:
                self._put(Status(info.name, "ready", "", distribution, info))
            self._owners.clear()

    def _look(self) -> None:
        if self._looked:
            return
        with self._lock:
            if self._looked or self._looking:  # looking: a plugin asks what is here while it is imported
                return
            from importlib.metadata import EntryPoint, entry_points  # a third of what `import nibs` would take

            self._looking = True
            try:
                for entry in entry_points(group=GROUP):
                    self._add_by_import(entry, _distribution(entry))
                for module in filter(None, (part.strip() for part in os.environ.get(ENVIRONMENT, "").split(","))):
                    name = module.partition(".")[0].removeprefix("nibs_")
                    self._add_by_import(EntryPoint(name, module, GROUP), ENVIRONMENT)
                self._looked = True
            finally:
                self._looking = False

    def _add_by_import(self, entry: EntryPoint, where: str) -> None:
        if entry.value in self._seen:  # named by an entry point and by NIBS_PLUGINS
            return
        self._seen.add(entry.value)
        try:
            plugin = entry.load()
        except FAULTS as fault:
            self._put(Status(entry.name, "broken", _reason(fault), where))
            return
        if not self.hooks.is_registered(plugin):
            self.add(plugin, entry.name, where)

    def _alone(self, hook: str, plugin: object) -> pluggy.HookCaller:
        """The caller of one plugin's own hook: one that raises loses nobody else's answer."""
        return self.hooks.subset_hook_caller(hook, [other for other in self.hooks.get_plugins() if other is not plugin])

    def _ask(self, plugin: object) -> list[BackendInfo]:
        """What this plugin declares; a wrong answer is its own fault."""
        if not self.hooks.get_hookcallers(plugin):
            raise TypeError("it brings no hook; is @hookimpl forgotten?")
        found = []
        for answer in self._alone("nibs_backends", plugin)():
            for info in answer:
                if not isinstance(info, BackendInfo):
                    raise TypeError(f"nibs_backends() gave a {type(info).__name__}, expected BackendInfo")
                found.append(info)
        return found

    def _put(self, status: Status) -> None:
        """Keep a status. A name that two plugins bring is broken, and names both; a plugin that never came to
        name a backend takes no name from one that did.
        """
        name, there = status.name, self._statuses.get(status.name)
        if status.info is None:
            if there is not None:
                name = f"{name} of {status.distribution}"
            self._statuses[name] = replace(status, name=name)
            return
        if there is not None and name not in self._bringers:
            del self._statuses[name]
            self._put(replace(there, name=f"{name} of {there.distribution}"))
        bringers = self._bringers.setdefault(name, [])
        bringers.append(status.distribution)
        if len(bringers) > 1:
            reason = f"{len(bringers)} plugins bring it: {' and '.join(bringers)}; uninstall all but one"
            status = Status(name, "broken", reason, ", ".join(bringers))
            self._backends.pop(name, None)
        self._statuses[name] = status

    def _find_owner(self, kind: type) -> str | None:
        self._look()
        names = [f"{cls.__module__}.{cls.__qualname__}" for cls in kind.__mro__]
        for name in names:
            owners = [s.name for s in self.statuses() if s.info is not None and name in s.info.arrays]
            if owners:  # several: the framework's namesake, so that a newcomer takes nobody's arrays by its name
                root = name.partition(".")[0]
                return root if root in owners else owners[0]
        return None

    def _unknown(self, name: str) -> str:
        import difflib  # for this sentence only

        near = difflib.get_close_matches(name, self._statuses, n=1)
        guess = f" Did you mean '{near[0]}'?" if near else ""
        return f"no backend named '{name}'. Here: {self.listing()}.{guess} 'nibs backends' shows all."

    def listing(self) -> str:
        """`numpy, torch (ready); jax (not tried yet); cupy (broken: ...)`, for an error. Loads none to find out, which
        takes seconds, for which the other ranks of a ring would wait.
        """
        found = self.statuses()
        ready = [status.name for status in found if status.name in self._backends]
        untried = [status.name for status in found if status.state == "ready" and status.name not in self._backends]
        broken = [f"{status.name} (broken: {status.reason})" for status in found if status.state == "broken"]
        groups = [
            f"{', '.join(names)} ({word})" for names, word in ((ready, "ready"), (untried, "not tried yet")) if names
        ]
        return "; ".join(groups + broken) or "none"


def _reason(fault: BaseException) -> str:
    text = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {text[0]}" if text else type(fault).__name__


def _distribution(entry: EntryPoint) -> str:
    """`nibs-numpy 0.1.0`; a half-removed distribution has no such name."""
    try:
        return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
    except FAULTS:
        return entry.value


def _backend(loaded: object) -> Backend:
    from nibs.spec import Backend

    if not isinstance(loaded, Backend):
        raise TypeError(f"its load() gave {loaded!r:.60}, expected a nibs.spec.Backend with loss and loss_and_grad")
    return loaded


def _mend(status: Status) -> str:
    command = status.info.install if status.info is not None else ""
    if command:
        return f"Try: {command}"
    return f"It comes from {status.distribution}; 'nibs backends' shows all."


registry = Registry()
"""The registry of this process."""


def backends(*, probe: bool = False) -> list[Status]:
    """Every backend here, ready or broken and why, by name; `probe` loads each one to find out."""
    return registry.statuses(probe=probe)
